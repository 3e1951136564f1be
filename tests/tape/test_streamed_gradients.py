"""`GradientTape.gradients`: one gradient after the other, as they become final."""

import numpy as np

from distopt import ops
from distopt.tape import GradientTape, Tensor
from distopt.variables import Arena, Variable


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


def test_unconnected_variables_come_last_with_none():
    x, y = Variable(3.0), Variable(2.0)
    with GradientTape() as tape:
        z = x * 2.0
    assert [(g if g is None else float(g), v) for g, v in tape.gradients(z, [y, x])] == [(2.0, x), (None, y)]


def test_streamed_gradients_are_arrays_under_an_outer_tape_too():
    x = Variable([1.0, 2.0], name="x")
    Arena([x])
    with GradientTape(), GradientTape() as inner:
        y = ops.reduce_sum(x * x)
        ((gradient, _),) = inner.gradients(y, [x])
    assert gradient is x.gradient
    assert gradient.tolist() == [2.0, 4.0]
