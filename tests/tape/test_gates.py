"""Gates: when the finished gradients of `GradientTape.gradients` are handed out, as an order of events."""

import numpy as np
import pytest

from distopt import ops
from distopt.communicators.local import LocalCommunicator
from distopt.tape import GATE_GRAPH, GATE_NONE, GATE_OP, GradientTape
from distopt.variables import Arena, Variable

_GATES = [GATE_NONE, GATE_OP, GATE_GRAPH]


@pytest.fixture
def network(monkeypatch):
    """Give two dense layers of variables in an arena, and the list of events that backward leaves.

    Every variable is used a second time, later, so that its gradient is a sum which is written into the
    arena only when it is complete.
    """
    layers = [
        [Variable(np.full(shape, 0.5), name=f"{kind}{layer}") for kind, shape in (("w", (2, 2)), ("b", (2,)))]
        for layer in (1, 2)
    ]
    x = Variable(np.ones((3, 2)), name="x")
    variables = [x, *layers[0], *layers[1]]
    arena = Arena(variables)
    events = []
    original = ops.dense.backward

    def observed(context, upstream):
        events.append("backward")
        return original(context, upstream)

    monkeypatch.setattr(ops.dense, "backward", observed)
    return variables, arena, events


def _stream(variables, gate):
    x, w1, b1, w2, b2 = variables
    with GradientTape() as tape:
        hidden = ops.dense(x, w1, b1)
        loss = ops.reduce_sum(ops.dense(hidden, w2, b2))
        for variable in variables:
            loss = loss + ops.reduce_sum(variable * variable)
    return tape.gradients(loss, variables, gate_gradients=gate)


def _expected():
    # Hidden rows are 1.5 (w1, b1 are 0.5), so with ones from above: w2 gets 3 * 1.5, b2 gets 3, hidden
    # gets 1, and from there w1 gets 3, b1 gets 3, x gets 1. The squares add twice the values.
    return {
        "x": np.full((3, 2), 1.0 + 2.0),
        "w1": np.full((2, 2), 3.0 + 1.0),
        "b1": np.full(2, 3.0 + 1.0),
        "w2": np.full((2, 2), 4.5 + 1.0),
        "b2": np.full(2, 3.0 + 1.0),
    }


def _consume(variables, arena, events, gate):
    """Append, for each gradient that comes, its variable and which variables' gradients are complete."""
    expected = _expected()
    for slab in arena.slabs:
        slab.gradients[:] = -1.0
    for _, variable in _stream(variables, gate):
        complete = [v.name for v in variables if np.allclose(v.gradient, expected[v.name])]
        events.append((variable.name, complete))
    return events


def test_gate_none_yields_a_gradient_before_others_of_its_primitive_are_added_up(network):
    assert _consume(*network, GATE_NONE) == [
        "backward",
        ("w2", ["w2"]),
        ("b2", ["w2", "b2"]),
        "backward",
        ("x", ["x", "w2", "b2"]),
        ("w1", ["x", "w1", "w2", "b2"]),
        ("b1", ["x", "w1", "b1", "w2", "b2"]),
    ]


def test_gate_op_yields_the_gradients_of_a_primitive_when_all_of_them_are_added_up(network):
    every = ["x", "w1", "b1", "w2", "b2"]
    assert _consume(*network, GATE_OP) == [
        "backward",
        ("w2", ["w2", "b2"]),
        ("b2", ["w2", "b2"]),
        "backward",
        ("x", every),
        ("w1", every),
        ("b1", every),
    ]


def test_gate_graph_yields_nothing_before_all_gradients_are_final(network):
    every = ["x", "w1", "b1", "w2", "b2"]
    assert _consume(*network, GATE_GRAPH) == [
        "backward",
        "backward",
        ("w2", every),
        ("b2", every),
        ("x", every),
        ("w1", every),
        ("b1", every),
    ]


def test_gate_op_is_the_default(network):
    variables, _, events = network
    x, w1, b1, *_ = variables
    with GradientTape() as tape:
        loss = ops.reduce_sum(ops.dense(x, w1, b1)) + ops.reduce_sum(b1 * b1)
    _, variable = next(tape.gradients(loss, [w1, b1]))
    assert variable is w1
    assert b1.gradient.tolist() == [4.0, 4.0]
    assert events == ["backward"]


@pytest.mark.parametrize("gate", _GATES)
def test_nothing_is_computed_before_the_first_gradient_is_asked_for(network, gate):
    variables, _, events = network
    stream = _stream(variables, gate)
    assert events == []
    next(stream)
    assert events[0] == "backward"


@pytest.mark.parametrize("gate", _GATES)
def test_gates_change_no_bit_of_the_values(network, gate):
    variables, _, _ = network
    found = {variable.name: gradient.copy() for gradient, variable in _stream(variables, gate)}
    expected = _expected()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, expected[name])


@pytest.mark.parametrize("gate", [3, -1, None, "GATE_OP", True])
def test_another_gate_is_refused_at_once(gate):
    x = Variable(1.0)
    with GradientTape() as tape:
        y = x * x
    message = (
        "gate_gradients must be one of: Optimizer.GATE_NONE, Optimizer.GATE_OP, Optimizer.GATE_GRAPH. "
        f"Not {gate}"
    )
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        tape.gradients(y, [x], gate_gradients=gate)
    assert float(tape.gradient(y, x)) == 2.0


@pytest.mark.parametrize("gate", _GATES)
def test_a_primitive_that_communicates_backward_comes_before_every_gradient(gate):
    # Reductions that a consumer starts would otherwise fall at another place on ranks without some gradient.
    calls = []

    class Counting(LocalCommunicator):
        def all_reduce(self, values):
            calls.append(values.shape)
            return super().all_reduce(values)

    x, gamma, after = Variable(np.eye(3)), Variable(np.ones(3)), Variable(np.ones(3))
    with GradientTape() as tape:
        y = ops.batch_normalization(x, gamma, None, communicator=Counting())
        loss = ops.reduce_sum(y * after)
    forward = len(calls)
    stream = tape.gradients(loss, [x, gamma, after], gate_gradients=gate)
    next(stream)
    assert len(calls) == forward + 1
    assert len(list(stream)) == 2
