"""Gradients of gradients. That every primitive has them is tested in ops/test_second_derivatives.py."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape, Tensor, gradients
from distopt.variables import IndexedSlices, Variable, value_of


def test_second_derivative_of_a_cube():
    x = Variable(3.0)
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x * x * x
        dy = inner.gradient(y, x)
    assert isinstance(dy, Tensor)
    assert float(dy) == 27.0
    assert float(outer.gradient(dy, x)) == 18.0


def test_a_gradient_penalty_reaches_all_parameters():
    # loss = (d/dx sum(x @ w))**2 summed = |w|^2 per row of x: a dense layer, differentiated by its input.
    w, b = Variable(np.array([[1.0], [2.0]])), Variable(np.zeros(1))
    x = Tensor(np.ones((3, 2)))
    with GradientTape() as outer:
        with GradientTape() as inner:
            inner.watch(x)
            y = ops.dense(x, w, b)
        by_x = inner.gradient(y, x)
        penalty = ops.reduce_sum(by_x * by_x)
    assert float(penalty) == 3 * 5.0
    by_w, by_b = outer.gradient(penalty, [w, b])
    assert by_w.tolist() == [[6.0], [12.0]]
    assert by_b is None


def test_a_gradient_that_does_not_depend_on_what_is_watched_is_an_array():
    x = Variable(3.0)
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = x * 2.0
        dy = inner.gradient(y, x)
    assert not isinstance(dy, Tensor)
    assert outer.gradient(dy, x) is None
    assert float(dy) == 2.0


def test_an_outer_tape_that_watches_something_else_leaves_arrays():
    x, other = Variable(3.0), Variable(1.0)
    with GradientTape(watch_accessed_variables=False) as outer:
        outer.watch(other)
        with GradientTape() as inner:
            y = x * x
        dy = inner.gradient(y, x)
    assert not isinstance(dy, Tensor)


def test_a_mixed_second_derivative():
    x, y = Variable(3.0), Variable(2.0)
    with GradientTape() as outer:
        with GradientTape() as inner:
            z = x * x * y * y * y
        by_x, by_y = inner.gradient(z, [x, y])
    # Of x**2 y**3: twice by x is 2 y**3, by x and y 6 x y**2, twice by y 6 x**2 y.
    found = outer.gradient([by_x, by_y], [x, y], output_gradients=[1.0, 100.0])
    assert [float(g) for g in found] == [16.0 + 100 * 72.0, 72.0 + 100 * 108.0]


def test_an_inner_tape_may_be_asked_after_the_outer_block_began_only():
    # What was computed before the outer tape opened is a constant to it, the variable is not.
    x = Variable(3.0)
    with GradientTape() as inner:
        y = x * x
    with GradientTape() as outer:
        dy = inner.gradient(y, x)
    assert float(outer.gradient(dy, x)) == 2.0


def test_unconnected_gradients_of_second_order():
    x, y = Variable(3.0), Variable([1.0, 2.0])
    with GradientTape() as outer:
        with GradientTape() as inner:
            z = x * x
        dz = inner.gradient(z, [x, y], unconnected_gradients="zero")
    assert [np.shape(g) for g in dz] == [(), (2,)]
    found = outer.gradient(dz, [x, y], unconnected_gradients="zero")
    assert (float(found[0]), found[1].tolist()) == (2.0, [0.0, 0.0])


def test_a_recorded_gradient_keeps_the_dtype():
    x = Variable(np.array([1.0, 2.0], "f4"))
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = ops.sigmoid(ops.sqrt(x) * 2.0) ** 2 / x
        dy = inner.gradient(y, x)
    assert dy.dtype == np.float32
    assert outer.gradient(dy, x).dtype == np.float32


def test_a_recorded_gradient_can_be_assigned_and_applied():
    x = Variable([1.0, 2.0])
    with GradientTape():
        with GradientTape() as inner:
            y = x * x
        dy = inner.gradient(y, x)
        x.assign_sub(dy * 0.25)
    assert x.numpy().tolist() == [0.5, 1.0]


def test_third_derivative_through_three_tapes():
    x = Variable(np.array(0.7))
    with GradientTape() as third:
        with GradientTape() as second:
            with GradientTape() as first:
                y = ops.tanh(x)
            dy = first.gradient(y, x)
        d2y = second.gradient(dy, x)
    t = np.tanh(0.7)
    assert float(d2y) == pytest.approx(-2 * t * (1 - t**2), rel=1e-12)
    expected = (1 - t**2) * (6 * t**2 - 2)
    assert float(third.gradient(d2y, x)) == pytest.approx(expected, rel=1e-12)


def test_gradient_of_a_gradient_with_the_function():
    x, y = Variable(3.0), Variable(2.0)
    with GradientTape():
        z = x * x * y
        by_x, by_y = gradients(z, [x, y])
        assert [float(g) for g in gradients(by_x, [x, y])] == [4.0, 6.0]
        assert [g if g is None else float(g) for g in gradients(by_y, [x, y])] == [6.0, None]
        assert float(gradients(gradients(gradients(z, x), x), y)[0]) == 2.0


def test_upstream_gradients_can_be_differentiated_by():
    # Forward mode by two backward passes: d/du of (u times the gradient) is the directional derivative.
    x = Variable(np.array([1.0, 2.0]))
    u = Tensor(np.zeros(2))
    with GradientTape() as outer:
        outer.watch(u)
        with GradientTape() as inner:
            y = x * x * x
        pulled = inner.gradient(y, x, output_gradients=u)
    assert outer.gradient(pulled, u, output_gradients=np.array([1.0, 10.0])).tolist() == [3.0, 120.0]


def test_second_derivative_of_gathered_rows_is_sparse():
    table = Variable(np.array([[1.0], [2.0], [3.0]]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            rows = ops.gather(table, indices=np.array([2, 0, 2]))
            loss = ops.reduce_sum(rows * rows * rows)
        first = inner.gradient(loss, table)
        penalty = ops.reduce_sum(first.values * first.values)
    assert isinstance(first, IndexedSlices)
    assert isinstance(first.values, Tensor)
    assert first.to_dense().numpy().tolist() == [[3.0], [0.0], [54.0]]
    # Each row's first derivative is 3 t**2; the penalty 9 t**4 has the derivative 36 t**3.
    second = outer.gradient(penalty, table)
    assert isinstance(second, IndexedSlices)
    assert second.to_dense().tolist() == [[36.0], [0.0], [2 * 36 * 27.0]]


def test_summed_rows_of_a_recorded_gradient_stay_differentiable():
    table = Variable(np.array([[1.0], [2.0]]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            loss = ops.reduce_sum(ops.square(ops.gather(table, indices=np.array([1, 1]))))
        once = inner.gradient(loss, table).deduplicated()
        total = ops.reduce_sum(once.values * once.values)
    assert once.indices.tolist() == [1]
    # The row's gradient is 4 t, its square 16 t**2, and the derivative of that 32 t.
    assert outer.gradient(total, table).to_dense().tolist() == [[0.0], [64.0]]


def test_a_dense_and_a_sparse_use_have_a_second_derivative():
    table = Variable(np.array([[1.0], [2.0]]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            loss = ops.reduce_sum(table**3) + ops.reduce_sum(ops.gather(table, indices=np.array([1, 1])) ** 2)
        first = inner.gradient(loss, table)
    assert value_of(first).tolist() == [[3.0], [12.0 + 8.0]]
    second = outer.gradient(first, table)
    dense = second.to_dense() if isinstance(second, IndexedSlices) else second
    assert dense.tolist() == [[6.0], [12.0 + 4.0]]
