"""What reviews of the communication engine found, so that it does not come back."""

import dataclasses

import numpy as np
import pytest
import training

from distopt import layers, scopes
from distopt.aggregators import AllReduce, Canonical, LocalSGD, Ticket
from distopt.checkpoint import latest
from distopt.errors import CommunicatorError, NonFiniteError
from distopt.testing import Fault, world
from distopt.variables import Arena, Variable


def test_local_steps_agree_that_a_gradient_of_one_rank_is_not_finite():
    told = []

    def run(communicator):
        made = training.trainer(communicator, local_steps=4, steps=8)
        with pytest.raises(NonFiniteError) as caught:
            training.run(made)
        told.append((made.step, "rank 1 on" in str(caught.value)))
        return communicator.all_gather_object(communicator.rank)

    # All raise at the same step, name the rank, and go on together.
    assert world(3, run, faults=[Fault("nan", 1, step=2)]) == [[0, 1, 2]] * 3
    assert told == [(1, True)] * 3


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["width", "another slab"])
def test_other_models_are_named_before_memory_is_shared(ranks, kind):
    def model(rank):
        def network(images):
            x = layers.flatten(images)
            units = 5 if kind == "width" and rank == 1 else 3
            x = layers.dense(x, units, name="logits")
            if kind == "another slab" and rank == 1:
                scopes.get_variable("extra", shape=(2,), dtype=np.float64)
            return x

        return network

    def run(communicator):
        task = dataclasses.replace(training.TASK, model=model(communicator.rank))
        with pytest.raises(CommunicatorError, match=r"rank 1 on .* has other variables than rank 0: .*entr"):
            training.trainer(communicator, task=task)
        return True

    assert world(ranks, run) == [True] * ranks


@pytest.mark.parametrize("replicas", [1, 2])
def test_repair_reaches_all_replicas_of_a_rank(replicas):
    def run(communicator, flips):
        settings = {"steps": 4, "drift_check_every": 1, "on_drift": "repair", "canonical": 6}
        made = training.trainer(communicator, replicas, **settings)
        if flips:
            before = made._apply

            def apply(pairs):
                before(pairs)
                if made.step == 1 and communicator.rank == 1:
                    for replica in made.replicas:
                        replica.variables[0].value.reshape(-1).view(np.uint32)[0] ^= 1 << 20

            made._apply = apply
        return training.run(made).digest()

    clean = world(3, lambda communicator: run(communicator, False))
    assert world(3, lambda communicator: run(communicator, True)) == clean


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_canonical_ranks_name_what_differs_in_a_later_step(ranks):
    def run(communicator):
        w = Variable(np.zeros(8, "f4"), name="w")
        h = Variable(np.zeros(4, "f8"), name="h")
        Arena([w, h])
        aggregator = Canonical(communicator, ranks, "sum")
        pairs = [(np.ones(8, "f4"), w), (np.ones(4), h)]
        for _ in range(2):
            aggregator.reduce(pairs, Ticket(1))
        given = pairs[:1] if communicator.rank == 1 else pairs
        with pytest.raises(CommunicatorError, match=r"rank 1 on .*'h'"):
            aggregator.reduce(given, Ticket(1))
        return communicator.all_gather_object(communicator.rank)

    assert world(ranks, run) == [list(range(ranks))] * ranks


def test_settle_where_a_rank_lacks_what_lies_in_an_arena_elsewhere():
    def run(communicator):
        v = Variable(np.zeros(2, "f4"), name="v")
        aggregator = LocalSGD(communicator, 4)
        lacks = communicator.rank == 1
        others = [] if lacks else [Variable(np.full(n, communicator.rank, "f4"), name=f"{n}") for n in (5, 3)]
        if others:
            Arena(others)
        aggregator.reduce([(None if lacks else np.ones(2, "f4"), v)], Ticket(0 if lacks else 2))
        aggregator.after_apply([v])
        aggregator.settle([v], others)
        return [float(other.numpy()[0]) for other in others]

    # Ranks 0 and 2 hold 0 and 2, of as many examples.
    assert world(3, run) == [[1.0, 1.0], [], [1.0, 1.0]]


def test_settings_of_numpy_integers_can_be_written_to_a_checkpoint(tmp_path):
    counts = {"local_steps": np.int64(2), "seed": np.int32(1), "steps": np.int64(2), "output": tmp_path}

    def run(communicator):
        return training.run(training.trainer(communicator, **counts)).step

    assert world(2, run) == [2, 2]
    assert latest(tmp_path)[2]["local_steps"] == 2


def test_the_aggregator_of_canonical_mode_is_not_replaced():
    def run(communicator):
        made = training.trainer(communicator, canonical=4)
        with pytest.raises(TypeError, match="canonical mode"):
            made.aggregator = AllReduce(communicator)
        return True

    assert world(2, run) == [True] * 2
