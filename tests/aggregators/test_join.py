"""Ranks that run out of data before the others, over ranks as threads."""

import time

import numpy as np
import pytest
from joining import BATCHES, batches_of, train, union

from distopt.aggregators import AllReduce, in_step
from distopt.communicators import connect
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD, Adam, tf1
from distopt.testing import Fault, world
from distopt.variables import Variable

MAKERS = {
    "SGD": lambda **options: SGD(0.05, momentum=0.9, **options),
    "Adam": lambda **options: Adam(0.05, **options),
    "tf1": lambda **options: tf1.MomentumOptimizer(0.05, 0.9, **options),
}


@pytest.mark.parametrize("ranks", BATCHES)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_training_is_that_of_one_process_on_the_union(ranks, make, arena, linear, seed):
    counts = BATCHES[ranks]

    def run(communicator):
        rank = communicator.rank
        return train(communicator, batches_of(rank, counts[rank], seed), MAKERS[make], arena, linear)

    with connect("local") as alone:
        expected, rounds = train(alone, union(counts, seed), MAKERS[make], arena, linear)
    assert rounds == max(counts)
    for found, own_rounds in world(ranks, run):
        assert own_rounds == max(counts)
        for value, wanted in zip(found, expected, strict=True):
            if linear:  # sums of whole numbers, which no order rounds
                np.testing.assert_array_equal(value, wanted)
            else:
                np.testing.assert_allclose(value, wanted, rtol=1e-12)


def test_one_process_is_what_arithmetic_says():
    steps = union(BATCHES[4])
    w = np.array([1.0, -2.0, 0.5])
    for inputs, targets in steps:
        if len(targets):
            w = w - 0.5 * (inputs @ w - targets) @ inputs / len(targets)
    with connect("local") as alone:
        found, _ = train(alone, steps, lambda **options: SGD(0.5, **options), False, False)
    np.testing.assert_allclose(found[0], w, rtol=1e-12)


@pytest.mark.parametrize("slow", range(4))
def test_ranks_of_different_speed_take_the_same_steps(slow):
    counts = BATCHES[4]
    faults = [Fault("delay", slow, number, seconds=0.03) for number in (1, 2, 5, 9)]

    def run(communicator):
        rank = communicator.rank

        def slowly():
            for batch in batches_of(rank, counts[rank]):
                time.sleep(0.01 * ((rank + slow) % 3))
                yield batch

        return train(communicator, slowly(), MAKERS["SGD"], True, True)[0][0].tolist()

    with connect("local") as alone:
        expected = train(alone, union(counts), MAKERS["SGD"], True, True)[0][0].tolist()
    assert world(4, run, faults) == [expected] * 4


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 0], [0, 0, 2], [2, 2, 2]])
def test_each_rank_sees_its_own_batches_then_none(counts):
    def run(communicator):
        own = [f"{communicator.rank}:{n}" for n in range(counts[communicator.rank])]
        return list(in_step(own, communicator))

    for rank, found in enumerate(world(3, run)):
        own = [f"{rank}:{n}" for n in range(counts[rank])]
        assert found == own + [None] * (max(counts) - counts[rank])


def test_the_next_batch_is_asked_for_only_when_its_round_comes():
    asked = []

    def batches():
        for number in range(3):
            asked.append(number)
            yield number

    with connect("local") as communicator:
        rounds = in_step(batches(), communicator)
        assert (next(rounds), asked) == (0, [0])
        assert (next(rounds), asked) == (1, [0, 1])


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_an_error_in_one_rank_s_data_is_raised_on_all_with_its_cause(wrong):
    def run(communicator):
        def batches():
            yield 1
            if communicator.rank == wrong:
                raise OSError("file 7 is gone")
            yield 2

        seen = []
        with pytest.raises(CommunicatorError) as caught:
            seen.extend(iter(in_step(batches(), communicator)))
        usable = communicator.all_gather_object(communicator.rank)
        return str(caught.value), type(caught.value.__cause__), usable

    for rank, (message, cause, usable) in enumerate(world(3, run, hosts=["a", "b", "c"])):
        assert message == f"no next batch can be had: rank {wrong} on {'abc'[wrong]}: OSError: file 7 is gone"
        assert cause is (OSError if rank == wrong else type(None))
        assert usable == [0, 1, 2]


def test_without_it_ranks_with_fewer_batches_are_waited_for_in_vain():
    # The negative control: a plain loop over unequal numbers of batches can't end well.
    def run(communicator):
        optimizer = SGD(gradient_aggregator=AllReduce(communicator))
        w = Variable(np.zeros(2), name="w")
        for _ in range(2 + communicator.rank):
            optimizer.apply_gradients([(np.ones(2), w)], examples=1)

    with pytest.raises(CommunicatorError, match="rank 0 has returned"):
        world(2, run)
