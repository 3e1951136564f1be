"""Sparse gradients on several ranks, for threads and for mpirun."""

import numpy as np

from distopt.aggregators import AllReduce, Ticket
from distopt.variables import Arena, IndexedSlices, Variable

ROWS, WIDTH = 50, 3
COUNTS = {
    "as many": (4, 4, 4, 4),
    "uneven": (7, 0, 1, 3),
    "one rank only": (0, 0, 5, 0),
    "none": (0, 0, 0, 0),
    "many repeats": (200, 3, 90, 1),
}


def slices_of(rank, counts, seed, dtype="f8", shape=(ROWS, WIDTH)):
    """Return a rank's rows of whole numbers, indices repeating; None for every second rank without rows."""
    random = np.random.default_rng([seed, rank])
    n = counts[rank]
    if n == 0 and rank % 2:
        return None
    values = random.integers(-4, 5, (n, *shape[1:])).astype(dtype)
    return IndexedSlices(values, random.integers(0, shape[0], n), shape)


def expected(ranks, counts, seed, shape=(ROWS, WIDTH)):
    """Return the dense sum over ranks, and the indices that occur, by a plain loop."""
    total, used = np.zeros(shape), set()
    for rank in range(ranks):
        slices = slices_of(rank, counts, seed, shape=shape)
        if slices is not None:
            for index, row in zip(slices.indices.tolist(), slices.values, strict=True):
                total[index] += row
                used.add(index)
    return total, sorted(used)


def reduced(communicator, mode, arena, counts, seed, *, reduction="sum", examples=1.0, shape=(ROWS, WIDTH)):
    """Reduce a table beside a dense variable; returns the table's gradient, the dense one, the aggregator."""
    table = Variable(np.zeros(shape), name="table")
    dense = Variable(np.zeros(5), name="dense")
    if arena:
        Arena([table, dense])
    aggregator = AllReduce(communicator, reduction, bucket_bytes=256, sparse=mode)
    for step in range(3):  # buckets stream from the second step on
        own = slices_of(communicator.rank, counts, seed + step, shape=shape)
        pairs = [(np.full(5, 2.0), dense), (own, table)]
        (rows, _), (sums, _) = aggregator.reduce(pairs, Ticket(examples=examples))
        ranks = communicator.size
        total, used = expected(ranks, counts, seed + step, shape)
        divisor = 1.0 if reduction == "sum" else ranks * examples
        np.testing.assert_array_equal(sums, np.full(5, 2.0 * ranks / divisor))
        if all(slices_of(rank, counts, seed + step, shape=shape) is None for rank in range(ranks)):
            assert rows is None
            continue
        assert isinstance(rows, IndexedSlices)
        assert rows.indices.tolist() == used  # every row once, in order
        np.testing.assert_array_equal(rows.to_dense(), total / divisor)
    return rows, sums, aggregator
