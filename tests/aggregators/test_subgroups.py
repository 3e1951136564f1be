"""Aggregation in subgroups of a world of threads; under mpirun: test_strategies_mpi.py."""

import numpy as np
import pytest
import strategies_cases as cases

from distopt import ops
from distopt.aggregators import AllReduce, Delayed, Grouped, LocalSGD, Ticket
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import world
from distopt.variables import Arena, Variable

RANKS = [2, 3, 4, 8]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
def test_two_groups_train_different_models_at_the_same_time(ranks, in_arena):
    # Models of other sizes, groups of other sizes, and other numbers of steps.
    def run(communicator):
        color = int(communicator.rank >= (ranks + 1) // 2)
        group = communicator.split(color)
        names = ["w"] if color else ["w", "b"]
        made = [Variable(np.zeros(3 + color, "f4"), name=name) for name in names]
        if in_arena:
            Arena(made)
        optimizer = SGD(1.0, gradient_aggregator=AllReduce(group))
        for step in range(3 + 4 * color):
            rows = np.full((group.rank + step % 2, 3 + color), communicator.rank, "f4")
            optimizer.minimize(
                lambda rows=rows: ops.add_n([ops.reduce_sum(v * rows) for v in made]),
                made,
                examples=len(rows),
            )
        return [v.numpy().tolist() for v in made], optimizer.step

    def expected(members, size, variables, steps):
        moved, done = 0.0, 0
        for step in range(steps):
            counts = [number + step % 2 for number in range(len(members))]
            if sum(counts):
                moved -= sum(n * rank for n, rank in zip(counts, members, strict=True)) / sum(counts)
                done += 1
        return [[moved] * size] * variables, done

    half = (ranks + 1) // 2
    first, second = expected(range(half), 3, 2, 3), expected(range(half, ranks), 4, 1, 7)
    for rank, (values, steps) in enumerate(world(ranks, run)):
        wanted, done = first if rank < half else second
        assert steps == done
        for own, other in zip(values, wanted, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-5)


def body_and_head(in_arena):
    body, head = Variable(np.zeros(3, "f4"), name="body"), Variable(np.zeros(2, "f4"), name="head")
    if in_arena:
        Arena([body])
        Arena([head])
    return body, head


def choose(variable):
    return "group" if variable.name == "head" else "world"


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
def test_a_rank_shares_some_variables_with_all_and_some_with_its_group(ranks, in_arena):
    def run(communicator):
        group = communicator.split(communicator.rank % 2)
        body, head = body_and_head(in_arena)
        aggregator = Grouped({"world": AllReduce(communicator), "group": AllReduce(group)}, choose)
        optimizer = SGD(1.0, gradient_aggregator=aggregator)
        for _ in range(2):
            n = communicator.rank  # rank 0 has no examples
            factor = np.float32(communicator.rank + 1)
            optimizer.minimize(
                lambda f=factor, n=n: (ops.reduce_sum(body) + ops.reduce_sum(head)) * f * np.float32(n),
                [head, body],
                examples=n,
            )
        assert aggregator.ticket.examples == sum(range(ranks))
        return body.numpy().tolist(), head.numpy().tolist()

    def mean(members):
        return -2 * sum(n * (n + 1) for n in members) / max(1, sum(members))

    results = world(ranks, run)
    for rank, (body, head) in enumerate(results):
        np.testing.assert_allclose(body, [mean(range(ranks))] * 3, rtol=1e-6)
        # With two ranks, group 0 is rank 0 alone, and has no example.
        np.testing.assert_allclose(head, [mean(range(rank % 2, ranks, 2))] * 2, rtol=1e-6)


@pytest.mark.parametrize("in_arena", [True, False])
def test_the_same_by_two_optimizers_by_hand(in_arena):
    def run(communicator):
        group = communicator.split(communicator.rank % 2)
        ends = []
        for grouped in (True, False):
            body, head = body_and_head(in_arena)
            inner = {"world": AllReduce(communicator), "group": AllReduce(group)}
            if grouped:
                optimizers = [(SGD(0.5, 0.9, gradient_aggregator=Grouped(inner, choose)), [body, head])]
            else:
                optimizers = [
                    (SGD(0.5, 0.9, gradient_aggregator=inner["world"]), [body]),
                    (SGD(0.5, 0.9, gradient_aggregator=inner["group"]), [head]),
                ]
            for step in range(3):
                for optimizer, variables in optimizers:
                    pairs = [(np.full(v.shape, step + communicator.rank), v) for v in variables]
                    optimizer.apply_gradients(pairs, examples=communicator.rank + 1)
            ends.append((body.numpy().tolist(), head.numpy().tolist()))
        return ends

    for grouped, by_hand in world(4, run):
        assert grouped == by_hand


def test_a_disagreement_within_a_group_names_the_rank_and_leaves_the_other_group_alone():
    def run(communicator):
        group = communicator.split(communicator.rank % 2)
        w = Variable(np.zeros(2 + (communicator.rank == 3)), name="w")
        aggregator = AllReduce(group)
        try:
            aggregator.reduce([(w.numpy(), w)], Ticket(examples=1))
        except CommunicatorError as error:
            return str(error)
        return aggregator.ticket.examples

    found = world(4, run)
    assert found[0] == found[2] == 2.0
    for message in (found[1], found[3]):
        assert "rank 1 on " in message
        assert " in group world/1.1 has" in message  # whose ranks these are: the first split, color 1
        assert "other variables than rank 0" in message


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_state_of_groups_is_kept_by_name(ranks):
    def make(communicator, group):
        inner = {"world": Delayed(AllReduce(communicator)), "group": Delayed(AllReduce(group))}
        return Grouped(inner, choose)

    def run(communicator):
        group = communicator.split(communicator.rank % 2)
        body, head = body_and_head(True)
        aggregator = make(communicator, group)
        own = np.full(3, communicator.rank + 1.0), np.full(2, communicator.rank + 1.0)
        pairs = aggregator.reduce(list(zip(own, (body, head), strict=True)), Ticket(examples=1))
        assert [g for g, _ in pairs] == [None, None]
        assert not aggregator.ready
        other = make(communicator, group)
        other.load_state(aggregator.state(), [body, head])
        return [g.tolist() for g, _ in other.flush()], other.ready

    means = [np.mean(np.arange(1, ranks + 1)), *(np.mean(np.arange(1 + c, ranks + 1, 2)) for c in (0, 1))]
    for rank, (found, ready) in enumerate(world(ranks, run)):
        assert ready
        assert found == [[means[0]] * 3, [means[1 + rank % 2]] * 2]


def test_wrong_groups_are_refused():
    def run(communicator):
        shared = AllReduce(communicator)
        with pytest.raises(ValueError, match="at least one aggregator, all of one reduction"):
            Grouped({"a": shared, "b": AllReduce(communicator, "sum")}, choose)
        with pytest.raises(TypeError, match=r"Grouped can't hold LocalSGD \('b'\)"):
            Grouped({"a": shared, "b": LocalSGD(communicator, 2)}, choose)
        body, head = (Variable(np.zeros(2), name=name) for name in ("body", "head"))
        Arena([body, head])
        aggregator = Grouped({"world": shared, "group": AllReduce(communicator)}, choose)
        with pytest.raises(ValueError, match="one arena has 'body' of 'world' and 'head' of 'group'"):
            aggregator.reduce([(np.ones(2), body), (np.ones(2), head)], Ticket(examples=1))
        with pytest.raises(
            ValueError, match=r"choose named 'group' for variable 'head'; there are \['world'\]"
        ):
            Grouped({"world": shared}, choose).reduce([(np.ones(2), head)], Ticket(examples=1))
        return True

    assert world(1, run) == [True]


def test_subgroups_of_local_sgd_average_within_the_group_only():
    def run(communicator):
        group = communicator.split(communicator.rank % 2)
        made = cases.variables(True)
        optimizer = SGD(1.0, gradient_aggregator=LocalSGD(group, 2))
        for _ in range(2):
            pairs = [(np.full(v.shape, communicator.rank + 1.0), v) for v in made]
            optimizer.apply_gradients(pairs, examples=1)
        return made[1].numpy().tolist()

    # Ranks 0 and 2 moved by 2 x 1 and 2 x 3, ranks 1 and 3 by 2 x 2 and 2 x 4.
    assert world(4, run) == [[-4.0], [-6.0]] * 2
