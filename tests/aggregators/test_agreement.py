"""What differs between ranks is named on every rank, and the communicator can still be used."""

import numpy as np
import pytest
from disagreements import ANYWHERE, CONFIGURATIONS, IN_ARENA, is_usable, model, step

from distopt import broadcast_variables
from distopt.aggregators import AllReduce, Ticket, first_not_finite, locate_not_finite
from distopt.communicators import connect
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

HOSTS = ["alpha", "beta", "gamma", "delta"]
RANKS_AND_WRONG = [(ranks, wrong) for ranks in (2, 3, 4) for wrong in range(ranks)]


def _messages(ranks, run):
    """Return each rank's message; `run` returns it, and whether the communicator is usable afterwards."""
    found = world(ranks, run, hosts=HOSTS[:ranks])
    assert all(usable for _, usable in found)
    return [message for message, _ in found]


def _refused(communicator, function):
    with pytest.raises(CommunicatorError) as caught:
        function()
    return str(caught.value), is_usable(communicator)


def _blamed(wrong):
    """Which rank a message names as the other one: rank 0 is what the others are compared with."""
    return f"rank {wrong or 1} on {HOSTS[wrong or 1]} "


@pytest.mark.parametrize(("ranks", "wrong"), RANKS_AND_WRONG)
@pytest.mark.parametrize(
    ("kind", "arena"),
    [*((kind, False) for kind in ANYWHERE), *((kind, True) for kind in {**ANYWHERE, **IN_ARENA})],
)
def test_the_first_step_names_the_variable_and_the_rank(kind, arena, ranks, wrong):
    def run(communicator):
        own = model(kind if communicator.rank == wrong else None, arena)
        return _refused(communicator, lambda: step(communicator, own))

    for message in _messages(ranks, run):
        assert message.startswith(f"{_blamed(wrong)}has other variables than rank 0: "), message
        if wrong:
            assert {**ANYWHERE, **IN_ARENA}[kind] in message
        if kind not in ("none", "one less", "one more"):
            words = ({**ANYWHERE, **IN_ARENA}[kind].split(" is ")[0], "there and", "on rank 0")
            assert all(word in message for word in words)


@pytest.mark.parametrize(("ranks", "wrong"), RANKS_AND_WRONG)
@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_other_arguments_of_the_aggregator_are_named(kind, ranks, wrong):
    given, words = CONFIGURATIONS[kind]

    def run(communicator):
        own = given if communicator.rank == wrong else {}
        return _refused(communicator, lambda: step(communicator, model(arena=True), **own))

    for message in _messages(ranks, run):
        assert message.startswith(f"{_blamed(wrong)}aggregates by "), message
        assert words in message


@pytest.mark.parametrize(("ranks", "wrong"), RANKS_AND_WRONG)
@pytest.mark.parametrize("first", [0, 3])
def test_another_step_number_is_named(ranks, wrong, first):
    def run(communicator):
        aggregator, variables = None, model(arena=True)
        for number in range(first):
            aggregator = step(communicator, variables, aggregator, number=10 + number)
        own = 7 if communicator.rank == wrong else 10 + first
        return _refused(communicator, lambda: step(communicator, variables, aggregator, number=own))

    for message in _messages(ranks, run):
        there, here = (7, 10 + first) if wrong else (10 + first, 7)
        assert message.startswith(f"{_blamed(wrong)}is at step {there}, rank 0 at step {here}: ")


@pytest.mark.parametrize(("ranks", "wrong"), RANKS_AND_WRONG)
@pytest.mark.parametrize("kind", ["one less", "one more", "none", "shape"])
@pytest.mark.parametrize("arena", [True, False])
def test_a_difference_at_a_later_step_is_found_then(kind, ranks, wrong, arena):
    def run(communicator):
        variables = model(arena=arena)
        aggregator = None
        for _ in range(5):
            aggregator = step(communicator, variables, aggregator)
        if communicator.rank == wrong:
            extra = Variable(np.zeros(1, "f4"), name="extra")
            others = {"one less": variables[:-1], "one more": [*variables, extra], "none": []}
            variables = others[kind] if kind in others else model("shape", arena)
        return _refused(communicator, lambda: step(communicator, variables, aggregator))

    for message in _messages(ranks, run):
        assert message.startswith(f"{_blamed(wrong)}has other variables than rank 0: ")
        if wrong:
            assert ANYWHERE[kind] in message.replace(
                " in an arena (slab 0 of 256 elements, from element 0)", ""
            )


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_whole_arena_that_one_rank_leaves_out_later_does_not_hang_the_others(ranks):
    # The others have started the reduction of its buckets when the difference is found.
    def run(communicator):
        first, second = model(arena=True), [Variable(np.zeros(300, "f4"), name="other")]
        Arena(second)
        aggregator = None
        for _ in range(3):
            aggregator = step(communicator, [*first, *second], aggregator)
        own = second if communicator.rank == 1 else [*first, *second]
        return _refused(communicator, lambda: step(communicator, own, aggregator))

    for message in _messages(ranks, run):
        assert "1 variables there and 5 on rank 0" in message or "variable 0 is 'other'" in message


def test_two_models_may_take_turns_with_one_aggregator():
    # As the two networks of an adversarial pair do: no step may be mixed up with the one before.
    def run(communicator):
        first, second = model(arena=True), [Variable(np.zeros(300, "f4"), name="other")]
        Arena(second)
        aggregator = AllReduce(communicator, "sum", 64)
        for number in range(6):
            own = second if number % 2 else first
            reduced = aggregator.reduce([(np.full(v.shape, number + 1.0, "f4"), v) for v in own])
            assert all((g == communicator.size * (number + 1)).all() for g, _ in reduced)
            # From the third step on nothing of the other model is sent along.
            if number > 1:
                buckets = own[0].slab.gradients.nbytes // 64
                assert aggregator.wire_bytes == buckets * (2 * 2 * 64 // 3)
        return True

    assert world(3, run) == [True] * 3


@pytest.mark.parametrize(("ranks", "wrong"), [(1, 0), *RANKS_AND_WRONG])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("arena", [True, False])
def test_a_rank_that_can_t_do_its_step_lets_all_raise_with_its_reason(ranks, wrong, steps_before, arena):
    def run(communicator):
        variables, aggregator = model(arena=arena), AllReduce(communicator, "mean", 64)
        for _ in range(steps_before):
            step(communicator, variables, aggregator)
        ticket = Ticket(examples=3.0)
        pairs = [(np.ones(v.shape, "f4"), v) for v in variables]
        if communicator.rank == wrong:
            ticket = Ticket(error=1.0, reason="image 17 is broken")
            pairs = [(None, v) for v in variables]
        return _refused(communicator, lambda: aggregator.reduce(pairs, ticket))

    for message in _messages(ranks, run):
        assert message == (
            f"step {steps_before} can't be done: rank {wrong} on {HOSTS[wrong]}: image 17 is broken"
        )


def test_several_reasons_are_all_told():
    def run(communicator):
        ticket = Ticket(error=float(communicator.rank > 0), reason=f"no {communicator.rank}")
        variables = model()
        pairs = [(None, v) for v in variables]
        return _refused(communicator, lambda: AllReduce(communicator).reduce(pairs, ticket))

    for message in _messages(3, run):
        assert message == "step 0 can't be done: rank 1 on beta: no 1; rank 2 on gamma: no 2"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_know_the_sums_and_where_it_is_not_finite(ranks):
    def run(communicator):
        rank = communicator.rank
        ticket = Ticket(
            examples=rank + 0.25,
            loss=2.0**rank,
            correct=rank,
            stop=float(rank == 1),
            preempt=float(rank == 2),
        )
        if rank == ranks - 1:
            ticket.not_finite, ticket.where = 1.0, "3 of its images are not finite"
        aggregator = AllReduce(communicator, "sum")
        aggregator.reduce([(np.float32(1), v) for v in [Variable(0.0, name="v")]], ticket)
        return aggregator.ticket

    expected = Ticket(
        examples=sum(r + 0.25 for r in range(ranks)),
        loss=2.0**ranks - 1,
        correct=sum(range(ranks)),
        not_finite=1.0,
        stop=float(ranks > 1),
        preempt=float(ranks > 2),
        step=0,
        where=f"rank {ranks - 1} on {HOSTS[ranks - 1]}: 3 of its images are not finite",
    )
    assert world(ranks, run, hosts=HOSTS[:ranks]) == [expected] * ranks


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), float("-inf"), -0.001])
def test_a_number_of_examples_that_is_none_is_refused_where_it_is_given(wrong):
    with pytest.raises(ValueError, match="examples must be 0 or more and finite, got "):
        Ticket(examples=wrong)
    changed = Ticket()
    changed.examples = wrong
    with connect("local") as communicator, pytest.raises(ValueError, match="examples must be 0 or more"):
        AllReduce(communicator).reduce([(np.float32(1), Variable(0.0))], changed)
    with connect("local") as communicator:
        optimizer = SGD(gradient_aggregator=AllReduce(communicator))
    with pytest.raises(ValueError, match="examples must be 0 or more"):
        optimizer.apply_gradients([(np.float32(1), Variable(0.0))], examples=wrong)


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found_by_rank_variable_and_element(wrong, value):
    def run(communicator):
        variables = model()
        pairs = [(np.ones(v.shape, "f4"), v) for v in variables]
        if communicator.rank == wrong:
            pairs[1] = (None, variables[1])
            pairs[2][0][2:, 1] = value
            pairs[3][0][0] = value
        return locate_not_finite(reversed(pairs), communicator)

    for found in world(3, run, hosts=HOSTS[:3]):
        (place,) = found
        assert (place.rank, place.host, place.variable, place.index) == (wrong, HOSTS[wrong], "w2", (2, 1))
        assert str(place) == (
            f"rank {wrong} on {HOSTS[wrong]}: the gradient of 'w2' is {value} at element [2, 1] "
            "(2 of its elements are not finite)"
        )


def test_each_rank_s_own_place_is_told_and_rows_are_counted_in_the_whole():
    def run(communicator):
        table = Variable(np.zeros((9, 2), "f4"), name="table")
        values = np.ones((2, 2), "f4")
        if communicator.rank != 1:
            values[1, communicator.rank % 2] = np.inf
        pairs = [(IndexedSlices(values, [4, 7], (9, 2)), table)]
        return [(p.rank, p.index) for p in locate_not_finite(pairs, communicator)]

    assert world(4, run) == [[(0, (7, 0)), (2, (7, 0)), (3, (7, 1))]] * 4


def test_finite_gradients_have_no_such_place():
    variables = model()
    assert first_not_finite([(np.ones(v.shape), v) for v in variables]) is None
    assert world(2, lambda c: locate_not_finite([(None, v) for v in variables], c)) == [[], []]
    huge = np.array(3e38, "f4")  # a sum of float32 squares would overflow
    assert first_not_finite([(huge, Variable(0.0))]) is None


@pytest.mark.parametrize(("ranks", "wrong"), RANKS_AND_WRONG)
@pytest.mark.parametrize("kind", ["shape", "transposed", "dtype", "order", "one more", "one less", "none"])
def test_broadcasting_names_the_first_other_variable_on_every_rank(kind, ranks, wrong):
    def run(communicator):
        own = model(kind if communicator.rank == wrong else None)
        return _refused(communicator, lambda: broadcast_variables(own, communicator))

    for message in _messages(ranks, run):
        assert message.startswith(_blamed(wrong)), message
        assert wrong == 0 or ANYWHERE[kind].removesuffix(" there").split("; ")[-1] in message
        assert "build the same model" in message.lower()


def test_reductions_under_way_end_before_a_step_is_refused():
    # Else they would write into the arena later, or be matched with another step's.
    def run(communicator):
        variables, aggregator = model(arena=True), None
        for _ in range(2):
            aggregator = step(communicator, variables, aggregator)
        wrong = communicator.rank == 1
        pairs = [(None if wrong else np.ones(v.shape, "f4"), v) for v in variables]
        with pytest.raises(CommunicatorError):
            aggregator.reduce(pairs, Ticket(error=float(wrong), reason="broken"))
        return [float(v.gradient.max()) for v in variables]

    assert world(3, run) == [[2.0] * 4] * 3
