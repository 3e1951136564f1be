"""Rows of several ranks, over ranks as threads."""

import numpy as np
import pytest
from rows_cases import COUNTS, reduced, slices_of

from distopt.aggregators import AllReduce, Ticket
from distopt.aggregators.sparse import SparseExchange, local_rows
from distopt.communicators import connect
from distopt.optimizers import SGD, Adam
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["auto", "rows", "dense"])
@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_are_summed_once_each_and_in_order_on_all_ranks(ranks, mode, arena, counts, reduction):
    def run(communicator):
        rows, sums, _ = reduced(
            communicator, mode, arena, COUNTS[counts], 11, reduction=reduction, examples=0.5
        )
        return None if rows is None else (rows.values.tobytes(), rows.indices.tobytes()), sums.tobytes()

    assert len(set(world(ranks, run))) == 1


@pytest.mark.parametrize("mode", ["rows", "dense"])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (5, 2, 3), (1, 4)])
def test_rows_of_any_shape(mode, shape):
    world(3, lambda communicator: reduced(communicator, mode, False, (3, 1, 4), 5, shape=shape))


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("mode", ["rows", "dense"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_rounded_sums_have_the_same_bits_on_all_ranks(arena, mode, dtype):
    def run(communicator):
        table = Variable(np.zeros((20, 3), dtype), name="table")
        if arena:
            Arena([table])
        random = np.random.default_rng(communicator.rank)
        slices = IndexedSlices(random.standard_normal((60, 3)), random.integers(0, 20, 60), (20, 3))
        ((rows, _),) = AllReduce(communicator, sparse=mode).reduce([(slices, table)], Ticket(examples=3))
        assert rows.dtype == np.dtype(dtype)
        return rows.values.tobytes(), rows.indices.tobytes()

    assert len(set(world(4, run))) == 1


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("dense_rank", [0, 1, 2])
def test_dense_on_one_rank_makes_it_dense_on_all(arena, dense_rank):
    def run(communicator):
        table = Variable(np.zeros((4, 1)), name="table")
        if arena:
            Arena([table])
        rows = IndexedSlices([[5.0], [5.0]], [1, 1], (4, 1))
        own = np.ones((4, 1)) if communicator.rank == dense_rank else rows
        found = []
        aggregator = AllReduce(communicator, "sum")
        for _ in range(3):
            ((total, _),) = aggregator.reduce([(own, table)])
            found.append(total.reshape(-1).tolist())
        return found

    assert world(3, run) == [[[1.0, 21.0, 1.0, 1.0]] * 3] * 3


def test_a_table_of_an_arena_may_change_between_rows_and_dense_from_step_to_step():
    def run(communicator):
        table, other = Variable(np.zeros((4, 1)), name="table"), Variable(np.zeros(2), name="other")
        Arena([table, other])
        aggregator, found = AllReduce(communicator, "sum", 64), []
        rows = IndexedSlices([[2.0]], [3], (4, 1))
        for step in range(8):
            # Each rank by its own plan: rows, dense, nothing.
            own = (rows, np.ones((4, 1)), None)[(step // (communicator.rank + 1)) % 3]
            pairs = [(own, table), (np.ones(2), other)]
            total, rest = (gradient for gradient, _ in aggregator.reduce(pairs))
            assert rest.tolist() == [2.0, 2.0]
            kind = None if total is None else type(total).__name__
            dense = total.to_dense() if isinstance(total, IndexedSlices) else total
            found.append((kind, None if total is None else dense.reshape(-1).tolist()))
        return found

    row, whole = [0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]
    plan = [(0, 0), (1, 0), (2, 1), (0, 1), (1, 2), (2, 2), (0, 0), (1, 0)]  # of rank 0, of rank 1
    expected = []
    for kinds in plan:
        if kinds == (2, 2):
            expected.append((None, None))
            continue
        total = np.sum([(row, whole, [0.0] * 4)[kind] for kind in kinds], axis=0).tolist()
        expected.append(("ndarray" if 1 in kinds else "IndexedSlices", total))
    assert world(2, run) == [expected] * 2


def _sgd(aggregator):
    return SGD(0.5, 0.9, gradient_aggregator=aggregator)


def _adam(aggregator):
    return Adam(0.5, gradient_aggregator=aggregator)


@pytest.mark.parametrize("make", [_sgd, _adam])
@pytest.mark.parametrize("arena", [False, True])
def test_optimizers_update_the_same_rows_whichever_way_they_went(make, arena):
    def run(communicator, mode):
        table = Variable(np.ones((50, 3)), name="table")
        if arena:
            Arena([table])
        optimizer = make(AllReduce(communicator, "sum", sparse=mode))
        for step in range(4):
            optimizer.apply_gradients([(slices_of(communicator.rank, (6, 2, 9), step), table)])
        return table.numpy().tolist()

    with connect("local") as alone:
        table = Variable(np.ones((50, 3)), name="table")
        optimizer = make(AllReduce(alone, "sum"))
        for step in range(4):
            parts = [slices_of(rank, (6, 2, 9), step) for rank in range(3)]
            whole = IndexedSlices(
                np.concatenate([p.values for p in parts]), np.concatenate([p.indices for p in parts]), (50, 3)
            )
            optimizer.apply_gradients([(whole, table)])
    for mode in ("rows", "dense", "auto"):
        assert (
            world(3, lambda communicator, mode=mode: run(communicator, mode)) == [table.numpy().tolist()] * 3
        )


def test_what_is_sent_is_deduplicated_first():
    def run(communicator, mode):
        slices = IndexedSlices(np.ones((1000, 4), "f4"), np.arange(1000) % 10, (30, 4))
        aggregator = AllReduce(communicator, "sum", sparse=mode)
        aggregator.reduce([(slices, Variable(np.zeros((30, 4), "f4"), name="t"))])
        return aggregator.wire_bytes

    assert world(2, lambda c: run(c, "rows")) == [10 * (16 + 8)] * 2
    assert world(2, lambda c: run(c, "dense")) == [30 * (16 + 4)] * 2  # and a column of marks


def test_the_cheaper_way_is_chosen_by_the_measured_costs():
    # With costs set by hand: rows 1 s a byte; tables 2 s a byte and 100 s each.
    from distopt.aggregators.sparse import _Cost

    def run(communicator):
        exchange = SparseExchange(communicator)
        exchange._costs = _Cost(0.0, 1.0), _Cost(100.0, 2.0)
        table = Variable(np.zeros((10, 4), "f4"), name="t")
        chosen = []
        for rows in (1, 20, 21, 500):
            exchange.sum(None, table, rows, None)
            chosen.append(exchange.chosen["t"])
        return chosen

    # A table is 10 * (16 + 4) bytes: 500 s. Rows take (16 + 8) s each: 20 of them 480 s, 21 of them 504 s.
    assert world(2, run) == [["rows", "rows", "dense", "dense"]] * 2


def test_all_ranks_measure_the_same_and_choose_alike():
    def run(communicator):
        few = AllReduce(communicator, "sum")
        table = Variable(np.zeros((4000, 64), "f4"), name="t")
        rows = IndexedSlices(np.ones((1, 64), "f4"), [communicator.rank], (4000, 64))
        few.reduce([(rows, table)])
        many = IndexedSlices(np.ones((4000, 64), "f4"), np.arange(4000), (4000, 64))
        for_few = few.sparse.chosen["t"]
        few.reduce([(many, table)])
        return for_few, few.sparse.chosen["t"], few.sparse._costs

    results = world(4, run)
    assert results == [results[0]] * 4
    assert all(cost.seconds_per_byte >= 0 for cost in results[0][2])


def test_one_rank_keeps_its_rows_without_measuring():
    with connect("local") as communicator:
        aggregator = AllReduce(communicator, "sum")
        table = Variable(np.zeros((4, 1)), name="t")
        ((rows, _),) = aggregator.reduce([(IndexedSlices([[1.0], [2.0]], [3, 3], (4, 1)), table)])
        assert (rows.indices.tolist(), rows.values.tolist()) == ([3], [[3.0]])
        assert aggregator.sparse.chosen == {"t": "rows"}
        assert communicator.calls["barrier"] == 0


@pytest.mark.parametrize("mode", ["rows", "dense"])
def test_a_row_of_zeros_is_a_row(mode):
    def run(communicator):
        table = Variable(np.zeros((4, 1)), name="t")
        rows = IndexedSlices([[0.0]], [communicator.rank], (4, 1))
        ((found, _),) = AllReduce(communicator, "sum", sparse=mode).reduce([(rows, table)])
        return found.indices.tolist()

    assert world(2, run) == [[0, 1]] * 2


def test_callers_rows_are_left_alone_and_rows_in_order_are_not_copied():
    values, indices = np.array([[1.0], [2.0], [4.0]]), np.array([2, 0, 2])
    slices = IndexedSlices(values, indices, (3, 1))
    table = Variable(np.zeros((3, 1)), name="t")
    found = local_rows(slices, table)
    assert (found.indices.tolist(), found.values.tolist()) == ([0, 2], [[2.0], [5.0]])
    assert (values.tolist(), indices.tolist()) == ([[1.0], [2.0], [4.0]], [2, 0, 2])
    distinct = IndexedSlices([[1.0], [2.0]], [2, 0], (3, 1)).deduplicated()
    assert (distinct.indices.tolist(), distinct.values.tolist()) == ([0, 2], [[2.0], [1.0]])
    same = IndexedSlices([[1.0], [2.0]], [2, 0], (3, 1)).deduplicated(by_appearance=True)
    assert (same.indices.tolist(), same.values.tolist()) == ([2, 0], [[1.0], [2.0]])


def test_rows_that_don_t_fit_are_refused_before_anything_is_sent():
    with connect("local") as communicator:
        table = Variable(np.zeros((3, 2)), name="t")
        aggregator = AllReduce(communicator, "sum")
        before = communicator.sequence
        with pytest.raises(
            ValueError, match=r"'t' has rows of shape \(1,\), the variable has shape \(3, 2\)"
        ):
            aggregator.reduce([(IndexedSlices([[1.0]], [0]), table)])
        with pytest.raises(ValueError, match="indices go from 3 to 3, but there are rows 0 to 2 only"):
            aggregator.reduce([(IndexedSlices([[1.0, 1.0]], [3]), table)])
        assert communicator.sequence == before
        with pytest.raises(ValueError, match="sparse must be 'auto', 'rows' or 'dense', got 'lazy'"):
            AllReduce(communicator, sparse="lazy")
