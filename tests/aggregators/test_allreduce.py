"""Aggregation over ranks as threads; the same claims under mpirun are in tests/distributed."""

import numpy as np
import pytest

from distopt import ops
from distopt.aggregators import AllReduce, Ticket, combine_replicas
from distopt.communicators import connect
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.tape import GradientTape
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

RANKS = [1, 2, 3, 4]


def _model(in_arena):
    variables = [
        Variable(np.zeros((5, 3), "f4"), name="w"),
        Variable(np.zeros(3, "f4"), name="b"),
        Variable(np.zeros(2), name="d"),
    ]
    if in_arena:
        Arena(variables)
    return variables


def _gradient(variable, factor):
    return (np.arange(variable.size).reshape(variable.shape) * factor).astype(variable.dtype)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_sum_and_mean_over_unequal_ranks(ranks, in_arena, bucket_bytes):
    # Rank r has r + 1/2 examples and the gradient sum (r + 1) * arange.
    def run(communicator):
        rank = communicator.rank
        results = []
        for reduction in ("sum", "mean"):
            variables = _model(in_arena)
            aggregator = AllReduce(communicator, reduction, bucket_bytes)
            pairs = [(_gradient(v, rank + 1), v) for v in variables]
            reduced = aggregator.reduce(pairs, Ticket(examples=rank + 0.5))
            results.append([np.array(g) for g, _ in reduced])
            assert aggregator.ticket.examples == sum(r + 0.5 for r in range(ranks))
        return results

    total, weight = ranks * (ranks + 1) / 2, sum(r + 0.5 for r in range(ranks))
    for sums, means in world(ranks, run):
        for variable, found, mean in zip(_model(False), sums, means, strict=True):
            expected = _gradient(variable, total)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_allclose(mean, expected / weight, rtol=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
def test_a_gradient_missing_on_some_ranks_counts_as_zeros_and_on_all_as_none(ranks, in_arena):
    def run(communicator):
        variables = _model(in_arena)
        if in_arena:  # what an earlier step left there must not count
            for variable in variables:
                variable.gradient[...] = 99
        last = communicator.rank == communicator.size - 1
        pairs = [
            (np.ones(variables[0].shape, "f4") if last else None, variables[0]),
            (None, variables[1]),
            (np.ones(2), variables[2]),
        ]
        reduced = AllReduce(communicator, "sum").reduce(pairs)
        return [None if g is None else np.array(g).tolist() for g, _ in reduced]

    for found in world(ranks, run):
        assert found == [[[1.0] * 3] * 5, None, [float(ranks)] * 2]


@pytest.mark.parametrize("ranks", RANKS)
def test_sparse_rows_of_all_ranks_are_joined(ranks):
    def run(communicator):
        table = Variable(np.zeros((4, 2)), name="table")
        n = communicator.rank  # rank r gives r rows
        slices = IndexedSlices(np.full((n, 2), n + 1.0), np.full(n, 3), (4, 2))
        (pair,) = AllReduce(communicator, "sum").reduce([(slices if n else None, table)])
        return None if pair[0] is None else pair[0].to_dense()[3].tolist()

    expected = float(sum(r * (r + 1) for r in range(ranks)))
    assert world(ranks, run) == [None if ranks == 1 else [expected, expected]] * ranks


def test_sparse_on_one_rank_and_dense_on_another_becomes_dense():
    def run(communicator):
        table = Variable(np.zeros((3, 1)), name="table")
        dense = communicator.rank == 0
        gradient = np.ones((3, 1)) if dense else IndexedSlices([[5.0], [5.0]], [1, 1], (3, 1))
        (pair,) = AllReduce(communicator, "sum").reduce([(gradient, table)])
        return pair[0].tolist()

    assert world(2, run) == [[[1.0], [11.0], [1.0]]] * 2


def test_buckets_start_in_arena_order_while_backward_runs():
    events = []
    with connect("local") as communicator:
        start = communicator.all_reduce
        communicator.all_reduce = lambda values, op="sum": (
            events.append(f"reduce {values.size}"),
            start(values, op),
        )[1]
        a, b = Variable(np.ones(64, "f4"), name="a"), Variable(np.ones(128, "f4"), name="b")
        Arena([a, b])
        with GradientTape() as tape:
            loss = ops.reduce_sum(a * 2.0) + ops.reduce_sum(ops.square(b))

        def watched():
            for gradient, variable in tape.gradients(loss, [a, b]):
                events.append(f"final {variable.name}")
                yield gradient, variable

        aggregator = AllReduce(communicator, "sum", bucket_bytes=256)
        aggregator.reduce([(a.numpy(), a), (b.numpy(), b)])  # the first step tells which slab leads
        events.clear()
        aggregator.reduce(watched())
    # b, created last, stands first in the arena: its two buckets start before a's gradient is there.
    assert events[:5] == ["final b", "reduce 64", "reduce 64", "final a", "reduce 64"]


def test_ten_small_gradients_are_one_all_reduce():
    with connect("local") as communicator:
        sizes = []
        start = communicator.all_reduce
        communicator.all_reduce = lambda values, op="sum": (sizes.append(values.size), start(values, op))[1]
        for in_arena in (True, False):
            sizes.clear()
            variables = [Variable(np.ones(10, "f4"), name=str(i)) for i in range(10)]
            if in_arena:
                Arena(variables)
            AllReduce(communicator, "sum").reduce([(v.numpy(), v) for v in variables])
            # The ticket, and all gradients at once.
            assert sorted(sizes) == sorted([10, 640 if in_arena else 100])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("in_arena", [True, False])
def test_a_step_without_any_example_is_left_out_on_all_ranks_and_rank_0_says_so(ranks, in_arena, caplog):
    def run(communicator):
        w = Variable([1.0, 2.0], name="w")
        if in_arena:
            Arena([w])
        optimizer = SGD(0.5, momentum=0.9, gradient_aggregator=AllReduce(communicator))
        optimizer.apply_gradients([(np.ones(2, "f4"), w)], examples=1)
        before = w.numpy().tolist(), optimizer.get_weights()[1].tolist(), int(optimizer.iterations)
        optimizer.apply_gradients([(None, w)], examples=0)
        assert (w.numpy().tolist(), optimizer.get_weights()[1].tolist(), int(optimizer.iterations)) == before
        optimizer.apply_gradients([(np.ones(2, "f4"), w)], examples=0.5)  # a weighted example
        return w.numpy().tolist()

    # Rates 0.5 * gradients: 1 / 1, then with momentum 0.9 + 1 / 0.5.
    expected = pytest.approx([0.5 - 0.5 * (0.9 + 2), 1.5 - 0.5 * (0.9 + 2)])
    for found in world(ranks, run):
        assert found == expected
    said = [record.message for record in caplog.records if "no rank has an example" in record.message]
    assert said == [
        "step 1: no rank has an example (their total is 0), so the update is left out on all ranks"
    ]


def test_wrong_settings_are_refused():
    with connect("local") as communicator:
        with pytest.raises(ValueError, match=r"'sum' or 'mean' .*got 'average'"):
            AllReduce(communicator, "average")
        with pytest.raises(ValueError, match="bucket_bytes must be at least 1, got 0"):
            AllReduce(communicator, bucket_bytes=0)
        w = Variable(np.zeros(2), name="w")
        with pytest.raises(ValueError, match=r"'w' has shape \(3,\)"):
            AllReduce(communicator, "sum").reduce([(np.zeros(3), w)])


def test_ranks_with_different_models_raise_and_do_not_hang():
    def run(communicator):
        w = Variable(np.zeros(2 + communicator.rank), name="w")
        AllReduce(communicator, "sum").reduce([(w.numpy(), w)])

    with pytest.raises(CommunicatorError):
        world(2, run, timeout_seconds=20)


def test_replicas_of_a_rank_are_summed_in_order():
    def pairs(factor, present=True):
        w = Variable(np.zeros(2), name="w")
        return [(np.ones(2) * factor if present else None, w)]

    ((total, variable),) = combine_replicas([pairs(1), pairs(10), pairs(5, present=False)])
    assert (total.tolist(), variable.name) == ([11.0, 11.0], "w")
    ((total, _),) = combine_replicas([pairs(1, present=False), pairs(10)])
    assert total.tolist() == [10.0, 10.0]
    with pytest.raises(ValueError, match="replica 1 of this rank has no variable 'w'"):
        list(combine_replicas([pairs(1), [(1.0, Variable(1.0, name="other"))]]))


@pytest.mark.parametrize("in_arena", [True, False])
def test_ranks_whose_gradients_come_in_another_order_agree(in_arena):
    # On rank 1 the loss doesn't depend on b, so its tape gives b last, with None.
    def run(communicator):
        variables = [Variable(1.0, name=n) for n in "abc"] + [Variable(np.ones(2), name="d")]
        a, b, c, d = variables
        if in_arena:
            Arena(variables)
        optimizer = SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum"))
        for _ in range(2):  # buckets stream from the second step on

            def loss():
                total = a * 3.0 + c * 1.0 + ops.cast(ops.reduce_sum(d), dtype=np.float32)
                return total + b * 10.0 if communicator.rank == 0 else total

            optimizer.minimize(loss, variables)
        return [float(v) for v in (a, b, c)] + d.numpy().tolist()

    assert world(2, run) == [[1 - 12.0, 1 - 20.0, 1 - 4.0, 1 - 4.0, 1 - 4.0]] * 2


@pytest.mark.parametrize("in_arena", [True, False])
def test_transforms_see_the_gradients_in_one_order_on_all_ranks(in_arena):
    # Norms are rounded sums and noise goes by places: another order would let ranks drift apart.
    def run(communicator):
        variables = [Variable(1.0, name=n) for n in "abc"]
        if in_arena:
            Arena(variables)
        own = variables if communicator.rank == 0 else [variables[2], variables[0]]
        seen = []
        optimizer = SGD(
            gradient_aggregator=AllReduce(communicator, "sum"),
            gradient_transformers=[lambda pairs: seen.extend(v.name for _, v in pairs) or pairs],
        )
        optimizer.minimize(lambda: ops.add_n([v * 2.0 for v in own]), variables)
        return seen

    assert world(2, run) == [["a", "b", "c"]] * 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_without_examples_counts_for_nothing_in_a_mean(ranks):
    def run(communicator):
        w = Variable(np.zeros(3), name="w")
        n = communicator.size - 1 - communicator.rank + (communicator.size == 1)  # the last one has none
        (pair,) = AllReduce(communicator).reduce([(np.full(3, 2.0 * n) if n else None, w)], Ticket(n))
        return pair[0].tolist()

    assert world(ranks, run) == [[2.0] * 3] * ranks


def test_ranks_that_give_different_variables_all_raise():
    def run(communicator):
        variables = [Variable(1.0, name=str(n)) for n in range(2 + (communicator.rank == 1))]
        with pytest.raises(
            CommunicatorError,
            match=r"rank 1 on .* has other variables than rank 0: 3 variables there and 2 on rank 0",
        ):
            AllReduce(communicator, "sum").reduce([(np.float32(1), v) for v in variables])
        return "raised"

    assert world(3, run) == ["raised"] * 3


def test_a_variable_given_twice_is_refused():
    with connect("local") as communicator:
        w = Variable(1.0, name="w")
        with pytest.raises(ValueError, match="'w' comes twice"):
            AllReduce(communicator, "sum").reduce([(1.0, w), (2.0, w)])


def test_sparse_gradients_of_replicas_are_joined_and_callers_arrays_left_alone():
    w = Variable(np.zeros((3, 1)), name="w")
    rows = IndexedSlices([[1.0]], [2], (3, 1))
    ((total, _),) = combine_replicas([[(rows, w)], [(rows, w)]])
    assert total.to_dense().tolist() == [[0.0], [0.0], [2.0]]
    mine = np.ones((3, 1))
    ((total, _),) = combine_replicas([[(mine, w)], [(rows, w)]])
    assert total.tolist() == [[1.0], [1.0], [2.0]]
    assert mine.tolist() == [[1.0]] * 3
