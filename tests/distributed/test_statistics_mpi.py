"""Synchronised batch normalization, averaged statistics, metrics and evaluation over MPI."""

import dataclasses

import pytest
import statistics_cases
import training

from distopt import layers
from distopt.communicators import connect


@pytest.mark.parametrize("check", statistics_cases.CHECKS, ids=lambda check: check.__name__)
def test_on_ranks(communicator, check):
    check(communicator)


def _network(images, training=False):
    x = layers.batch_normalization(images + 5.0, momentum=0.9, training=training, name="bn")
    return layers.dense(layers.flatten(x), 3, name="logits")


@pytest.mark.parametrize("count", [1, 2, 5, 29])
@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_counts_each_example_once_on_any_number_of_replicas(communicator, replicas, count):
    with connect("local") as alone:
        expected = training.trainer(alone).evaluate(training.data("test", count))
    found = training.trainer(communicator, replicas).evaluate(training.data("test", count))
    assert found["examples"] == count
    assert found == pytest.approx(expected, rel=1e-5)


def test_statistics_are_the_same_everywhere_before_evaluation(communicator):
    task = dataclasses.replace(training.TASK, model=_network)
    made = training.run(training.trainer(communicator, 2, task, global_batch=17))
    made.evaluate(training.data("test", 7))
    own = [[v.numpy().tolist() for v in replica.statistics] for replica in made.replicas]
    everyone = communicator.all_gather_object(own)
    assert all(statistics == everyone[0][0] for replicas in everyone for statistics in replicas)
