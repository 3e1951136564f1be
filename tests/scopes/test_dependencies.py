import threading

import numpy as np
import pytest

from distopt import ops, scopes
from distopt.scopes import Graph, GraphKeys, UpdateOp, control_dependencies, run_update_ops
from distopt.variables import Variable


@pytest.fixture(autouse=True)
def graph():
    with Graph().as_default() as graph:
        yield graph


@pytest.fixture
def events():
    return []


def _op(events, name):
    return lambda: events.append(name)


def test_operations_run_in_order_before_the_block(events):
    with control_dependencies([_op(events, "a"), _op(events, "b")]):
        events.append("inside")
    assert events == ["a", "b", "inside"]


def test_the_block_sees_the_update_and_a_tensor_made_outside_stays_stale():
    variable = Variable(1.0)
    outside = ops.multiply(variable, 10.0)
    with control_dependencies([lambda: variable.assign_add(1.0)]):
        inside = ops.multiply(variable, 10.0)
    assert (float(outside), float(inside)) == (10.0, 20.0)


def test_nested_blocks_run_theirs_one_after_the_other(events):
    with control_dependencies([_op(events, "outer")]):
        events.append("between")
        with control_dependencies([_op(events, "inner")]):
            events.append("inside")
    assert events == ["outer", "between", "inner", "inside"]


def test_within_a_step_an_operation_runs_once(graph, events):
    op = _op(events, "a")
    for _ in range(2):
        with graph.step():
            with control_dependencies([op]), control_dependencies([op]):
                events.append("inside")
            scopes.add_to_collection(GraphKeys.UPDATE_OPS, op)
            assert run_update_ops() == 0
    assert events == ["a", "inside", "a", "inside"]


def test_outside_of_steps_a_callable_runs_at_every_block_and_an_update_op_once(events):
    plain, update = _op(events, "plain"), UpdateOp(_op(events, "update"), "u")
    for _ in range(2):
        with control_dependencies([plain, update]):
            pass
    assert events == ["plain", "update", "plain"]


def test_update_ops_run_in_order_exactly_once_per_step(graph, events):
    lasting = _op(events, "lasting")
    scopes.add_to_collection(GraphKeys.UPDATE_OPS, lasting)
    for _ in range(3):
        with graph.step():
            for name in ("a", "b"):
                op = UpdateOp(_op(events, name), name)
                scopes.add_to_collection(GraphKeys.UPDATE_OPS, op)
            assert run_update_ops() == 3
            assert run_update_ops() == 0
            with control_dependencies(scopes.get_collection(GraphKeys.UPDATE_OPS)):
                pass
    assert events == ["lasting", "a", "b"] * 3
    assert len(scopes.get_collection(GraphKeys.UPDATE_OPS)) == 3


def test_run_update_ops_takes_a_scope(events):
    for name in ("tower_0/a", "tower_1/a", "tower_10/a"):
        scopes.add_to_collection(GraphKeys.UPDATE_OPS, UpdateOp(_op(events, name), name))
    scopes.add_to_collection(GraphKeys.UPDATE_OPS, _op(events, "without a name"))
    assert run_update_ops("tower_1/") == 1
    assert events == ["tower_1/a"]


def test_outside_of_steps_update_ops_that_are_done_leave_the_collection(events):
    first, second = (UpdateOp(_op(events, n), n) for n in "ab")
    for op in (first, second):
        scopes.add_to_collection(GraphKeys.UPDATE_OPS, op)
    with control_dependencies([first]):
        pass
    assert scopes.get_collection(GraphKeys.UPDATE_OPS) == [second]
    assert run_update_ops() == 1
    assert scopes.get_collection(GraphKeys.UPDATE_OPS) == []


def test_an_operation_that_fails_is_not_repeated_and_the_block_is_not_entered(graph, events):
    def fail():
        events.append("fail")
        raise KeyError

    with graph.step():
        with pytest.raises(KeyError), control_dependencies([fail]):
            events.append("inside")
        assert run_update_ops() == 0
    assert events == ["fail"]


def test_values_among_the_operations_and_none_are_nothing_to_do(events):
    with control_dependencies([Variable(1.0), ops.square(2.0), np.ones(1), _op(events, "a")]):
        pass
    with control_dependencies(None), control_dependencies([]):
        pass
    assert events == ["a"]


@pytest.mark.parametrize("wrong", [["loss"], [None], [3]])
def test_what_is_neither_callable_nor_a_value_is_refused_before_anything_runs(events, wrong):
    with (
        pytest.raises(TypeError, match=r"Can not convert a .* into an operation"),
        control_dependencies([_op(events, "a"), *wrong]),
    ):
        raise AssertionError("the block was entered")
    assert events == []


@pytest.mark.parametrize("wrong", [3, Variable(1.0), lambda: None])
def test_control_inputs_must_be_a_list(wrong):
    with pytest.raises(TypeError, match=r"Write control_dependencies\(\[operation\]\)"):
        control_dependencies(wrong).__enter__()


def test_an_update_op_tells_what_it_is():
    op = UpdateOp(lambda: None, "bn/update")
    assert repr(op) == "<UpdateOp 'bn/update', to be done>"
    op()
    assert repr(op) == "<UpdateOp 'bn/update', done>"


def test_every_thread_has_update_ops_of_its_own(events):
    scopes.add_to_collection(GraphKeys.UPDATE_OPS, _op(events, "main"))
    counts = []
    thread = threading.Thread(target=lambda: counts.append(run_update_ops()))
    thread.start()
    thread.join()
    assert (counts, events) == ([0], [])
