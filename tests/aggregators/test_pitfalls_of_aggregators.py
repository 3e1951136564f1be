"""What goes wrong in aggregators: halves out of range, wrappers that lose something, wrong arguments."""

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
    Ticket,
)
from distopt.optimizers import SGD, Adam
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

MAKE = {
    "AllReduce": AllReduce,
    "Sharded": Sharded,
    "Canonical": Canonical,
    "Compressed, small": lambda c: Compressed(c, "bf16"),
    "Adasum": Adasum,
    "LocalSGD": lambda c: LocalSGD(c, 4),
    "Delayed": lambda c: Delayed(AllReduce(c)),
}


def _reduced(aggregator, pairs, examples):
    reduced = aggregator.reduce(pairs, Ticket(examples=examples))
    if isinstance(aggregator, Delayed):
        reduced = aggregator.flush()
    return reduced


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mean_of_halves_whose_sum_is_out_of_range_is_exact(name, arena, ranks):
    def run(communicator):
        own = [Variable(np.zeros(n, np.float16), name=f"v{n}") for n in (5, 1, 7)]
        if arena:
            Arena(own)
        pairs = [(np.full(v.shape, 60000, np.float16), v) for v in own]
        return [g.tolist() for g, _ in _reduced(MAKE[name](communicator), pairs, 1.0)]

    assert world(ranks, run) == [[[60000.0] * n for n in (5, 1, 7)]] * ranks


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("arena", [True, False])
def test_halves_are_divided_by_more_examples_than_a_half_can_count(name, arena):
    def run(communicator):
        own = [Variable(np.zeros(6, np.float16), name="v")]
        if arena:
            Arena(own)
        pairs = [(np.full(6, 40000, np.float16), own[0])]
        return [g.tolist() for g, _ in _reduced(MAKE[name](communicator), pairs, 80000.0)]

    assert world(2, run) == [[[0.5] * 6]] * 2


@pytest.mark.parametrize("sparse", ["rows", "dense"])
def test_rows_of_halves_are_summed_and_divided_in_float32(sparse):
    def run(communicator):
        table = Variable(np.zeros((4, 2), np.float16), name="table")
        rows = IndexedSlices(np.full((1, 2), 60000, np.float16), np.array([communicator.rank // 2]), (4, 2))
        aggregator = AllReduce(communicator, sparse=sparse)
        ((found, _),) = aggregator.reduce([(rows, table)], Ticket(examples=2 / 3))
        return found.values.dtype, found.values.tolist(), found.indices.tolist()

    # 120000 and 60000, over 2
    assert world(3, run) == [(np.float16, [[60000.0] * 2, [30000.0] * 2], [0, 1])] * 3


def test_rows_by_one_rank_are_divided_by_more_examples_than_a_half_can_count():
    def run(communicator):
        table = Variable(np.zeros((4, 2), np.float16), name="table")
        rows = IndexedSlices(np.full((1, 2), 40000, np.float16), np.array([3]), (4, 2))
        ((found, _),) = LocalSGD(communicator, 4).reduce([(rows, table)], Ticket(examples=80000))
        return found.values.tolist()

    assert world(2, run) == [[[0.5, 0.5]]] * 2


@pytest.mark.parametrize("make", [AllReduce, Sharded, Canonical])
def test_a_sum_of_halves_that_is_not_divided_may_be_infinite(make):
    def run(communicator):
        own = [Variable(np.zeros(3, np.float16), name="v")]
        Arena(own)
        aggregator = make(communicator, reduction="sum")
        ((found, _),) = aggregator.reduce([(np.array([1, 2.5, 60000], np.float16), own[0])])
        return found.dtype, found.tolist()

    assert world(2, run) == [(np.float16, [2.0, 5.0, np.inf])] * 2
