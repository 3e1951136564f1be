"""Disagreements between ranks, ranks that run out of data and reports of errors, under mpirun."""

import sys
from pathlib import Path

import numpy as np
import pytest
import training

from distopt import broadcast_variables
from distopt.aggregators import AllReduce, Ticket, locate_not_finite
from distopt.communicators import connect
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD

sys.path.insert(0, str(Path(__file__).parents[1] / "aggregators"))

from disagreements import ANYWHERE, CONFIGURATIONS, IN_ARENA, is_usable, model, step
from joining import BATCHES, batches_of, train, union


def _refused_on_all_ranks(communicator, function):
    with pytest.raises(CommunicatorError) as caught:
        function()
    message = str(caught.value)
    assert communicator.all_gather_object(message) == [message] * communicator.size
    assert is_usable(communicator)
    return message


def _wrong_ranks(communicator, kind="shape"):
    """Which ranks are made to differ, one after the other: each in one case, the first and last in others."""
    if communicator.size == 1:
        return []
    return range(communicator.size) if kind == "shape" else [0, communicator.size - 1]


@pytest.mark.parametrize("kind", [*ANYWHERE, *IN_ARENA])
def test_the_first_step_names_the_variable_and_the_rank(communicator, kind):
    for wrong in _wrong_ranks(communicator, kind):
        own = model(kind if communicator.rank == wrong else None, arena=True)
        message = _refused_on_all_ranks(communicator, lambda own=own: step(communicator, own))
        host = communicator.all_gather_object(communicator.host)[wrong or 1]
        assert message.startswith(f"rank {wrong or 1} on {host} has other variables than rank 0: ")
        if wrong:
            assert {**ANYWHERE, **IN_ARENA}[kind].removesuffix(" there") in message


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_other_arguments_of_the_aggregator_are_named(communicator, kind):
    given, words = CONFIGURATIONS[kind]
    for wrong in _wrong_ranks(communicator, kind):
        own = given if communicator.rank == wrong else {}
        message = _refused_on_all_ranks(
            communicator, lambda own=own: step(communicator, model(arena=True), **own)
        )
        assert f"rank {wrong or 1} on " in message
        assert words in message


@pytest.mark.parametrize("kind", ["one less", "one more", "none", "shape", "step"])
def test_a_difference_at_a_later_step_is_found_then(communicator, kind):
    for wrong in _wrong_ranks(communicator, kind):
        variables, aggregator = model(arena=True), None
        for _ in range(5):
            aggregator = step(communicator, variables, aggregator)
        number = None
        if communicator.rank == wrong:
            other = {"one less": variables[:-1], "none": [], "step": variables}
            variables = other.get(kind) if kind in other else [*variables, *model("shape")[2:3]]
            number = 77 if kind == "step" else None
        message = _refused_on_all_ranks(
            communicator,
            lambda own=variables, aggregator=aggregator, number=number: step(
                communicator, own, aggregator, number=number
            ),
        )
        words = "is at step" if kind == "step" else "has other variables than rank 0"
        assert f"rank {wrong or 1} on " in message
        assert words in message


def test_a_rank_that_can_t_do_its_step_lets_all_raise_with_its_reason(communicator):
    variables, aggregator = model(arena=True), None
    aggregator = step(communicator, variables, aggregator)
    for wrong in range(communicator.size):
        bad = communicator.rank == wrong
        ticket = Ticket(error=1.0, reason="image 17 is broken") if bad else Ticket(examples=2.0)
        pairs = [(None if bad else np.ones(v.shape, "f4"), v) for v in variables]
        message = _refused_on_all_ranks(
            communicator, lambda pairs=pairs, ticket=ticket: aggregator.reduce(pairs, ticket)
        )
        assert f"rank {wrong} on " in message
        assert message.endswith(": image 17 is broken")


def test_broadcasting_other_variables_is_refused_on_all_ranks(communicator):
    for wrong in _wrong_ranks(communicator):
        own = model("shape" if communicator.rank == wrong else None)
        message = _refused_on_all_ranks(communicator, lambda own=own: broadcast_variables(own, communicator))
        assert f"rank {wrong or 1} on " in message
        assert "'w2'" in message


def test_what_is_not_finite_is_found_by_rank_variable_and_element(communicator):
    last = communicator.size - 1
    pairs = [(np.ones(v.shape, "f4"), v) for v in model()]
    if communicator.rank == last:
        pairs[2][0][3, 1] = np.nan
    (place,) = locate_not_finite(pairs, communicator)
    assert (place.rank, place.variable, place.index) == (last, "w2", (3, 1))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("arena", [True, False])
def test_ranks_that_run_out_of_data_train_as_one_process_on_the_union(communicator, arena, linear):
    def make(**options):
        return SGD(0.05, momentum=0.9, **options)

    counts, rank = BATCHES[communicator.size], communicator.rank
    for seed in range(2):
        found, rounds = train(communicator, batches_of(rank, counts[rank], seed), make, arena, linear)
        with connect("local") as alone:
            expected, _ = train(alone, union(counts, seed), make, arena, linear)
        assert rounds == max(counts)
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(value, wanted, rtol=0 if linear else 1e-12)


def test_a_step_without_examples_is_left_out_on_all_ranks(communicator):
    variables = model(arena=True)
    optimizer = SGD(0.5, momentum=0.9, gradient_aggregator=AllReduce(communicator))
    optimizer.apply_gradients([(np.ones(v.shape, "f4"), v) for v in variables], examples=1)
    before = [v.numpy() for v in variables] + optimizer.get_weights()
    optimizer.apply_gradients([(None, v) for v in variables], examples=0)
    for value, wanted in zip([v.numpy() for v in variables] + optimizer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, wanted)


def test_an_error_in_one_rank_s_input_raises_on_all(communicator):
    for wrong in _wrong_ranks(communicator):
        made = training.trainer(communicator, steps=5)
        make = made._make_batches

        def failing(step, make=make, wrong=wrong):
            if step == 2 and communicator.rank == wrong:
                raise OSError("file 7 is gone")
            return make(step)

        made._make_batches = failing
        message = _refused_on_all_ranks(communicator, lambda made=made: training.run(made))
        assert message.startswith(f"step 2 can't be done: rank {wrong} on ")
        assert message.endswith(": its input failed: OSError: file 7 is gone")
