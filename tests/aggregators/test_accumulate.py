"""Gradient accumulation against arithmetic, over ranks as threads; under mpirun: test_strategies_mpi.py."""

import numpy as np
import pytest
import strategies_cases as cases

from distopt import ops
from distopt.aggregators import Accumulate, AllReduce, Delayed, LocalSGD, Ticket
from distopt.communicators import connect
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD, LossScaleOptimizer, optimize_loss
from distopt.schedules import PiecewiseConstantDecay
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

RANKS = [1, 2, 3, 4]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("in_arena", [True, False])
def test_an_update_is_the_mean_over_all_examples_of_all_micro_batches(ranks, n, in_arena):
    steps = 11

    def run(communicator):
        made = cases.variables(in_arena)
        aggregator = Accumulate(AllReduce(communicator), n)
        optimizer = SGD(cases.RATE, momentum=0.5, gradient_aggregator=aggregator)
        for step in range(steps):
            pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
            optimizer.apply_gradients(pairs, examples=examples)
        assert aggregator.micro_batches == steps % n
        optimizer.apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)
        optimizer.apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)  # nothing left
        return np.concatenate(cases.state_of(made))

    updates = [range(first, min(first + n, steps)) for first in range(0, steps, n)]
    expected, wrong = cases.accumulated(ranks, updates)
    results = world(ranks, run)
    for found in results:
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_array_equal(found, results[0])
    assert abs(expected - wrong).max() > 1e-3  # a mean of means is something else


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
def test_dense_rows_and_none_in_any_order(ranks, in_arena):
    # Integers, so sums are exact. Every order of kinds over three micro-batches, each for one variable.
    kinds = [(a, b, c) for a in "dr-" for b in "dr-" for c in "dr-"]

    def gradient(kind, factor, variable):
        if kind == "-":
            return None
        if kind == "d":
            return np.full((3, 2), factor)
        return IndexedSlices(np.full((2, 2), factor), np.array([1, 1]), variable.shape)

    def run(communicator):
        made = [Variable(np.zeros((3, 2)), name="".join(kind)) for kind in kinds]
        if in_arena:
            Arena(made)
        aggregator = Accumulate(AllReduce(communicator, "sum", 256), 3)
        found = []
        for round_ in range(2):  # again, with what the first left in buffers
            for number in range(3):
                factor = 10.0**number * (communicator.rank + 1) + round_
                pairs = [(gradient(kind[number], factor, v), v) for kind, v in zip(kinds, made, strict=True)]
                if in_arena:
                    for variable in made:
                        variable.gradient[...] = 99.0  # backward would have left something
                pairs = aggregator.reduce(pairs)
                assert aggregator.ready == (number == 2)
                assert number == 2 or all(g is None for g, _ in pairs)
            for g, variable in pairs:
                dense = g.to_dense() if isinstance(g, IndexedSlices) else g
                found.append(
                    (isinstance(g, IndexedSlices), None if g is None else dense.tolist(), variable.name)
                )
        return found

    expected = []
    for round_ in range(2):
        for kind in kinds:
            total = np.zeros((3, 2))
            for number, letter in enumerate(kind):
                factor = sum(10.0**number * (rank + 1) + round_ for rank in range(ranks))
                total += {"d": factor, "r": [[0.0], [2 * factor], [0.0]], "-": 0.0}[letter]
            sparse = "r" in kind and "d" not in kind
            expected.append((sparse, None if set(kind) == {"-"} else total.tolist(), "".join(kind)))
    assert world(ranks, run) == [expected] * ranks


@pytest.mark.parametrize("in_arena", [True, False])
def test_minimize_through_a_tape_counts_updates_and_not_micro_batches(in_arena):
    def run(communicator):
        w = Variable(np.zeros(2, "f4"), name="w")
        if in_arena:
            Arena([w])
        aggregator = Accumulate(AllReduce(communicator), 2)
        rate = PiecewiseConstantDecay([1], [1.0, 0.5])  # changes after the second update
        optimizer = SGD(rate, gradient_aggregator=aggregator)
        history = []
        for number in range(1, 7):
            n = number if communicator.rank == 0 else 0
            rows = np.full((n, 2), number, "f4")
            before = communicator.sequence
            optimizer.minimize(lambda rows=rows: ops.reduce_sum(w * rows), [w], examples=n)
            history.append((communicator.sequence > before, int(optimizer.iterations)))
        return history, w.numpy().tolist()

    # Means over the examples of both ranks: (1 + 4) / 3, (9 + 16) / 7, (25 + 36) / 11.
    moved = -(5 / 3 + 25 / 7 + 0.5 * 61 / 11)
    for history, values in world(2, run):
        assert history == [(False, 0), (True, 1), (False, 1), (True, 2), (False, 2), (True, 3)]
        np.testing.assert_allclose(values, [moved, moved], rtol=1e-6)


@pytest.mark.parametrize("in_arena", [True, False])
def test_a_loss_scale_changes_between_accumulations_only(in_arena):
    def run(communicator):
        w = Variable(np.zeros(2, "f4"), name="w")
        if in_arena:
            Arena([w])
        inner = SGD(1.0, gradient_aggregator=Accumulate(AllReduce(communicator), 3))
        optimizer = LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=1)
        history = []
        for number in range(9):
            factor = np.ones(2, "f4")
            if number == 4 and communicator.rank == 1:
                factor[1] = np.inf
            optimizer.minimize(lambda f=factor: ops.reduce_sum(w * f), [w], examples=1)
            history.append((optimizer.loss_scale, w.numpy()[0]))
        return history

    scales = [8, 8, 16, 16, 16, 8, 8, 8, 16]
    values = [0, 0, -1, -1, -1, -1, -1, -1, -2]
    assert world(2, run) == [list(zip(scales, values, strict=True))] * 2


def test_optimize_loss_reports_the_mean_over_the_micro_batches():
    def run(communicator):
        w = Variable(np.zeros(2, "f4"), name="w")
        train_op = optimize_loss(
            lambda x: ops.reduce_sum(w * x) + ops.reduce_sum(x),
            None,
            1.0,
            SGD,
            gradient_aggregator=Accumulate(AllReduce(communicator), 2),
            variables=[w],
            examples=len,
        )
        losses = [float(train_op(np.full((n, 2), n, "f4"))) for n in (1, 3 - communicator.rank)]
        return losses[1], w.numpy().tolist()

    # Rows 1 and 1, 3 of threes and 2 of twos: 7 examples with the sum 1 + 1 + 9 + 4 in each column.
    for loss, values in world(2, run):
        assert loss == pytest.approx(2 * 15 / 7, rel=1e-6)
        np.testing.assert_allclose(values, [-15 / 7] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("before", "after"), [(1, 1), (2, 2), (3, 3), (4, 4), (3, 2), (2, 4), (4, 1), (1, 3)]
)
@pytest.mark.parametrize("in_arena", [True, False])
def test_a_checkpoint_within_an_accumulation_keeps_the_exact_sums(before, after, in_arena):
    # Dyadic numbers, so that sums are exact in any order.
    def variables():
        made = [Variable(np.zeros(2), name="w"), Variable(np.zeros((3, 1)), name="table")]
        made.append(Variable(np.zeros(1), name="unused"))
        if in_arena:
            Arena(made)
        return made

    def pairs(made, step, rank):
        n = (rank + step) % 3  # some have none
        rows = IndexedSlices(np.full((n, 1), step + rank / 4), np.full(n, n - 1 if n else 0), (3, 1))
        return [(np.full(2, n * (0.5 + step)) if n else None, made[0]), (rows, made[1]), (None, made[2])], n

    def numbers(reduced):
        return [g.to_dense() if isinstance(g, IndexedSlices) else g for g, _ in reduced]

    def first(communicator):
        made, aggregator = variables(), Accumulate(AllReduce(communicator), 4)
        for step in range(6):
            given, n = pairs(made, step, communicator.rank)
            aggregator.reduce(given, Ticket(examples=n, loss=n / 2))
        state = aggregator.state()
        return state, numbers(aggregator.flush()), aggregator.ticket

    saved, expected, total = world(before, first)[0]

    def second(communicator):
        made, aggregator = variables(), Accumulate(AllReduce(communicator), 4)
        aggregator.load_state(saved, made)
        assert aggregator.micro_batches == 2
        return numbers(aggregator.flush()), aggregator.ticket

    for found, ticket in world(after, second):
        assert (ticket.examples, ticket.loss) == (total.examples, total.loss)
        for own, whole in zip(found, expected, strict=True):
            np.testing.assert_array_equal(own, whole)


def test_at_a_multiple_of_steps_a_checkpoint_holds_nothing_of_it():
    with connect("local") as communicator:
        made = cases.variables(True)
        aggregator = Accumulate(AllReduce(communicator), 2)
        for step in range(2):
            aggregator.reduce(*_given(made, step))
        assert aggregator.state() == {}


def _given(made, step):
    pairs, examples = cases.pairs_of(made, step, 0, 1)
    return pairs, Ticket(examples=examples)


@pytest.mark.parametrize("ranks", RANKS)
def test_it_composes_with_local_and_delayed_aggregation(ranks):
    def run(communicator):
        ends = []
        for inner in (LocalSGD(communicator, 2), Delayed(AllReduce(communicator))):
            made = cases.variables(True)
            aggregator = Accumulate(inner, 2)
            optimizer = SGD(cases.RATE, gradient_aggregator=aggregator)
            for step in range(8):
                pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
                optimizer.apply_gradients(pairs, examples=examples)
            optimizer.apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)
            ends.append((np.concatenate(cases.state_of(made)), optimizer.step))
        return ends

    start = np.append(np.linspace(-1, 1, 3), 0.0)
    batches = {
        (rank, update): tuple(
            np.concatenate(parts)
            for parts in zip(*(cases.batch(2 * update + i, rank, ranks) for i in range(2)), strict=True)
        )
        for rank in range(ranks)
        for update in range(4)
    }
    local = np.tile(start, (ranks, 1))
    seen = np.zeros(ranks)
    for update in range(4):
        for rank in range(ranks):
            x, y = batches[rank, update]
            if len(y):
                own = np.concatenate(cases.gradient(local[rank, :3], local[rank, 3:], x, y))
                local[rank] -= cases.RATE * own / len(y)
            seen[rank] += len(y)
        if update % 2:
            local[:] = seen @ local / seen.sum()
            seen[:] = 0
    delayed, pending = start.copy(), 0.0
    for update in range(5):
        due = pending
        if update < 4:
            parts = [batches[rank, update] for rank in range(ranks)]
            sums = sum(np.concatenate(cases.gradient(delayed[:3], delayed[3:], x, y)) for x, y in parts)
            pending = sums / sum(len(y) for _, y in parts)
        delayed = delayed - cases.RATE * due
    for (of_local, _), (of_delayed, steps) in world(ranks, run):
        np.testing.assert_allclose(of_local, local[0], rtol=1e-12)
        np.testing.assert_allclose(of_delayed, delayed, rtol=1e-12)
        assert steps == 4


def test_an_error_in_a_micro_batch_is_raised_on_all_ranks_at_the_exchange():
    def run(communicator):
        made = cases.variables(True)
        aggregator = Accumulate(AllReduce(communicator), 2)
        failing = communicator.rank == 1
        own = Ticket(examples=1, error=float(failing), reason="no disk" if failing else "")
        aggregator.reduce([(v.numpy(), v) for v in made], own)
        with pytest.raises(CommunicatorError, match=r"rank 1 on .*: no disk"):
            aggregator.reduce([(v.numpy(), v) for v in made], Ticket(examples=1))
        return True

    assert world(3, run) == [True] * 3


def test_what_the_caller_gives_is_left_as_it_is():
    with connect("local") as communicator:
        w = Variable(np.zeros(2), name="w")
        aggregator = Accumulate(AllReduce(communicator, "sum"), 2)
        gradient, ticket = np.ones(2), Ticket(examples=1)
        aggregator.reduce([(gradient, w)], ticket)
        gradient[:] = 7.0  # the caller's next
        ((found, _),) = aggregator.reduce([(gradient, w)], ticket)
        assert found.tolist() == [8.0, 8.0]
        assert gradient.tolist() == [7.0, 7.0]
        assert ticket == Ticket(examples=1)
        assert aggregator.ticket.examples == 2


def test_wrong_use_is_refused():
    with connect("local") as communicator:
        w = Variable(np.zeros(2), name="w")
        with pytest.raises(ValueError, match="micro-batches, steps, must be at least 1, got 0"):
            Accumulate(AllReduce(communicator), 0)
        with pytest.raises(TypeError, match="Accumulate needs an aggregator"):
            Accumulate(list, 2)
        aggregator = Accumulate(AllReduce(communicator), 2)
        with pytest.raises(ValueError, match="examples of all micro-batches"):
            aggregator.reduce([(np.ones(2), w)])
        with pytest.raises(ValueError, match="is not that of Accumulate"):
            aggregator.load_state({"ready": np.array(1)}, [w])
        state = {"calls": np.array(2), "ticket": np.zeros(7)}
        with pytest.raises(ValueError, match="has 2 micro-batches kept, but Accumulate exchanges every 2"):
            aggregator.load_state(state, [w])
