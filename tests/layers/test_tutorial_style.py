"""Model code in the style of TensorFlow's CIFAR-10 tutorial, against the trainer's own network.

What follows are the tutorial's functions (inference, loss, tower_loss, average_gradients), written for
distopt with its scopes, collections and tf.nn names. Nothing else is needed around them but
`with graph.step()`.
"""

import numpy as np
import pytest

from distopt import initializers, ops, scopes
from distopt.backend import Device
from distopt.models import cifar10
from distopt.ops import nn
from distopt.replica import Batch, Replica
from distopt.tape import GradientTape

_BATCH = 4
_TOWERS = 2
_RATE = 0.01


def _variable_with_weight_decay(name, shape, stddev, wd):
    variable = scopes.get_variable(name, shape, initializer=initializers.TruncatedNormal(stddev=stddev))
    if wd is not None:
        weight_decay = ops.multiply(nn.l2_loss(variable), wd, name="weight_loss")
        scopes.add_to_collection("losses", weight_decay)
    return variable


def _constant(value):
    return initializers.Constant(value)


def inference(images):
    with scopes.variable_scope("conv1") as scope:
        kernel = _variable_with_weight_decay("weights", [5, 5, 3, 64], stddev=5e-2, wd=None)
        conv = nn.conv2d(images, kernel, [1, 1, 1, 1], padding="SAME")
        biases = scopes.get_variable("biases", [64], initializer=_constant(0.0))
        pre_activation = nn.bias_add(conv, biases)
        conv1 = nn.relu(pre_activation, name=scope.name)
    pool1 = nn.max_pool(conv1, ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1], padding="SAME", name="pool1")
    norm1 = nn.lrn(pool1, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75, name="norm1")

    with scopes.variable_scope("conv2") as scope:
        kernel = _variable_with_weight_decay("weights", [5, 5, 64, 64], stddev=5e-2, wd=None)
        conv = nn.conv2d(norm1, kernel, [1, 1, 1, 1], padding="SAME")
        biases = scopes.get_variable("biases", [64], initializer=_constant(0.1))
        pre_activation = nn.bias_add(conv, biases)
        conv2 = nn.relu(pre_activation, name=scope.name)
    norm2 = nn.lrn(conv2, 4, bias=1.0, alpha=0.001 / 9.0, beta=0.75, name="norm2")
    pool2 = nn.max_pool(norm2, ksize=[1, 3, 3, 1], strides=[1, 2, 2, 1], padding="SAME", name="pool2")

    with scopes.variable_scope("local3") as scope:
        reshape = ops.reshape(pool2, shape=[images.shape[0], -1])
        dim = reshape.shape[1]
        weights = _variable_with_weight_decay("weights", [dim, 384], stddev=0.04, wd=0.004)
        biases = scopes.get_variable("biases", [384], initializer=_constant(0.1))
        local3 = nn.relu(ops.matmul(reshape, weights) + biases, name=scope.name)
    with scopes.variable_scope("local4") as scope:
        weights = _variable_with_weight_decay("weights", [384, 192], stddev=0.04, wd=0.004)
        biases = scopes.get_variable("biases", [192], initializer=_constant(0.1))
        local4 = nn.relu(ops.matmul(local3, weights) + biases, name=scope.name)
    with scopes.variable_scope("softmax_linear") as scope:
        weights = _variable_with_weight_decay("weights", [192, 10], stddev=1 / 192.0, wd=None)
        biases = scopes.get_variable("biases", [10], initializer=_constant(0.0))
        return ops.add(ops.matmul(local4, weights), biases, name=scope.name)


def loss(logits, labels):
    cross_entropy = nn.sparse_softmax_cross_entropy_with_logits(
        labels=labels, logits=logits, name="cross_entropy_per_example"
    )
    cross_entropy_mean = ops.reduce_mean(cross_entropy, name="cross_entropy")
    scopes.add_to_collection("losses", cross_entropy_mean)
    return ops.add_n(scopes.get_collection("losses"), name="total_loss")


def tower_loss(scope, images, labels):
    logits = inference(images)
    loss(logits, labels)
    losses = scopes.get_collection("losses", scope)
    return logits, ops.add_n(losses, name="total_loss")


def average_gradients(tower_grads):
    return [
        (np.mean([gradient for gradient, _ in pairs], axis=0), pairs[0][1])
        for pairs in zip(*tower_grads, strict=True)
    ]


def train_step(graph, batches):
    """One step of cifar10_multi_gpu_train.py; returns per tower (logits, loss, gradients by name)."""
    towers, tower_grads = [], []
    with graph.step(), scopes.variable_scope(scopes.get_variable_scope()):
        for number, batch in enumerate(batches):
            with scopes.name_scope(f"tower_{number}") as scope, GradientTape() as tape:
                logits, total = tower_loss(scope, batch.images, batch.labels)
                scopes.get_variable_scope().reuse_variables()
            variables = scopes.trainable_variables()
            gradients = tape.gradient(total, variables)
            tower_grads.append(list(zip(gradients, variables, strict=True)))
            found = {v.name: g for g, v in tower_grads[-1]}
            towers.append((logits.numpy(), float(total), found))
            assert total.name == f"tower_{number}/total_loss_1"
        names = [t.name for t in scopes.get_collection("losses")]
        assert names == [
            f"tower_{number}/{name}"
            for number in range(_TOWERS)
            for name in ("local3/weight_loss", "local4/weight_loss", "cross_entropy")
        ]
        for gradient, variable in average_gradients(tower_grads):
            variable.assign_sub(_RATE * gradient)
    return towers


def _batches(step):
    random = np.random.default_rng(step)
    return [
        Batch(random.standard_normal((_BATCH, 24, 24, 3)).astype("f4"), random.integers(0, 10, _BATCH))
        for _ in range(_TOWERS)
    ]


def _replica_step(replica, batches):
    """The same step with the trainer's network: sums over examples, weight decay as a regularizer."""
    towers, sums = [], {}
    for batch in batches:
        logits = replica.logits(batch.images).numpy()
        tape, total, _ = replica.forward(batch)
        gradients = {v.name: np.array(g) / _BATCH for g, v in replica.gradients(tape, total)}
        towers.append((logits, float(total) / _BATCH, gradients))
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0.0) + gradient / _TOWERS
    for variable in replica.variables:
        variable.assign_sub(_RATE * sums[variable.name])
    return towers


@pytest.fixture(scope="module")
def steps():
    """Two steps of both; [(towers of the tutorial, towers of the trainer's network), ...]"""
    graph = scopes.Graph(seed=5)
    replica = Replica(cifar10.network, (24, 24, 3), Device(), seed=5)
    found = []
    with graph.as_default():
        for step in range(2):
            batches = _batches(step)
            found.append((train_step(graph, batches), _replica_step(replica, batches)))
    ours = {v.name: v.numpy() for v in graph.variables.values()}
    return found, ours, {v.name: v.numpy() for v in replica.variables}


def test_logits_and_losses_are_those_of_the_trainers_network(steps):
    for own, expected in steps[0]:
        for (logits, total, _), (expected_logits, expected_total, _) in zip(own, expected, strict=True):
            assert logits.shape == (_BATCH, 10)
            np.testing.assert_allclose(logits, expected_logits, rtol=1e-5, atol=1e-6)
            assert total == pytest.approx(expected_total, rel=1e-5)


def test_gradients_are_those_of_the_trainers_network(steps):
    for own, expected in steps[0]:
        for (_, _, found), (_, _, wanted) in zip(own, expected, strict=True):
            assert set(found) == set(wanted)
            for name, gradient in wanted.items():
                scale = np.abs(gradient).max()
                np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=name)


def test_variables_are_made_once_and_end_with_the_same_values(steps):
    _, own, expected = steps
    assert set(own) == set(expected)
    assert len(own) == 10
    for name, value in expected.items():
        np.testing.assert_allclose(own[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
