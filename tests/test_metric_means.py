"""Metrics on one rank; over ranks in statistics_cases.py."""

import math

import numpy as np
import pytest

from distopt.metrics import Accuracy, Mean
from distopt.tape import Tensor


def test_values_may_be_numbers_arrays_and_tensors():
    mean = Mean()
    mean.update_state(1.0)
    mean.update_state([2.0, 3.0])
    mean.update_state(np.float16([[4.0], [5.0]]))
    mean.update_state(Tensor(np.array(6.0)))
    mean.update_state(np.zeros((0, 3)))
    assert (mean.total, mean.count) == (21.0, 6.0)
    assert mean.result() == 3.5


def test_values_are_summed_in_float64():
    mean = Mean()
    mean.update_state(np.full(1000, 2049, np.float16) * np.float16(1))  # 2048 in float16
    mean.update_state(np.float32(1e-3))
    assert mean.total == pytest.approx(2_048_000.001, rel=1e-12)


def test_weights_broadcast_and_may_be_zero():
    mean = Mean()
    mean.update_state(np.array([1.0, 5.0]), 0.5)
    mean.update_state(np.array([7.0]), 0.0)
    assert (mean.total, mean.count) == (3.0, 1.0)
    with pytest.raises(ValueError, match=r"shape \(3,\) is no weight for each of values \(2,\)"):
        mean.update_state(np.ones(2), np.ones(3))


def test_without_values_a_mean_is_no_number():
    assert math.isnan(Mean().result())
    accuracy = Accuracy()
    accuracy.update_state(np.zeros(0, int), np.zeros((0, 3)))
    assert math.isnan(accuracy.result())


def test_accuracy_is_the_share_of_right_answers():
    accuracy = Accuracy()
    accuracy.update_state(np.array([0, 1, 1]), np.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]]))
    assert accuracy.result() == pytest.approx(2 / 3)
    accuracy.update_state([1], [[0.0, 1.0]], sample_weight=[3.0])
    assert accuracy.result() == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3, 2\)"):
        accuracy.update_state([0, 1], np.zeros((3, 2)))
