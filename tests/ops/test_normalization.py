"""Batch normalization against its definition in float64, and over ranks against one process."""

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape
from distopt.testing import world
from distopt.variables import Variable

_RANDOM = np.random.default_rng(3)


def _by_hand(x, gamma, beta, epsilon):
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon) * gamma + beta


@pytest.mark.parametrize("shape", [(7, 3), (4, 5, 2, 3)])
def test_values_are_those_of_the_definition(shape):
    x = _RANDOM.normal(5.0, 3.0, shape)
    gamma, beta = np.array([1.0, 2.0, -1.0]), np.array([0.0, 1.0, 5.0])
    found = ops.batch_normalization(x, gamma, beta, epsilon=0.1).numpy()
    np.testing.assert_allclose(found, _by_hand(x, gamma, beta, 0.1), rtol=1e-12)
    plain = ops.batch_normalization(x, None, None).numpy()
    np.testing.assert_allclose(plain, _by_hand(x, 1.0, 0.0, 1e-3), rtol=1e-12)


def test_moments_are_the_mean_and_the_variance_over_all_axes_but_the_last():
    x = _RANDOM.normal(5.0, 3.0, (4, 5, 2, 3)).astype("f4")
    moments = ops.batch_moments(Variable(x))
    np.testing.assert_allclose(moments.mean, x.mean((0, 1, 2), dtype="f8"), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, x.var((0, 1, 2), dtype="f8"), rtol=1e-6)
    assert (moments.count, moments.mean.dtype) == (40, np.float32)


def test_a_large_mean_does_not_spoil_the_variance():
    x = (1e4 + _RANDOM.standard_normal((1000, 1))).astype("f4")
    expected = x.astype("f8").var()
    assert ops.batch_moments(x).variance[0] == pytest.approx(expected, rel=1e-3)


def test_a_channel_without_variance_becomes_beta():
    x = np.full((4, 1), 7.0, "f4")
    found = ops.batch_normalization(x, np.ones(1, "f4"), np.full(1, 0.5, "f4")).numpy()
    assert found.tolist() == [[0.5]] * 4


def test_given_moments_are_taken():
    x = np.array([[1.0], [3.0]])
    moments = ops.Moments(np.array([1.0]), np.array([4.0]), 2)
    found = ops.batch_normalization(x, None, None, epsilon=0.0, moments=moments).numpy()
    assert found.ravel().tolist() == [0.0, 1.0]


def test_an_empty_batch_gives_an_empty_result_and_zero_gradients():
    x, gamma, beta = Variable(np.zeros((0, 2, 3))), Variable(np.ones(3)), Variable(np.zeros(3))
    with GradientTape() as tape:
        y = ops.batch_normalization(x, gamma, beta)
    assert y.shape == (0, 2, 3)
    by_x, by_gamma, by_beta = tape.gradient(y, [x, gamma, beta])
    assert by_x.shape == (0, 2, 3)
    assert by_gamma.tolist() == by_beta.tolist() == [0.0, 0.0, 0.0]


def test_16_bits_are_computed_in_32():
    x = _RANDOM.normal(5.0, 3.0, (64, 3)).astype(np.float16)
    gamma = Variable(np.ones(3, "f4"))
    with GradientTape() as tape:
        y = ops.batch_normalization(x, gamma, None)
    assert y.dtype == np.float16
    np.testing.assert_allclose(y.numpy(), _by_hand(x.astype("f8"), 1.0, 0.0, 1e-3), atol=2e-3)
    assert tape.gradient(y, gamma).dtype == np.float32


@pytest.mark.parametrize("position", [1, 2])
def test_a_parameter_of_another_length_is_refused(position):
    arguments = [np.zeros((4, 3)), np.ones(3), np.zeros(3)]
    arguments[position] = np.ones(2)
    with pytest.raises(ValueError, match=r"must have shape \(3,\), one number per channel .* got \(2,\)"):
        ops.batch_normalization(*arguments)


def test_normalize_takes_given_mean_and_variance():
    x = np.array([[1.0, 10.0], [3.0, 30.0]])
    found = ops.normalize(x, np.array([1.0, 10.0]), np.array([4.0, 100.0]), None, np.array([2.0, 1.0]), 0.0)
    np.testing.assert_allclose(found.numpy(), [[0.0, 0.0], [2.0, 2.0]])
    shifted = ops.normalize(x, np.array([1.0, 10.0]), np.array([3.0, 99.0]), np.array([5.0, 6.0]), None, 1.0)
    np.testing.assert_allclose(shifted.numpy(), [[5.0, 6.0], [6.0, 8.0]])


# Uneven shards, an empty one in the middle, and one that holds a single example.
_CUTS = [[6, 10], [4, 4, 11], [0, 3], [1, 1, 1]]


@pytest.mark.parametrize("cuts", _CUTS, ids=str)
def test_over_ranks_it_is_what_one_process_computes_on_the_whole_batch(cuts):
    x = _RANDOM.normal(5.0, 3.0, (12, 2, 3))
    upstream = _RANDOM.standard_normal(x.shape)
    gamma, beta = np.array([1.0, 2.0, -1.0]), np.array([0.0, 1.0, 5.0])

    def run(part, weights, communicator):
        operands = [Variable(part), Variable(gamma), Variable(beta)]
        with GradientTape() as tape:
            y = ops.batch_normalization(*operands, communicator=communicator)
        return [y.numpy(), *tape.gradient(y, operands, output_gradients=[weights])]

    whole = run(x, upstream, None)
    parts, weights = np.split(x, cuts), np.split(upstream, cuts)
    found = world(len(parts), lambda ranks: run(parts[ranks.rank], weights[ranks.rank], ranks))
    for position, join in ((0, np.concatenate), (1, np.concatenate), (2, sum), (3, sum)):
        joined = join([result[position] for result in found])
        np.testing.assert_allclose(joined, whole[position], rtol=1e-10, atol=1e-12)


def test_over_ranks_a_global_batch_without_examples_is_no_error():
    def run(ranks):
        moments = ops.batch_moments(np.zeros((0, 2)), ranks)
        return float(moments.count[0]), moments.mean.tolist(), moments.variance.tolist()

    assert world(2, run) == [(0.0, [0.0, 0.0], [0.0, 0.0])] * 2
