"""What `GradientTape.gradient` gives: tf_semantics' paragraph on the tape, a statement a test."""

from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape, Tensor, UnconnectedGradients
from distopt.variables import Variable


def test_classic_example_gives_13_and_5():
    x, y = Variable(5.0), Variable(3.0)
    with GradientTape() as tape:
        z = x**2 + x * y + 3
    assert [float(g) for g in tape.gradient(z, [x, y])] == [13.0, 5.0]


def test_stop_gradient_makes_a_constant():
    x = Variable(3.0)
    with GradientTape() as tape:
        y = x * ops.stop_gradient(x)
    assert float(tape.gradient(y, x)) == 3.0


def test_the_gradient_of_a_target_that_is_not_scalar_is_that_of_its_sum():
    x = Variable([1.0, 2.0, 3.0])
    with GradientTape() as tape:
        y = x * x * np.array([[1.0], [10.0]], "f4")
    assert tape.gradient(y, x).tolist() == [22.0, 44.0, 66.0]


def test_a_second_call_is_refused_unless_the_tape_is_persistent():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
    tape.gradient(y, x)
    with pytest.raises(
        RuntimeError, match="A non-persistent GradientTape can only be used to compute one set"
    ):
        tape.gradient(y, x)
    with pytest.raises(RuntimeError, match="persistent=True"):
        tape.gradients(y, [x])


def test_a_persistent_tape_can_be_asked_many_times():
    x = Variable(2.0)
    with GradientTape(persistent=True) as tape:
        y, z = x * x, x * 3.0
    assert [float(tape.gradient(t, x)) for t in (y, z, y)] == [4.0, 3.0, 4.0]


def test_gradient_can_be_called_inside_the_block_and_ends_a_tape_that_is_not_persistent():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
        gradient = tape.gradient(y, x)
        z = x * 3.0
    assert (type(gradient), float(gradient)) == (np.float32, 4.0)
    assert z.node is None


def test_a_persistent_tape_asked_inside_its_block_records_the_gradient():
    x = Variable(2.0)
    with GradientTape(persistent=True) as tape:
        y = x * x * x
        first = tape.gradient(y, x)
        with tape.stop_recording():
            plain = tape.gradient(y, x)
    assert isinstance(first, Tensor)
    assert not isinstance(plain, Tensor)
    assert float(first) == float(plain) == 12.0
    assert float(tape.gradient(first, x)) == 12.0


def test_a_trainable_variable_is_watched_a_constant_is_not():
    x, constant = Variable(2.0), Tensor(np.float32(3.0))
    with GradientTape() as tape:
        y = x * constant
    assert [g if g is None else float(g) for g in tape.gradient(y, [x, constant])] == [3.0, None]


def test_a_variable_of_integers_gets_none():
    counter, x = Variable(3), Variable(2.0)
    with GradientTape() as tape:
        tape.watch(counter)
        y = x * counter
    assert tape.gradient(y, counter) is None
    with GradientTape() as tape:
        y = x * counter
    assert float(tape.gradient(y, [counter, x])[1]) == 3.0


def test_a_target_of_integers_gives_none():
    x = Variable(2.0)
    with GradientTape(persistent=True) as tape:
        rounded = ops.cast(x, dtype=np.int32)
        back = ops.cast(rounded, dtype=np.float32) * 2.0
        both = [rounded, x * 3.0]
    assert tape.gradient(rounded, x) is None
    assert tape.gradient(back, x) is None
    assert float(tape.gradient(both, x)) == 3.0


def test_an_unconnected_source_gives_none():
    x, y = Variable([1.0, 2.0]), Variable([3.0])
    with GradientTape() as tape:
        z = ops.reduce_sum(x)
    assert tape.gradient(z, [x, y])[1] is None


@pytest.mark.parametrize("zero", ["zero", UnconnectedGradients.ZERO])
def test_an_unconnected_source_gives_zeros_where_they_are_asked_for(zero):
    x, y = Variable([1.0, 2.0]), Variable(np.ones((2, 1), "f8"))
    with GradientTape() as tape:
        z = ops.reduce_sum(x)
    gradient = tape.gradient(z, y, unconnected_gradients=zero)
    assert (gradient.tolist(), gradient.dtype) == ([[0.0], [0.0]], np.float64)


def test_an_unknown_word_for_unconnected_gradients_is_refused():
    x = Variable(1.0)
    with GradientTape() as tape:
        z = x * 2.0
    with pytest.raises(
        ValueError, match=r"Unknown value for unconnected_gradients: 'zeros'\. It must be 'none'"
    ):
        tape.gradient(z, x, unconnected_gradients="zeros")


def test_a_list_of_targets_is_summed():
    x = Variable(2.0)
    with GradientTape() as tape:
        y, z = x * x, x * 5.0
    assert float(tape.gradient([y, z], x)) == 9.0


def test_targets_may_be_nested():
    x = Variable(2.0)
    with GradientTape() as tape:
        target = {"a": [x * x, (x * 5.0,)], "b": x * 100.0}
    assert float(tape.gradient(target, x)) == 109.0


def test_output_gradients_weigh_the_targets():
    x = Variable(2.0)
    with GradientTape(persistent=True) as tape:
        y, z = x * x, x * 5.0
    assert float(tape.gradient([y, z], x, output_gradients=[10.0, None])) == 45.0
    assert float(tape.gradient({"y": y, "z": (z,)}, x, {"y": 10.0, "z": (2.0,)})) == 50.0


def test_output_gradients_of_a_vector_weigh_its_elements():
    x = Variable([1.0, 2.0])
    with GradientTape() as tape:
        y = x * x
    assert tape.gradient(y, x, output_gradients=np.array([1.0, 100.0])).tolist() == [2.0, 400.0]


def test_as_many_output_gradients_as_targets_are_expected():
    x = Variable(2.0)
    with GradientTape() as tape:
        y, z = x * x, x * 5.0
    with pytest.raises(
        ValueError, match="there are 2 targets, so as many output_gradients are expected, got 1"
    ):
        tape.gradient([y, z], x, output_gradients=[1.0])


def test_the_result_is_nested_like_the_sources():
    pair = namedtuple("pair", "left right")
    x, y = Variable(2.0), Variable(3.0)
    sources = {
        "dict": {"b": x, "a": y},
        "list": [x, [y, None]],
        "tuple": (y,),
        "named": pair(x, y),
        "ordered": OrderedDict(z=y, a=x),
        "default": defaultdict(list, k=x),
        "empty": [],
    }
    with GradientTape() as tape:
        z = x * y
    found = tape.gradient(z, sources)
    assert found == {
        "dict": {"b": 3.0, "a": 2.0},
        "list": [3.0, [2.0, None]],
        "tuple": (2.0,),
        "named": pair(3.0, 2.0),
        "ordered": OrderedDict(z=2.0, a=3.0),
        "default": {"k": 3.0},
        "empty": [],
    }
    assert [type(found[key]) for key in sources] == [type(value) for value in sources.values()]
    assert type(found["named"]) is pair


def test_one_source_gives_its_gradient_itself():
    x = Variable(2.0)
    with GradientTape(persistent=True) as tape:
        y = x * x
    assert float(tape.gradient(y, x)) == 4.0
    assert [float(g) for g in tape.gradient(y, [x, x])] == [4.0, 4.0]


def test_the_gradient_of_a_source_by_itself_is_one():
    x = Variable([2.0, 3.0])
    with GradientTape() as tape:
        assert tape.gradient(x, x).tolist() == [1.0, 1.0]


def test_a_plain_array_as_target_is_a_constant():
    x = Variable(2.0)
    with GradientTape() as tape:
        tape.watch(x)
    assert tape.gradient(np.ones(3), x) is None


def test_none_as_target_is_refused():
    x, y = Variable(2.0), Variable(1.0)
    with GradientTape() as outer:
        with GradientTape() as inner:
            z = x * x
        nothing = inner.gradient(z, y)
    with pytest.raises(TypeError, match="a target is None, perhaps an unconnected gradient"):
        outer.gradient(nothing, x)


def test_a_plain_array_as_source_is_refused():
    x = Variable(2.0)
    with GradientTape() as tape:
        z = x * x
    with pytest.raises(TypeError, match="by Variables and Tensors, got ndarray; wrap an array in Tensor"):
        tape.gradient(z, np.ones(3))


def test_an_exception_in_the_block_closes_the_tape():
    x = Variable(2.0)
    tape = GradientTape()
    with pytest.raises(KeyError), tape:
        raise KeyError("user's")
    assert (x * x).node is None
