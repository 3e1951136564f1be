import numpy as np
import pytest

from distopt import ops
from distopt.ops import nn
from distopt.tape import GradientTape
from distopt.variables import Variable

_IMAGES = np.random.default_rng(0).standard_normal((2, 6, 5, 3))
_FILTERS = np.random.default_rng(1).standard_normal((3, 3, 3, 4))


@pytest.mark.parametrize("strides", [[1, 2, 1, 1], [2, 1], (2, 1), [1], 1])
def test_conv2d_takes_tensorflows_strides(strides):
    rows_columns = {4: (2, 1), 2: (2, 1), 1: 1}[len(strides) if not isinstance(strides, int) else 1]
    found = nn.conv2d(_IMAGES, _FILTERS, strides=strides, padding="SAME", name="conv")
    expected = ops.conv2d(_IMAGES, _FILTERS, strides=rows_columns)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert found.name.startswith("conv")


def test_pools_and_lrn_are_those_of_ops():
    found = nn.max_pool(_IMAGES, ksize=[1, 3, 2, 1], strides=[1, 2, 1, 1], padding="SAME")
    np.testing.assert_array_equal(found.numpy(), ops.max_pool(_IMAGES, (3, 2), (2, 1), "SAME").numpy())
    found = nn.avg_pool(_IMAGES, [1, 2, 2, 1], [1, 2, 2, 1], "VALID")
    np.testing.assert_array_equal(found.numpy(), ops.average_pool(_IMAGES).numpy())
    found = nn.lrn(_IMAGES, 1, bias=1.0, alpha=0.5, beta=0.75)
    expected = ops.local_response_normalization(_IMAGES, 1, 1.0, 0.5, 0.75)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.parametrize("sizes", [[2, 1, 1, 1], [1, 1, 1, 2], [1, 1, 1], [1, 1, 1, 1, 1]])
def test_windows_over_examples_or_channels_are_refused(sizes):
    with pytest.raises(ValueError, match=r"strides must be .* are not supported"):
        nn.conv2d(_IMAGES, _FILTERS, strides=sizes)
    with pytest.raises(ValueError, match=r"ksize must be .* are not supported"):
        nn.max_pool(_IMAGES, sizes, 2, "SAME")


def test_bias_add_adds_along_the_last_axis_and_its_gradient_is_the_sum_over_the_others():
    bias = Variable(np.array([1.0, 2.0, 3.0]))
    with GradientTape() as tape:
        y = nn.bias_add(_IMAGES, bias)
    np.testing.assert_array_equal(y.numpy(), _IMAGES + np.array([1.0, 2.0, 3.0]))
    assert tape.gradient(y, bias).tolist() == [60.0, 60.0, 60.0]


@pytest.mark.parametrize("bias", [np.ones(2), np.ones((1, 3)), np.float64(1.0)])
def test_bias_add_refuses_another_shape(bias):
    with pytest.raises(ValueError, match=r"bias of shape \(3,\) for a value of shape \(2, 6, 5, 3\), got"):
        nn.bias_add(_IMAGES, bias)


def test_add_n_takes_a_list_or_arguments():
    assert float(ops.add_n([1.0, 2.0, 3.0])) == 6.0
    assert float(ops.add_n(1.0, 2.0)) == 3.0
    assert ops.add_n((np.ones(2),), name="total").name.startswith("total")


@pytest.mark.parametrize("terms", [[], [np.ones(2), np.ones(3)], [np.ones(1), 1.0]])
def test_add_n_refuses_no_terms_and_shapes_that_differ(terms):
    with pytest.raises(ValueError, match="inputs must be a list of at least one Tensor"):
        ops.add_n(terms)


def test_cross_entropy_is_per_example():
    logits = np.log(np.array([[1.0, 3.0], [1.0, 1.0]]))
    found = nn.sparse_softmax_cross_entropy_with_logits(labels=np.array([1, 0]), logits=logits)
    np.testing.assert_allclose(found.numpy(), [-np.log(0.75), np.log(2.0)], rtol=1e-12)


def test_batch_normalization_takes_moments_in_tensorflows_order():
    x = np.array([[1.0], [3.0]])
    found = nn.batch_normalization(x, 1.0, 3.0, 10.0, 2.0, 1.0, name="bn")
    assert found.numpy().ravel().tolist() == [10.0, 12.0]
    assert found.name.startswith("bn")
