"""Gradients of other libraries, and faults at (rank, step), in every aggregator."""

import foreign_arrays
import numpy as np
import pytest

from distopt.aggregators import (
    Accumulate,
    Adasum,
    AllReduce,
    Canonical,
    Compressed,
    Delayed,
    Grouped,
    LocalSGD,
    Sharded,
)
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import Fault, world
from distopt.variables import Arena, Variable

RANKS, STEPS = 2, 4
MAKERS = {
    "AllReduce": AllReduce,
    "Canonical": Canonical,
    "Compressed": lambda ranks: Compressed(ranks, "bf16", min_elements=1),
    "Adasum": Adasum,
    "Sharded": Sharded,
    "LocalSGD": lambda ranks: LocalSGD(ranks, every=2),
    "Delayed": lambda ranks: Delayed(AllReduce(ranks)),
    "Accumulate": lambda ranks: Accumulate(AllReduce(ranks), 2),
    "Grouped": lambda ranks: Grouped({"one": AllReduce(ranks)}, lambda variable: "one"),
}


def train(communicator, make, kind, arena):
    variables = [Variable(np.ones((2, 3), "f4"), name="w"), Variable(np.ones(4, "f4"), name="b")]
    if arena:
        Arena(variables)
    optimizer = SGD(0.5, gradient_aggregator=make(communicator))
    random = np.random.default_rng(communicator.rank)
    for _ in range(STEPS):
        given = [random.standard_normal(variable.shape, np.float32) for variable in variables]
        before = [array.copy() for array in given]
        pairs = [(kind(array), variable) for array, variable in zip(given, variables, strict=True)]
        optimizer.apply_gradients(pairs, examples=2 + communicator.rank)
        for array, copy in zip(given, before, strict=True):
            np.testing.assert_array_equal(array, copy)  # the caller's memory
    return np.concatenate([variable.numpy().reshape(-1) for variable in variables])


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_the_library_of_a_gradient_makes_no_difference(name, arena):
    expected = world(RANKS, lambda ranks: train(ranks, MAKERS[name], np.asarray, arena))
    assert np.abs(expected[0] - 1).max() > 0.1
    for kind in foreign_arrays.HOST:
        found = world(RANKS, lambda ranks, kind=kind: train(ranks, MAKERS[name], kind, arena))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", MAKERS)
def test_faults_at_a_step_are_reached(name, rank):
    def run(communicator):
        return train(communicator, MAKERS[name], np.asarray, True)

    with pytest.raises(CommunicatorError, match=f"rank {rank} was killed"):
        world(RANKS, run, faults=[Fault("kill", rank, step=2)])
    with np.errstate(invalid="ignore"):
        found = world(RANKS, run, faults=[Fault("nan", rank, step=1)])
    assert np.isnan(found).any(axis=1).all()
