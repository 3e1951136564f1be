import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape, Tensor, gradients
from distopt.variables import Arena, IndexedSlices, Variable


def test_classic_example_gives_13_and_5():
    x, y = Variable(5.0), Variable(3.0)
    with GradientTape() as tape:
        z = x**2 + x * y + 3
    assert [float(g) for g in tape.gradient(z, [x, y])] == [13.0, 5.0]


def test_gradients_come_when_they_are_final_last_layer_first():
    first, second, third = (Variable(np.ones((2, 2)), name=n) for n in "abc")
    order = []
    with GradientTape() as tape:
        loss = ops.reduce_sum((first @ second) @ third)
    for _, variable in tape.gradients(loss, [first, second, third]):
        order.append(variable.name)
    assert order[0] == "c"
    assert sorted(order) == ["a", "b", "c"]


def test_backward_runs_only_as_far_as_the_generator_is_consumed():
    calls = []
    weights = [Variable(1.0, name=str(i)) for i in range(3)]
    original = ops.multiply.backward

    def counting(context, upstream):
        calls.append(1)
        return original(context, upstream)

    ops.multiply.backward = counting
    try:
        with GradientTape() as tape:
            value = Tensor(np.float32(2.0))
            for weight in weights:
                value = value * weight
        stream = tape.gradients(value, weights)
        gradient, variable = next(stream)
        assert (float(gradient), variable.name, len(calls)) == (2.0, "2", 1)
        assert len(list(stream)) == 2
        assert len(calls) == 3
    finally:
        ops.multiply.backward = original


def test_a_variable_used_twice_is_final_after_its_last_use():
    x = Variable(3.0)
    with GradientTape() as tape:
        y = x * x + x
    assert [float(g) for g, _ in tape.gradients(y, [x])] == [7.0]


def test_gradients_of_arena_variables_are_the_arena_views():
    a, b = Variable([1.0, 2.0], name="a"), Variable([3.0, 4.0], name="b")
    arena = Arena([a, b])
    with GradientTape() as tape:
        loss = ops.reduce_sum(a * b) + ops.l2_loss(a)
    found = {v.name: g for g, v in tape.gradients(loss, [a, b])}
    assert found["a"] is a.gradient
    assert a.gradient.tolist() == [4.0, 6.0]
    assert b.gradient.tolist() == [1.0, 2.0]
    assert arena.slabs[0].gradients.sum() == 13.0


def test_an_unconnected_source_gives_none_or_zeros():
    x, y = Variable([1.0, 2.0]), Variable([3.0])
    with GradientTape(persistent=True) as tape:
        z = ops.reduce_sum(x)
    assert tape.gradient(z, [x, y])[1] is None
    assert tape.gradient(z, y, unconnected_gradients="zero").tolist() == [0.0]
    with pytest.raises(ValueError, match="'none' or 'zero'"):
        tape.gradient(z, y, unconnected_gradients="zeros")


def test_a_tape_gives_gradients_once_unless_persistent():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
    tape.gradient(y, x)
    with pytest.raises(RuntimeError, match="persistent=True"):
        tape.gradient(y, x)


def test_only_watched_things_are_recorded():
    fixed = Variable(2.0, trainable=False)
    counter = Variable(3)
    with GradientTape() as tape:
        y = fixed * 3.0
    assert tape.gradient(y, fixed) is None
    with GradientTape() as tape:
        tape.watch(fixed)
        y = fixed * 3.0
    assert float(tape.gradient(y, fixed)) == 3.0
    with GradientTape() as tape:
        tape.watch(counter)
        y = counter * 2
    assert tape.gradient(y, counter) is None
    with pytest.raises(TypeError, match="Tensors and Variables, got ndarray"):
        tape.watch(np.zeros(3))


def test_a_watched_tensor_in_the_middle_gets_its_gradient_and_passes_it_on():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
        tape.watch(y)
        z = y * 3.0
    by_x, by_y = tape.gradient(z, [x, y])
    assert (float(by_x), float(by_y)) == (12.0, 3.0)


def test_stop_recording_leaves_out_what_is_computed_meanwhile():
    x = Variable(2.0)
    with GradientTape() as tape:
        y = x * x
        with tape.stop_recording():
            factor = x * 10.0
        z = y * factor
    assert float(tape.gradient(z, x)) == pytest.approx(20.0 * 4.0)


def test_sources_keep_their_nesting():
    x, y = Variable(2.0), Variable(3.0)
    with GradientTape() as tape:
        z = x * y
    found = tape.gradient(z, {"first": [x], "second": (y,)})
    assert float(found["first"][0]) == 3.0
    assert float(found["second"][0]) == 2.0


def test_several_targets_are_summed_and_weighted():
    x = Variable(2.0)
    with GradientTape(persistent=True) as tape:
        y, z = x * x, x * 5.0
    assert float(tape.gradient([y, z], x)) == 9.0
    assert float(tape.gradient([y, z], x, output_gradients=[10.0, None])) == 45.0
    with pytest.raises(ValueError, match="2 targets"):
        tape.gradient([y, z], x, output_gradients=[1.0])


def test_gradients_function_stops_at_constants():
    # tf.gradients' documented example: y = a + b with b = 2a.
    a = Variable(0.0)
    with GradientTape():
        b = a * 2.0
        y = a + b
    assert [float(g) for g in gradients(y, [a, b], stop_gradients=[a, b])] == [1.0, 1.0]
    assert [float(g) for g in gradients(y, [a, b])] == [3.0, 1.0]


def test_gathers_of_one_table_concatenate_and_a_dense_use_makes_it_dense():
    table = Variable(np.arange(6.0).reshape(3, 2))
    with GradientTape(persistent=True) as tape:
        rows = ops.reduce_sum(ops.gather(table, indices=np.array([0, 0]))) + ops.reduce_sum(
            ops.gather(table, indices=np.array([2]))
        )
        mixed = rows + ops.reduce_sum(table)
    sparse = tape.gradient(rows, table)
    assert isinstance(sparse, IndexedSlices)
    assert sorted(sparse.indices.tolist()) == [0, 0, 2]
    assert tape.gradient(mixed, table).tolist() == [[3, 3], [1, 1], [2, 2]]


def test_a_gather_out_of_range_is_refused():
    table = Variable(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="from -1 to 1"):
        ops.gather(table, indices=np.array([1, -1]))


def test_an_index_with_arrays_is_refused():
    x = Variable([1.0, 2.0, 3.0])
    assert x[np.int64(1)].numpy() == 2.0
    for key in (np.array([0, 0]), [0, 0], (slice(None), np.array([1]))):
        with pytest.raises(TypeError, match=r"use ops\.gather"):
            x[key]


def test_stop_gradient_makes_a_constant():
    x = Variable(3.0)
    with GradientTape() as tape:
        y = x * ops.stop_gradient(x)
    assert float(tape.gradient(y, x)) == 3.0
