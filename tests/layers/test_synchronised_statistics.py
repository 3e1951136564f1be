import numpy as np
import pytest
import statistics_cases

from distopt.aggregators import average_statistics
from distopt.communicators import LocalCommunicator
from distopt.testing import world
from distopt.variables import Variable


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("check", statistics_cases.CHECKS, ids=lambda check: check.__name__)
def test_on_threads(check, ranks):
    world(ranks, check)


@pytest.mark.parametrize("examples", [[1.0], [1.0, -1.0], [1.0, np.nan], [1.0, np.inf]])
def test_weights_of_replicas_are_numbers_one_for_each(examples):
    replicas = [[Variable(1.0)], [Variable(2.0)]]
    with pytest.raises(ValueError, match=r"one number >= 0 for each of 2 replicas"):
        average_statistics(replicas, LocalCommunicator(), examples)


def test_replicas_with_other_statistics_are_refused():
    replicas = [[Variable(1.0, name="a")], [Variable(2.0, name="b")]]
    with pytest.raises(ValueError, match="different statistics"):
        average_statistics(replicas, LocalCommunicator(), [1, 1])


def test_a_model_without_statistics_sends_nothing():
    ranks = LocalCommunicator()
    average_statistics([[]], ranks, [1])
    average_statistics([[Variable(1)]], ranks, [1])
    assert ranks.sequence == 0
