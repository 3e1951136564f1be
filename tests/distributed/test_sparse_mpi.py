"""Rows of several ranks under mpirun: valid for any number of ranks."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "aggregators"))

from rows_cases import COUNTS, reduced

from distopt.aggregators import AllReduce, Ticket
from distopt.variables import Arena, IndexedSlices, Variable


@pytest.mark.parametrize(("mode", "arena"), [("rows", False), ("dense", False), ("rows", True)])
@pytest.mark.parametrize("counts", ["uneven", "one rank only", "many repeats"])
def test_rows_are_summed_once_each_and_in_order_on_all_ranks(communicator, mode, arena, counts):
    rows, sums, _ = reduced(communicator, mode, arena, COUNTS[counts], 3, reduction="mean", examples=0.5)
    bits = None if rows is None else (rows.values.tobytes(), rows.indices.tobytes()), sums.tobytes()
    assert communicator.all_gather_object(bits) == [bits] * communicator.size


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("mode", ["rows", "dense"])
def test_rounded_sums_have_the_same_bits_on_all_ranks(communicator, arena, mode):
    table = Variable(np.zeros((200, 30), "f4"), name="table")
    dense = Variable(np.zeros(1000, "f4"), name="dense")
    if arena:
        Arena([table, dense])
    random = np.random.default_rng(communicator.rank)
    n = 100 * communicator.rank
    slices = IndexedSlices(random.standard_normal((n, 30)), random.integers(0, 200, n), (200, 30))
    pairs = [(slices, table), (random.standard_normal(1000), dense)]
    (rows, _), (sums, _) = AllReduce(communicator, sparse=mode).reduce(pairs, Ticket(examples=3))
    bits = rows.values.tobytes(), rows.indices.tobytes(), sums.tobytes()
    assert communicator.all_gather_object(bits) == [bits] * communicator.size


def test_all_ranks_measure_the_same_and_choose_alike(communicator):
    aggregator = AllReduce(communicator, "sum")
    table = Variable(np.zeros((4000, 64), "f4"), name="t")
    chosen = []
    for n in (1, 4000):
        rows = IndexedSlices(np.ones((n, 64), "f4"), np.arange(n), (4000, 64))
        aggregator.reduce([(rows, table)])
        chosen.append(aggregator.sparse.chosen["t"])
    assert communicator.all_gather_object(chosen) == [chosen] * communicator.size
    assert communicator.size > 1 or chosen == ["rows", "rows"]
