"""What primitives compute, against arithmetic; their gradients are in test_gradients.py."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape
from distopt.variables import Variable


def test_cross_entropy_of_known_probabilities():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    labels = np.array([0, 2])
    each = ops.sparse_softmax_cross_entropy(logits, labels=labels, reduction="none").numpy()
    np.testing.assert_allclose(each, -np.log([0.5, 0.7]), rtol=1e-12)
    total = ops.sparse_softmax_cross_entropy(logits + 1000.0, labels=labels)
    assert float(total) == pytest.approx(-np.log(0.35))


def test_cross_entropy_refuses_what_does_not_fit():
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match=r"'sum' or 'none', got 'mean'; to average, give the aggregator"):
        ops.sparse_softmax_cross_entropy(logits, labels=np.array([0, 1]), reduction="mean")
    with pytest.raises(ValueError, match="labels go from 0 to 3, but there are 3 classes"):
        ops.sparse_softmax_cross_entropy(logits, labels=np.array([0, 3]))
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        ops.sparse_softmax_cross_entropy(logits, labels=np.array([0, 1, 2]))


def test_softmax_cross_entropy_of_known_probabilities():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    labels = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    each = ops.softmax_cross_entropy(logits + 1000.0, labels=labels, reduction="none").numpy()
    np.testing.assert_allclose(each, [-np.log(0.5), -np.log(0.1 * 0.2) / 2], rtol=1e-12)
    assert float(ops.softmax_cross_entropy(logits, labels=labels)) == pytest.approx(each.sum())
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2,\)"):
        ops.softmax_cross_entropy(logits, labels=np.zeros(2))
    with pytest.raises(ValueError, match="'sum' or 'none', got 'mean'"):
        ops.softmax_cross_entropy(logits, labels=labels, reduction="mean")


def test_sigmoid_cross_entropy_of_known_probabilities():
    logits = np.array([np.log(3.0), 0.0, 1000.0, -1000.0])  # probabilities 0.75, 0.5, 1, 0
    each = ops.sigmoid_cross_entropy(logits, labels=np.array([1.0, 0.25, 0.0, 1.0])).numpy()
    np.testing.assert_allclose(each, [-np.log(0.75), np.log(2.0), 1000.0, 1000.0], rtol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(4,\), labels \(1,\)"):
        ops.sigmoid_cross_entropy(logits, labels=np.zeros(1))


def test_squared_error_is_averaged_over_features_and_summed_over_examples():
    predictions, targets = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 1.0]])
    assert float(ops.mean_squared_error(predictions, targets=targets)) == 2.5 + 5.0
    each = ops.mean_squared_error(predictions, targets=targets, reduction="none")
    assert each.numpy().tolist() == [2.5, 5.0]
    with pytest.raises(ValueError, match=r"\(2, 2\), targets \(2,\)"):
        ops.mean_squared_error(predictions, targets=np.zeros(2))


def test_sigmoid_does_not_overflow():
    found = ops.sigmoid(np.array([-1000.0, 0.0, 1000.0], "f4")).numpy()
    assert found.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 2, 2), (2, 2))])
def test_matmul_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"matmul needs shapes \[n, k\] and \[k, m\]"):
        ops.matmul(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_dense_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(3, 4\), \(3,\)"):
        ops.dense(np.zeros((2, 3)), np.zeros((3, 4)), np.zeros(3))


def test_l2_loss_is_half_the_sum_of_squares():
    assert float(ops.l2_loss(np.array([[3.0], [4.0]]))) == 12.5


def test_pooling_and_normalization_of_known_values():
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    assert ops.max_pool(image).numpy().ravel().tolist() == [5, 7, 13, 15]
    assert ops.average_pool(image).numpy().ravel().tolist() == [2.5, 4.5, 10.5, 12.5]
    channels = np.array([1.0, 2.0, 3.0]).reshape(1, 1, 1, 3)
    found = ops.local_response_normalization(channels, 1, 1.0, 1.0, 0.5).numpy().ravel()
    np.testing.assert_allclose(found, [1 / 6**0.5, 2 / 15**0.5, 3 / 14**0.5], rtol=1e-12)


def test_conv2d_is_a_correlation_with_tensorflows_padding():
    image = np.arange(9.0).reshape(1, 3, 3, 1)
    identity = np.zeros((2, 2, 1, 1))
    identity[0, 0] = 1.0
    # SAME for an even window pads after: the window's first tap sits on the pixel itself.
    assert ops.conv2d(image, identity).numpy().ravel().tolist() == list(range(9))
    valid = ops.conv2d(image, identity, np.array([10.0]), padding="VALID").numpy()
    assert valid.ravel().tolist() == [10, 11, 13, 14]


def test_a_chain_refuses_counts_that_do_not_add_up():
    from distopt.ops.kernels.pooling import MaxPool

    with pytest.raises(ValueError, match=r"counts \(1,\) must tell how 0 parameters go to 1 stages"):
        ops.chain(np.zeros((1, 2, 2, 1)), stages=(MaxPool(),), counts=(1,))


def test_a_gradient_goes_back_through_a_cast_in_the_inputs_dtype():
    x = Variable(np.array([1.0, 2.0]))
    with GradientTape() as tape:
        y = ops.cast(x, dtype=np.float32) * 3.0
    assert y.dtype == np.float32
    gradient = tape.gradient(y, x)
    assert (gradient.dtype, gradient.tolist()) == (np.float64, [3.0, 3.0])


def test_where_takes_from_either_side():
    condition = np.array([True, False, True])
    assert ops.where(condition, np.array([1.0, 2.0, 3.0]), -1.0).numpy().tolist() == [1, -1, 3]


def test_broadcast_to_repeats():
    found = ops.broadcast_to(np.array([[1.0], [2.0]]), shape=(2, 2, 3)).numpy()
    assert found.tolist() == [[[1, 1, 1], [2, 2, 2]]] * 2


def test_scatter_slice_puts_values_among_zeros():
    found = ops.scatter_slice(np.array([1.0, 2.0]), key=slice(0, None, 2), shape=(4,))
    assert found.numpy().tolist() == [1, 0, 2, 0]


def test_scatter_rows_adds_rows_that_repeat():
    found = ops.scatter_rows(np.array([[1.0], [2.0], [4.0]]), indices=np.array([2, 0, 2]), rows=3)
    assert found.numpy().tolist() == [[2], [0], [5]]
    with pytest.raises(ValueError, match="indices go from 0 to 3, but there are rows 0 to 2 only"):
        ops.scatter_rows(np.ones((2, 1)), indices=np.array([0, 3]), rows=3)


def test_methods_of_operands_are_numpys():
    x = Variable(np.arange(6.0).reshape(2, 3))
    assert x.T.numpy().tolist() == x.numpy().T.tolist()
    assert x.reshape(3, 2).shape == x.reshape((3, 2)).shape == x.reshape(-1, 2).shape == (3, 2)
    assert x.sum(axis=0, keepdims=True).numpy().tolist() == [[3, 5, 7]]
    assert float(x.sum()) == 15
    assert x.transpose((1, 0)).shape == (3, 2)
    assert x.astype(np.float32).dtype == np.float32
    assert np.asarray(x, np.float32).tolist() == x.numpy().tolist()
    assert x.reshape(6).size == x.reshape(np.int64(-1)).size == 6
