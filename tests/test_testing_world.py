"""Faults at (rank, step) of a training: every kind, on each rank, at several steps."""

import time

import numpy as np
import pytest
import training

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.errors import CommunicatorError, NonFiniteError
from distopt.optimizers import SGD, Adam, LossScaleOptimizer
from distopt.testing import Fault, world
from distopt.variables import Arena, IndexedSlices, Variable

RANKS, STEPS = 3, 4
_X = np.random.default_rng(3).standard_normal((7, 4))
_PLACES = [(rank, step) for rank in range(RANKS) for step in (1, 2, STEPS)]


def train(communicator, arena=True, steps=STEPS, after_step=lambda step: None):
    """Train a linear model on uneven shards (rank 1 has none); returns the weights."""
    variables = [Variable(np.zeros(4), name="w"), Variable(0.0, name="b", dtype="f8")]
    if arena:
        Arena(variables)
    w, b = variables
    optimizer = Adam(0.1, gradient_aggregator=AllReduce(communicator))
    shard = _X[: 0 if communicator.rank == 1 else 2 + communicator.rank]
    for step in range(1, steps + 1):
        optimizer.minimize(
            lambda: ops.reduce_sum((ops.reduce_sum(w * shard, axis=1) + b - 1.0) ** 2),
            variables,
            examples=len(shard),
        )
        after_step(step)
    return np.append(w.numpy(), b.numpy())


def on_every_rank(function, fault):
    """Run with a fault; returns the errors by rank (also where every rank caught its own)."""
    errors = {}

    def run(communicator):
        try:
            return function(communicator)
        except Exception as error:
            errors[communicator.rank] = error
            raise

    try:
        results = world(RANKS, run, faults=[fault], timeout_seconds=20)
    except CommunicatorError as error:
        return errors, error
    return errors, results


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize(("rank", "step"), _PLACES)
def test_a_rank_that_is_killed_in_a_step_is_named_by_all_others_in_that_step(rank, step, arena):
    done = {}

    def run(communicator):
        return train(
            communicator, arena, after_step=lambda number: done.__setitem__(communicator.rank, number)
        )

    errors, raised = on_every_rank(run, Fault("kill", rank, step=step))
    assert sorted(errors) == [other for other in range(RANKS) if other != rank]
    for error in (*errors.values(), raised):
        assert isinstance(error, CommunicatorError)
        assert f"rank {rank} was killed" in str(error)
    assert all(done.get(other, 0) == step - 1 for other in range(RANKS))


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize(("rank", "step"), _PLACES)
def test_calls_that_differ_in_a_step_raise_on_every_rank_and_name_the_odd_one(rank, step, arena):
    errors, _ = on_every_rank(lambda ranks: train(ranks, arena), Fault("mismatch", rank, step=step))
    assert sorted(errors) == list(range(RANKS))
    for error in errors.values():
        assert isinstance(error, CommunicatorError)
        assert f"rank {rank or 1} called" in str(error)  # beside rank 0


@pytest.mark.parametrize(("rank", "step"), _PLACES)
def test_a_rank_that_is_late_in_a_step_changes_nothing(rank, step):
    expected = world(RANKS, train)
    began = time.monotonic()
    errors, results = on_every_rank(train, Fault("delay", rank, step=step, seconds=0.15))
    assert time.monotonic() - began >= 0.15
    assert errors == {}
    np.testing.assert_array_equal(results, expected)


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize(("rank", "step"), _PLACES)
def test_a_nan_in_a_gradient_reaches_every_rank_in_that_step(rank, step, arena):
    seen = {}

    def run(communicator):
        variables = [Variable(np.zeros(4), name="w"), Variable(np.zeros(2), name="b")]
        if arena:
            Arena(variables)
        aggregator = AllReduce(communicator)
        for number in range(1, STEPS + 1):
            given = [np.ones(v.shape) for v in variables]
            pairs = aggregator.aggregate(zip(given, variables, strict=True), examples=1)
            seen[communicator.rank, number] = [np.isnan(gradient).tolist() for gradient, _ in pairs]
            assert not np.isnan(given[0]).any()  # the caller's memory is no place for a fault

    errors, _ = on_every_rank(run, Fault("nan", rank, step=step))
    assert errors == {}
    for (_, number), found in seen.items():
        assert found == [[number == step, False, False, False], [False, False]]


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_nan_may_be_in_the_rows_of_a_sparse_gradient(rank):
    def run(communicator):
        other, table = Variable(0.0, name="other"), Variable(np.zeros((3, 2)), name="table")
        rows = IndexedSlices(np.ones((1, 2)), np.array([communicator.rank]), (3, 2))
        _, (total, _) = AllReduce(communicator, "sum").aggregate([(None, other), (rows, table)])
        assert np.isfinite(rows.values).all()
        return np.isnan(total.to_dense()).tolist()

    expected = [[row == rank, False] for row in range(3)]
    assert world(3, run, faults=[Fault("nan", rank, step=1)]) == [expected] * 3


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("step", [1, 3])
def test_the_trainer_raises_on_every_rank_and_leaves_the_variables(rank, step):
    weights = {}

    def run(communicator):
        made = training.trainer(communicator, global_batch=17)
        try:
            training.run(made)
        finally:
            weights[communicator.rank] = made.replicas[0].arena.slabs[0].values.copy(), made.step

    messages = []

    def caught(communicator):
        with pytest.raises(NonFiniteError) as error:
            run(communicator)
        messages.append(str(error.value))

    world(RANKS, caught, faults=[Fault("nan", rank, step=step)])
    assert len(messages) == RANKS
    assert len(set(messages)) == 1
    assert f"the loss is finite at step {step}, but the gradients of" in messages[0]
    for values, done in weights.values():
        assert done == step - 1
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values, weights[0][0])


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("kind", ["kill", "mismatch"])
def test_the_trainer_ends_on_every_rank(rank, kind):
    errors, _ = on_every_rank(lambda ranks: training.run(training.trainer(ranks)), Fault(kind, rank, step=2))
    assert set(errors) == set(range(RANKS)) - ({rank} if kind == "kill" else set())
    for error in errors.values():
        assert isinstance(error, CommunicatorError)
        assert f"rank {rank if kind == 'kill' else rank or 1} " in str(error)


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_loss_scale_leaves_the_step_out_on_every_rank(rank):
    def run(communicator):
        w = Variable(np.zeros(2, "f4"), name="w")
        inner = SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum"))
        optimizer = LossScaleOptimizer(inner, initial_scale=8.0)
        values = []
        for _ in range(3):
            optimizer.minimize(lambda: ops.reduce_sum(w * 1.0), [w])
            values.append((w.numpy()[0], float(optimizer.loss_scale)))
        return values

    expected = [(-3.0, 8.0), (-3.0, 4.0), (-6.0, 4.0)]
    assert world(RANKS, run, faults=[Fault("nan", rank, step=2)]) == [expected] * RANKS


def test_steps_are_counted_from_one_by_communicator_and_by_rank():
    def run(communicator):
        assert communicator.steps == 0
        train(communicator, steps=2)
        with communicator.split(0) as group:
            train(group, steps=1)
            return communicator.steps, group.steps

    assert world(2, run) == [(2, 1)] * 2
    with pytest.raises(CommunicatorError, match="rank 1 was killed"):
        world(2, run, faults=[Fault("kill", 1, step=3)])  # in the group


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0}, "step >= 1"),
        ({"step": -2}, "step >= 1"),
        ({"call_number": 1, "step": 1}, "and not both"),
        ({}, "needs a call_number or a step"),
    ],
)
def test_a_fault_has_one_time(arguments, message):
    with pytest.raises(ValueError, match=message):
        Fault("kill", 0, **arguments)


def test_a_step_that_was_never_reached_is_an_error():
    with pytest.raises(ValueError, match=r"never reached.*step=9"):
        world(2, train, faults=[Fault("nan", 0, step=9)])


def test_a_step_without_gradients_has_no_place_for_a_nan():
    def run(communicator):
        w = Variable([1.0], name="w")
        AllReduce(communicator, "sum").aggregate([(None, w)])

    with pytest.raises(ValueError, match="it has none with elements"):
        world(1, run, faults=[Fault("nan", 0, step=1)])
