"""The function `gradients`: tf_semantics' paragraph on tf.gradients, a statement a test."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import AggregationMethod, GradientTape, Tensor, UnconnectedGradients, gradients
from distopt.variables import Variable


def test_gradients_function_stops_at_constants():
    # tf.gradients' documented example: y = a + b with b = 2a.
    a = Variable(0.0)
    with GradientTape():
        b = a * 2.0
        y = a + b
    assert [float(g) for g in gradients(y, [a, b], stop_gradients=[a, b])] == [1.0, 1.0]
    assert [float(g) for g in gradients(y, [a, b])] == [3.0, 1.0]


@pytest.fixture
def recorded():
    """Give x = 2, y = x**2, z = 5 x."""
    x = Variable(2.0)
    with GradientTape():
        yield x, x * x, x * 5.0


def _floats(found):
    return [g if g is None else float(g) for g in found]


def test_a_single_x_gives_a_list_of_one(recorded):
    x, y, _ = recorded
    assert _floats(gradients(y, x)) == [4.0]


def test_the_ys_are_summed(recorded):
    x, y, z = recorded
    assert _floats(gradients([y, z], [x])) == [9.0]


def test_grad_ys_weigh_the_ys(recorded):
    x, y, z = recorded
    assert _floats(gradients([y, z], [x], [10.0, 100.0])) == [540.0]
    assert _floats(gradients(y, x, 3.0)) == [12.0]


def test_none_among_grad_ys_means_ones(recorded):
    x, y, z = recorded
    assert _floats(gradients([y, z], [x], [None, 100.0])) == [504.0]


def test_another_number_of_grad_ys_than_ys_is_refused(recorded):
    x, y, z = recorded
    with pytest.raises(ValueError, match=r"Length mismatch\. Passed 1 grad_ys for 2 ys"):
        gradients([y, z], [x], [1.0])


def test_an_unconnected_x_gives_none(recorded):
    x, y, _ = recorded
    assert _floats(gradients(y, [x, Variable(1.0)])) == [4.0, None]


@pytest.mark.parametrize("zero", [UnconnectedGradients.ZERO, "zero"])
def test_an_unconnected_x_gives_zeros_where_they_are_asked_for(recorded, zero):
    _, y, _ = recorded
    (found,) = gradients(y, [Variable([1.0, 2.0])], unconnected_gradients=zero)
    assert found.tolist() == [0.0, 0.0]


def test_an_unknown_word_for_unconnected_gradients_is_refused_here_too(recorded):
    x, y, _ = recorded
    with pytest.raises(ValueError, match="Unknown value for unconnected_gradients: 'ones'"):
        gradients(y, x, unconnected_gradients="ones")


def test_an_x_of_integers_gives_none():
    x, counter = Variable(2.0), Variable(3)
    with GradientTape():
        y = x * counter
    assert _floats(gradients(y, [x, counter])) == [3.0, None]


def test_a_y_of_integers_gives_none():
    x = Variable(2.0)
    with GradientTape():
        y = ops.cast(x * 3.0, dtype=np.int64)
    assert gradients(y, [x]) == [None]
    assert gradients(np.int64(3), [x]) == [None]


def test_no_ys_give_none_for_every_x(recorded):
    x, _, _ = recorded
    assert gradients([], [x, x]) == [None, None]


def test_the_gradient_of_a_y_that_is_not_scalar_is_that_of_its_sum():
    x = Variable([1.0, 2.0])
    with GradientTape():
        y = x * x
    assert gradients(y, x)[0].tolist() == [2.0, 4.0]


def test_partial_derivatives_by_stop_gradients():
    # The reference: y = a + b, b = 2a; xs = stop = [a, b] gives [1, 1], without stopping [3, 1].
    a = Variable(0.5)
    with GradientTape():
        b = a * 2.0
        y = a + b
        assert _floats(gradients(y, [a, b], stop_gradients=[a, b])) == [1.0, 1.0]
        assert _floats(gradients(y, [a, b], stop_gradients=b)) == [1.0, 1.0]
        assert _floats(gradients(y, [a, b])) == [3.0, 1.0]


def test_a_stopped_target_has_a_gradient_by_itself_alone():
    # tf.gradients([y], [x, y], stop_gradients=[y]) in TensorFlow 2.15.1: [None, 1.0].
    x = Variable(2.0)
    with GradientTape():
        y = x * x
        z = y * 3.0
    by_x, by_y = gradients([y], [x, y], stop_gradients=[y])
    assert (by_x, float(by_y)) == (None, 1.0)
    assert gradients([y, z], [x], stop_gradients=[y]) == [None]


def test_the_record_can_be_asked_again_after_the_block():
    x = Variable(3.0)
    with GradientTape() as tape:
        y = x * x
    assert _floats(gradients(y, x) + gradients(y, x)) == [6.0, 6.0]
    assert float(tape.gradient(y, x)) == 6.0


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("method", [None, AggregationMethod.DEFAULT, 1, 2])
def test_gates_aggregation_names_and_places_change_no_value(recorded, gate, method):
    x, y, z = recorded
    found = gradients(
        y + z,
        x,
        name="gradients",
        colocate_gradients_with_ops=True,
        gate_gradients=gate,
        aggregation_method=method,
    )
    assert _floats(found) == [9.0]


def test_an_unknown_aggregation_method_is_refused_where_only_one_path_exists(recorded):
    x, _, z = recorded
    with pytest.raises(ValueError, match="Invalid aggregation_method specified: 3"):
        gradients(z, x, aggregation_method=3)


def test_an_x_that_is_an_array_is_refused(recorded):
    with pytest.raises(TypeError, match="xs must be Variables or Tensors, got ndarray"):
        gradients(recorded[1], np.ones(3))


def test_an_intermediate_tensor_can_be_an_x(recorded):
    _, y, z = recorded
    total = y * z
    assert _floats(gradients(total, [y, z])) == [10.0, 4.0]


def test_inside_the_block_gradients_are_tensors_outside_arrays():
    x = Variable(3.0)
    with GradientTape():
        y = x * x
        (inside,) = gradients(y, x)
    (outside,) = gradients(y, x)
    assert isinstance(inside, Tensor)
    assert not isinstance(outside, Tensor)
    assert float(inside) == float(outside) == 6.0
