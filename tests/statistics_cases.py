"""Batch normalization and metrics on any number of ranks, beside one process on the whole batch.

Each check takes the communicator and runs on all ranks at once: over threads and under mpirun.
"""

import numpy as np
import pytest

from distopt import layers, ops, scopes
from distopt.aggregators import AllReduce, average_statistics
from distopt.communicators import LocalCommunicator
from distopt.metrics import Accuracy, Mean
from distopt.optimizers import SGD
from distopt.tape import GradientTape
from distopt.variables import Variable

CHECKS = []
EXAMPLES = 11


def check(function):
    CHECKS.append(function)
    return function


def cuts(size):
    """Ways to cut 11 examples: even, uneven, with empty shards, with a single example, all on one rank."""
    even = [EXAMPLES * rank // size for rank in range(size + 1)]
    yield even
    yield [0] * size + [EXAMPLES]
    yield [0] + [EXAMPLES] * size
    yield [0, *(min(1 + 4 * rank, EXAMPLES) for rank in range(size - 1)), EXAMPLES]
    yield [0, *([6] * (size - 1)), EXAMPLES]


def own(bounds, communicator):
    return slice(bounds[communicator.rank], bounds[communicator.rank + 1])


def batch():
    random = np.random.default_rng(8)
    x = random.normal(5.0, 3.0, (EXAMPLES, 2, 2, 3))
    return x, random.standard_normal(x.shape)


def normalized(x, upstream, communicator):
    """Forward, backward, and moving averages after it, in float64."""
    with scopes.Graph(seed=1).as_default() as graph, graph.step():
        layer = layers.BatchNormalization(momentum=0.5, epsilon=1e-3, communicator=communicator, name="bn")
        layer(x[:1] * 0)
        gamma, beta = layer.trainable_variables
        gamma.assign([1.0, 2.0, -1.0])
        beta.assign([0.0, 1.0, 5.0])
        given = Variable(x)
        with GradientTape() as tape:
            y = layer(given, training=True)
        gradients = tape.gradient(y, [given, gamma, beta], output_gradients=[upstream])
        return y.numpy(), gradients, [v.numpy() for v in layer.non_trainable_variables]


def by_definition():
    """The same in plain NumPy, from the formulas."""
    x, upstream = batch()
    axes, count = (0, 1, 2), EXAMPLES * 4
    gamma, beta = np.array([1.0, 2.0, -1.0]), np.array([0.0, 1.0, 5.0])
    mean, variance = x.mean(axes), x.var(axes)
    hat = (x - mean) / np.sqrt(variance + 1e-3)
    scaled = upstream * gamma
    by_x = (scaled - scaled.mean(axes) - hat * (scaled * hat).mean(axes)) / np.sqrt(variance + 1e-3)
    averages = [0.5 * mean, 0.5 + 0.5 * variance * count / (count - 1)]
    return hat * gamma + beta, [by_x, (upstream * hat).sum(axes), upstream.sum(axes)], averages


@check
def synchronised_normalization_is_that_of_the_whole_batch(communicator):
    x, upstream = batch()
    expected_y, expected_gradients, expected_averages = by_definition()
    for bounds in cuts(communicator.size):
        part = own(bounds, communicator)
        y, (by_x, *by_parameters), averages = normalized(x[part], upstream[part], communicator)
        np.testing.assert_allclose(y, expected_y[part], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(by_x, expected_gradients[0][part], rtol=1e-10, atol=1e-12)
        for gradient, expected in zip(by_parameters, expected_gradients[1:], strict=True):
            summed = communicator.all_reduce(np.ascontiguousarray(gradient)).wait()
            np.testing.assert_allclose(summed, expected, rtol=1e-11, atol=1e-11)
        for average, expected in zip(averages, expected_averages, strict=True):
            np.testing.assert_allclose(average, expected, rtol=1e-12)


@check
def local_normalization_is_not(communicator):
    """The negative control: without a communicator the result depends on how the batch is cut."""
    x, upstream = batch()
    expected_y, (expected_by_x, *_), expected_averages = by_definition()
    part = own(next(cuts(communicator.size)), communicator)
    y, (by_x, *_), averages = normalized(x[part], upstream[part], None)
    found = [np.abs(y - expected_y[part]).max(), np.abs(by_x - expected_by_x[part]).max()]
    found.append(np.abs(averages[0] - expected_averages[0]).max())
    worst = communicator.all_reduce(np.array(found), "max").wait()
    assert (worst > 0.01).all() if communicator.size > 1 else (worst < 1e-11).all()


def trained(communicator, bounds, synchronised, steps=6):
    """Train dense - normalization - dense in float64; weights, and statistics of this rank."""
    with scopes.Graph(seed=2).as_default() as graph:
        dense = layers.Dense(4, name="first")
        norm = layers.BatchNormalization(
            momentum=0.8, communicator=communicator if synchronised else None, name="bn"
        )
        last = layers.Dense(1, name="last")
        with graph.step():
            last(norm(dense(np.zeros((1, 3)))))
        variables = [*dense.trainable_variables, *norm.trainable_variables, *last.trainable_variables]
        optimizer = SGD(0.1, momentum=0.9, gradient_aggregator=AllReduce(communicator))
        part = own(bounds, communicator)

        def loss(x):
            return ops.reduce_sum((last(norm(dense(x), training=True)) - x.sum(axis=1, keepdims=True)) ** 2)

        for step in range(steps):
            x = np.random.default_rng(step).normal(1.0, 2.0, (EXAMPLES, 3))[part]
            optimizer.minimize(lambda x=x: loss(x), variables, examples=len(x))
        weights = np.concatenate([v.numpy().reshape(-1) for v in variables])
        return weights, norm.non_trainable_variables


@check
def training_with_synchronised_normalization_is_that_of_one_process(communicator):
    with LocalCommunicator() as alone:
        expected, expected_statistics = trained(alone, [0, EXAMPLES], True)
    for bounds in cuts(communicator.size):
        weights, statistics = trained(communicator, bounds, True)
        np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-10)
        for ours, theirs in zip(statistics, expected_statistics, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-9)
    if communicator.size > 1:
        local, _ = trained(communicator, next(cuts(communicator.size)), False)
        assert np.abs(local - expected).max() > 1e-3


def moving_means(communicator, bounds, steps=5):
    """Moving averages of local batches, and what one process has on the whole batch."""
    part = own(bounds, communicator)
    with scopes.Graph().as_default():
        local = layers.BatchNormalization(momentum=0.9, name="local")
        whole = layers.BatchNormalization(momentum=0.9, name="whole")
        for step in range(steps):
            x = np.random.default_rng(step).normal(step, 1.0, (EXAMPLES, 3)) ** 3
            for layer, given in ((local, x[part]), (whole, x)):
                layer(given[:0])
                layer(given, training=True)
        return local.non_trainable_variables, whole.non_trainable_variables


@check
def moving_means_weighted_by_examples_are_those_of_the_whole_batch(communicator):
    for bounds in cuts(communicator.size):
        (mean, variance), (expected, _) = moving_means(communicator, bounds)
        part = own(bounds, communicator)
        average_statistics([[mean, variance]], communicator, [part.stop - part.start])
        np.testing.assert_allclose(mean.numpy(), expected.numpy(), rtol=1e-12)
        everyone = communicator.all_gather(np.stack([mean.numpy(), variance.numpy()])).wait()
        assert (everyone == everyone[0]).all()


@check
def a_plain_mean_of_moving_means_is_not_that_of_the_whole_batch(communicator):
    """The negative control of the weights, where shards are uneven."""
    *_, bounds = cuts(communicator.size)  # 6 examples here, 5 there, and none between
    (mean, variance), (expected, _) = moving_means(communicator, bounds)
    average_statistics([[mean, variance]], communicator, [1.0])
    difference = np.abs(mean.numpy() / expected.numpy() - 1).max()
    assert difference > 1e-3 if communicator.size > 1 else difference < 1e-12


@check
def statistics_of_several_replicas_and_of_ranks_without_examples(communicator):
    rank, size = communicator.rank, communicator.size
    first = [Variable([float(rank)], name="mean"), Variable(3, trainable=False, name="count")]
    second = [Variable([10.0 + rank], name="mean"), Variable(4, trainable=False, name="count")]
    unused = [Variable([np.nan], name="mean"), Variable(5, trainable=False, name="count")]
    average_statistics([first, second, unused], communicator, [rank, 1, 0])
    expected = sum(r * r + 10.0 + r for r in range(size)) / sum(r + 1 for r in range(size))
    for replica, count in ((first, 3), (second, 4), (unused, 5)):
        assert float(replica[0].numpy()[0]) == pytest.approx(expected, rel=1e-6)
        assert replica[1].numpy() == count  # integers are no averages
    before = first[0].numpy()
    average_statistics([first, second], communicator, [0, 0])
    assert first[0].numpy() == before


@check
def metrics_count_every_example_once(communicator):
    values = np.random.default_rng(5).standard_normal(EXAMPLES)
    weights = np.arange(EXAMPLES) / 4
    labels = np.arange(EXAMPLES) % 3
    logits = np.eye(3)[(np.arange(EXAMPLES) * 2) % 3]
    for bounds in cuts(communicator.size):
        part = own(bounds, communicator)
        mean, weighted, accuracy, ours = Mean(), Mean(), Accuracy(), Mean()
        for example in range(EXAMPLES)[part]:  # batches of one: as many on a rank as it has examples
            mean.update_state(values[example])
            weighted.update_state(values[[example]], weights[[example]])
        accuracy.update_state(labels[part], logits[part])
        ours.update_state(values[part])
        assert mean.result(communicator) == pytest.approx(values.mean(), rel=1e-13)
        assert weighted.result(communicator) == pytest.approx(np.average(values, weights=weights), rel=1e-13)
        assert accuracy.result(communicator) == pytest.approx(4 / 11)  # 2 i = i modulo 3: 0, 3, 6, 9
        alone = values[part].mean() if part.stop > part.start else np.nan
        np.testing.assert_allclose(ours.result(), alone)
        mean.reset_state()
        assert np.isnan(mean.result(communicator))
