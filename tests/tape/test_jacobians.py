"""Jacobians against closed forms."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape, Tensor
from distopt.variables import Variable

_X = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_jacobian_of_a_matrix_product():
    x, w = Variable(_X), Variable(np.arange(6.0).reshape(3, 2))
    with GradientTape() as tape:
        y = x @ w
    found = tape.jacobian(y, {"x": x, "w": [w, None]})
    # dy[i, k] / dx[m, j] = w[j, k] where i = m; dy[i, k] / dw[j, l] = x[i, j] where k = l.
    np.testing.assert_array_equal(found["x"], np.einsum("im,jk->ikmj", np.eye(2), w.numpy()))
    np.testing.assert_array_equal(found["w"][0], np.einsum("ij,kl->ikjl", _X, np.eye(2)))
    assert found["w"][1] is None


def test_jacobian_by_the_rows_of_a_table():
    table = Variable(np.array([1.0, 2.0, 3.0]))
    with GradientTape() as tape:
        y = ops.square(ops.gather(table, indices=np.array([2, 0])))
    assert tape.jacobian(y, table).tolist() == [[0.0, 0.0, 6.0], [2.0, 0.0, 0.0]]


def test_jacobian_of_a_scalar_is_its_gradient():
    x = Variable(_X)
    with GradientTape() as tape:
        y = ops.reduce_sum(x * x)
    np.testing.assert_array_equal(tape.jacobian(y, x), 2 * _X)


def test_rows_that_nothing_flows_into_are_zeros():
    x = Variable(np.array([1.0, 2.0]))
    with GradientTape() as tape:
        y = ops.concat(x[:1] * 3.0, np.array([5.0]), axis=0)
    assert tape.jacobian(y, x).tolist() == [[3.0, 0.0], [0.0, 0.0]]


def test_jacobian_of_no_elements():
    x = Variable(np.array([1.0, 2.0]))
    with GradientTape() as tape:
        y = x[:0]
    assert tape.jacobian(y, x).shape == (0, 2)


def test_an_unconnected_source_of_a_jacobian():
    x, other = Variable(_X), Variable(np.ones(4, "f4"))
    with GradientTape(persistent=True) as tape:
        y = x * x
    assert tape.jacobian(y, other) is None
    found = tape.jacobian(y, [other], unconnected_gradients="zero")[0]
    assert (found.shape, found.dtype, found.any()) == ((2, 3, 4), np.float32, False)
    batch = tape.batch_jacobian(y, Variable(np.ones((2, 5))), unconnected_gradients="zero")
    assert (batch.shape, batch.any()) == ((2, 3, 5), False)
    assert tape.batch_jacobian(y, Variable(np.ones((2, 5)))) is None


def test_hessian_by_jacobian_of_a_recorded_gradient():
    x = Variable(np.array([1.0, 2.0]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x[0] * x[0] * x[1] + x[1] * x[1] * x[1]
        gradient = inner.gradient(y, x)
    assert gradient.numpy().tolist() == [4.0, 13.0]
    assert outer.jacobian(gradient, x).tolist() == [[4.0, 2.0], [2.0, 12.0]]


def test_a_jacobian_under_an_outer_tape_can_be_differentiated():
    x = Variable(np.array([1.0, 2.0]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x * x * x
        jacobian = inner.jacobian(y, x)
    assert isinstance(jacobian, Tensor)
    assert jacobian.numpy().tolist() == [[3.0, 0.0], [0.0, 12.0]]
    assert outer.gradient(jacobian, x).tolist() == [6.0, 12.0]


def test_batch_jacobian_has_one_block_for_each_example():
    x = Variable(_X)
    w = np.arange(6.0).reshape(3, 2)
    with GradientTape() as tape:
        y = (x * x) @ w
    # dy[i, k] / dx[i, j] = 2 x[i, j] w[j, k]
    np.testing.assert_array_equal(tape.batch_jacobian(y, x), np.einsum("ij,jk->ikj", 2 * _X, w))


def test_batch_jacobian_is_the_diagonal_of_the_jacobian():
    x = Variable(np.random.default_rng(3).standard_normal((3, 2, 2)))
    with GradientTape(persistent=True) as tape:
        y = ops.tanh(ops.reshape(x, shape=(3, 4)) @ np.arange(12.0).reshape(4, 3))
    blocks, whole = tape.batch_jacobian(y, x), tape.jacobian(y, x)
    assert blocks.shape == (3, 3, 2, 2)
    np.testing.assert_allclose(blocks, np.stack([whole[i, :, i] for i in range(3)]), rtol=1e-12, atol=1e-15)


def test_a_batch_jacobian_under_an_outer_tape_can_be_differentiated():
    x = Variable(_X)
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x * x * x
        blocks = inner.batch_jacobian(y, x)
    assert blocks.shape == (2, 3, 3)
    np.testing.assert_array_equal(outer.gradient(blocks, x), 6 * _X)


def test_first_axes_that_differ_are_refused():
    x = Variable(_X)
    with GradientTape() as tape:
        y = ops.transpose(x)
    message = r"Need first dimension of target shape \(\(3, 2\)\) and source shape \(\(2, 3\)\) to match"
    with pytest.raises(ValueError, match=message):
        tape.batch_jacobian(y, x)


def test_a_target_without_a_floating_dtype_has_no_jacobian():
    x = Variable(_X)
    with GradientTape() as tape:
        y = ops.cast(x, dtype=np.int32)
    with pytest.raises(TypeError, match="must be a Tensor of a floating dtype, got int32"):
        tape.jacobian(y, x)
    with pytest.raises(TypeError, match="must be a Tensor of a floating dtype, got ndarray"):
        GradientTape().jacobian(_X, x)


@pytest.mark.parametrize("second", ["jacobian", "batch_jacobian"])
def test_a_tape_that_is_not_persistent_gives_one_jacobian(second):
    x = Variable(_X)
    with GradientTape() as tape:
        y = x * x
    tape.jacobian(y, x)
    with pytest.raises(RuntimeError, match=r"one set of gradients \(or jacobians\)"):
        getattr(tape, second)(y, x)


def test_the_arguments_of_ported_code_change_nothing():
    x = Variable(_X)
    with GradientTape(persistent=True) as tape:
        y = x * x
    found = tape.jacobian(y, x, parallel_iterations=2, experimental_use_pfor=False)
    np.testing.assert_array_equal(found, tape.jacobian(y, x))
    batch = tape.batch_jacobian(y, x, parallel_iterations=2, experimental_use_pfor=False)
    np.testing.assert_array_equal(batch, tape.batch_jacobian(y, x))
