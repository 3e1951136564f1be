"""Primitives are called as TensorFlow's functions are: lists, options by position, questions to values."""

import inspect

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape
from distopt.variables import Variable


def test_concat_takes_a_list_and_an_axis_as_in_tensorflow():
    a, b = Variable(np.ones((1, 2))), Variable(np.full((1, 2), 3.0))
    with GradientTape() as tape:
        joined = ops.concat([a, b], 1)
        loss = ops.reduce_sum(joined * np.array([1.0, 2.0, 3.0, 4.0]))
    assert joined.numpy().tolist() == [[1, 1, 3, 3]]
    assert [g.tolist() for g in tape.gradient(loss, [a, b])] == [[[1, 2]], [[3, 4]]]


def test_gradients_flow_into_lists_of_tensors():
    a, b = Variable([5.0, 0.5]), Variable(2.0)
    with GradientTape() as tape:
        loss = ops.reduce_sum(ops.maximum(a, [b, 1.0]) + a * [b, 3.0])
    by_a, by_b = tape.gradient(loss, [a, b])
    assert (by_a.tolist(), float(by_b)) == ([3.0, 3.0], 5.0)


def test_lists_of_numbers_are_arrays():
    assert ops.add([1.0], [2.0]).numpy().tolist() == [3.0]
    assert ops.multiply([1.0, 2.0], 3).numpy().tolist() == [3.0, 6.0]
    assert (Variable([1.0, 2.0]) * [1.0, 2.0]).dtype == np.float32
    assert ops.reduce_sum([1.0, 2.0]).numpy() == 3.0
    assert ops.matmul([[1.0, 2.0]], [[3.0], [4.0]]).numpy().tolist() == [[11.0]]


def test_options_may_come_by_position():
    x = Variable(np.arange(6.0).reshape(2, 3))
    assert ops.reduce_sum(x, 0).numpy().tolist() == [3, 5, 7]
    assert ops.reduce_mean(x, [1], True).shape == (2, 1)
    assert ops.reshape(x, [-1, 2]).shape == (3, 2)
    assert ops.transpose(x, [1, 0]).shape == (3, 2)
    assert ops.cast(x, np.float32).dtype == np.float32
    assert ops.gather(x, [1]).numpy().tolist() == [[3, 4, 5]]
    assert ops.where([True, False, True], x[0], 7.0).numpy().tolist() == [0, 7, 2]
    with pytest.raises(TypeError, match=r"cast takes the operands x and the options dtype; got 3 arguments"):
        ops.cast(x, np.float32, 5)


def test_stack_expand_and_squeeze():
    a, b = Variable([1.0, 2.0]), Variable([3.0, 4.0])
    with GradientTape() as tape:
        loss = ops.reduce_sum(ops.stack([a, b], 1) * np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert [g.tolist() for g in tape.gradient(loss, [a, b])] == [[1, 3], [2, 4]]
    assert ops.expand_dims(a, -1).shape == (2, 1)
    assert ops.squeeze(np.ones((1, 2, 1))).shape == (2,)
    assert ops.squeeze(np.ones((1, 2, 1)), -1).shape == (1, 2)
    with pytest.raises(ValueError, match=r"axes of length 1, got axis 1 of shape \(1, 2, 1\)"):
        ops.squeeze(np.ones((1, 2, 1)), 1)
    with pytest.raises(ValueError, match="values of one shape"):
        ops.stack([a, 1.0])


def test_a_primitive_shows_its_arguments():
    assert str(inspect.signature(ops.reduce_sum)).startswith("(x")
    assert list(inspect.signature(ops.gather).parameters) == ["table", "indices", "name"]
    assert "of the tape" not in ops.gather.__doc__


def test_values_answer_questions_as_arrays_do():
    step, loss = Variable(np.int64(200)), ops.reduce_mean(Variable([1.0, 2.25]))
    assert step % 100 == 0
    assert step // 100 == 2
    assert [10, 20, 30][Variable(np.int64(1))] == 20
    assert f"{loss:.2f} after {int(step)}" == "1.62 after 200"
    assert round(loss, 1) == 1.6
    assert (loss < 2, loss >= 2, step > 100, step <= 100) == (True, False, True, False)
    assert not Variable(0.0)
    assert ops.reduce_sum(Variable([1.0]))
    with pytest.raises(ValueError, match="truth value"):
        bool(Variable([1.0, 2.0]))
    with pytest.raises(TypeError):
        [0, 1][Variable(1.0)]


def test_numbers_in_lists_take_the_dtype_of_what_stands_beside_them():
    assert (Variable(np.array([1, 2], np.int64)) * [2**33, 1]).numpy().tolist() == [2**33, 2]
    assert (Variable(np.array([0.1])) - [0.1]).numpy().tolist() == [0.0]
    assert (Variable([0.5]) * [3]).dtype == np.float32
    assert ops.add([2**40], 1).numpy().tolist() == [2**40 + 1]


def test_gradients_flow_into_nested_lists():
    a, b = Variable(1.0), Variable(2.0)
    with GradientTape(persistent=True) as tape:
        first = ops.reduce_sum(ops.stack([[a, b], [b, a]]) * np.array([[1.0, 2.0], [3.0, 4.0]]))
        second = ops.reduce_sum(ops.expand_dims([a, b], 0) * np.array([[5.0, 6.0]]))
    assert [float(g) for g in tape.gradient(first, [a, b])] == [5.0, 5.0]
    assert [float(g) for g in tape.gradient(second, [a, b])] == [5.0, 6.0]
    assert ops.stack([[1, 2], [3, 4]]).dtype == np.int32


def test_remainders_of_floating_point_values_are_refused():
    with pytest.raises(TypeError, match="% is for integers, here float32: its gradient would be lost"):
        Variable(2.0) % 3
    with pytest.raises(TypeError, match="// is for integers"):
        Variable(2.0) // 3


@pytest.mark.parametrize("axis", [3, -4])
def test_axes_that_are_not_there_are_refused(axis):
    with pytest.raises(ValueError, match=f"can't put axis {axis} into shape"):
        ops.expand_dims(np.ones((2, 3)), axis)
    with pytest.raises(ValueError, match=f"can't take axis {axis} from shape"):
        ops.squeeze(np.ones((1, 2, 1)), axis)
