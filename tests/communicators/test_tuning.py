import time

import numpy as np
import pytest

from distopt.communicators.algorithm import Algorithm
from distopt.communicators.communicator import Done
from distopt.communicators.tuning import Choice, algorithm_from_environment, size_class
from distopt.testing import world


class Slow(Algorithm):
    """Takes some time for each reduction."""

    def __init__(self, name, seconds, only_sum=False):
        self.name, self.seconds, self.only_sum = name, seconds, only_sum
        self.starts = []

    def can(self, flat, op):
        return op == "sum" or not self.only_sum

    def start(self, flat, op, number):
        self.starts.append(flat.nbytes)
        time.sleep(self.seconds(flat.nbytes))
        return Done(flat)


def choice(algorithms, forced=None, communicator=None, **options):
    return Choice(
        algorithms,
        forced,
        in_shared_memory=lambda flat: flat.dtype == np.float64,
        scratch=lambda shared, size: np.zeros(size // 4, np.float32),
        share=communicator.all_gather_object if communicator else lambda mine: [mine],
        barrier=communicator.barrier if communicator else lambda: None,
        **options,
    )


def rising(size):
    return 2e-8 * size


def steady(size):
    return 1e-3


@pytest.mark.parametrize(
    ("size", "exponent"),
    [(1, 0), (4, 1), (5, 2), (16, 2), (17, 3), (2**20, 10), (2**20 + 4, 11), (2**21, 11), (2**30, 11)],
)
def test_sizes_fall_into_powers_of_four(size, exponent):
    assert size_class(size) == exponent


def test_each_size_takes_what_was_fastest_there_and_is_measured_once():
    first, second = Slow("first", rising), Slow("second", steady)
    chooser = choice([first, second])
    assert chooser.choose(np.zeros(4, np.float32), "sum", 1) is first
    assert chooser.choose(np.zeros(250_000, np.float32), "sum", 2) is second
    measured = len(first.starts)
    assert chooser.choose(np.zeros(3, np.float32), "sum", 3) is first
    assert len(first.starts) == measured
    assert chooser.choose(np.zeros(2), "sum", 3) is first  # other memory: measured by itself
    assert len(first.starts) > measured
    words = chooser.describe()
    assert list(words) == [
        "other memory, 4 B to 16 B",
        "other memory, 256 KiB to 1 MiB",
        "allocated memory, 4 B to 16 B",
    ]
    assert words["other memory, 256 KiB to 1 MiB"].startswith("second (first ")


def test_what_is_larger_than_the_largest_class_goes_by_it():
    first, second = Slow("first", rising), Slow("second", steady)
    chooser = choice([first, second])
    chooser.choose(np.zeros(2_000_000, np.float32), "sum", 1)
    assert max(first.starts) == 2 * 2**20
    assert list(chooser.describe()) == ["other memory, 1 MiB and more"]


def test_ranks_that_measure_differently_choose_alike():
    """The slowest rank counts: the first is fast on rank 0 only."""

    def run(communicator):
        first = Slow("first", lambda size: 1e-5 if communicator.rank == 0 else 4e-3)
        second = Slow("second", steady)
        return choice([first, second], communicator=communicator).choose(np.zeros(1), "sum", 1).name

    assert world(3, run) == ["second"] * 3


def test_a_forced_algorithm_is_taken_wherever_it_can_be():
    first, second = Slow("first", steady), Slow("second", steady, only_sum=True)
    chooser = choice([first, second], forced="second")
    assert chooser.choose(np.zeros(1), "sum", 1) is second
    assert chooser.choose(np.zeros(1), "max", 1) is first
    assert first.starts == second.starts == []


def test_a_fallback_is_taken_only_where_no_other_can_be():
    first, second = Slow("first", steady, only_sum=True), Slow("second", lambda size: 0.0)
    chooser = choice([first, second], last_is_fallback=True)
    assert chooser.choose(np.zeros(1), "sum", 1) is first
    assert chooser.choose(np.zeros(1), "max", 1) is second


def test_an_algorithm_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"'ring' is not available here: it must be one of first"):
        choice([Slow("first", steady)], forced="ring")


@pytest.mark.parametrize(
    ("text", "name"), [("", None), ("auto", None), (" Shared ", "shared"), ("mpi", "mpi")]
)
def test_the_environment_names_an_algorithm(text, name):
    assert algorithm_from_environment({"DISTOPT_ALLREDUCE": text}) == name
    assert algorithm_from_environment({}) is None


def test_an_unknown_name_in_the_environment_is_refused():
    with pytest.raises(ValueError, match=r"must be auto or one of mpi, .* got 'fast'"):
        algorithm_from_environment({"DISTOPT_ALLREDUCE": "fast"})
