"""What a model may do inside a Replica: collect losses, drop out, leave updates."""

import numpy as np
import pytest

from distopt import layers, ops, regularizers, scopes
from distopt.backend import Device
from distopt.replica import Batch, Replica

_RANDOM = np.random.default_rng(0)
_IMAGES = _RANDOM.standard_normal((6, 4, 4, 2)).astype("f4")
_LABELS = _RANDOM.integers(0, 3, 6)


def _replica(model, seed=0):
    return Replica(model, (4, 4, 2), Device(), seed)


def _step(replica, images=_IMAGES, labels=_LABELS, **position):
    tape, loss, ticket = replica.forward(Batch(images, labels, **position))
    gradients = {v.name: np.array(g) for g, v in replica.gradients(tape, loss)}
    replica.run_update_ops()
    return float(loss), gradients, ticket


def _plain(images):
    return layers.dense(layers.flatten(images), 3, name="logits")


def _with_dropout(images, training):
    x = layers.dropout(layers.flatten(images), 0.5, training=training)
    return layers.dense(x, 3, name="logits")


def test_losses_that_the_model_collects_count_once_for_each_example():
    def model(images):
        logits = _plain(images)
        weights = scopes.trainable_variables()[0]
        layers.add_loss(ops.l2_loss(weights) * 0.5)
        layers.apply_regularization(regularizers.l1_regularizer(0.25), [weights])
        return logits

    plain, own = _replica(_plain), _replica(model)
    (loss, gradients, _), (expected, wanted, _) = _step(own), _step(plain)
    weights = plain.variables[0].numpy()
    penalty = 0.5 * np.sum(weights**2) / 2 + 0.25 * np.abs(weights).sum()
    assert loss == pytest.approx(expected + 6 * penalty, rel=1e-5)
    slope = 0.5 * weights + 0.25 * np.sign(weights)
    np.testing.assert_allclose(
        gradients["logits/weights"], wanted["logits/weights"] + 6 * slope, rtol=1e-5, atol=1e-6
    )
    assert _step(own)[0] == loss  # nothing piled up


def test_a_model_that_makes_a_variable_twice_is_told():
    def model(images):
        return _plain(images) + _plain(images)

    with pytest.raises(ValueError, match="Variable logits/weights already exists"):
        _replica(model)


def test_dropout_is_on_in_training_only_and_depends_on_the_step():
    replica = _replica(_with_dropout)
    first, again, other = (_step(replica, step=number)[0] for number in (1, 1, 2))
    assert first == again != other
    with_all = _replica(_plain)
    batch = Batch(_IMAGES, _LABELS)
    assert replica.evaluate(batch).loss == pytest.approx(with_all.evaluate(batch).loss)


@pytest.mark.parametrize("cut", [0, 2, 5])
def test_two_replicas_drop_what_one_would(cut):
    whole_loss, whole, _ = _step(_replica(_with_dropout), step=3)
    first = _step(_replica(_with_dropout), _IMAGES[:cut], _LABELS[:cut], step=3)
    second = _step(_replica(_with_dropout), _IMAGES[cut:], _LABELS[cut:], step=3, first_example=cut)
    assert first[0] + second[0] == pytest.approx(whole_loss, rel=1e-5)
    for name, gradient in whole.items():
        np.testing.assert_allclose(first[1][name] + second[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_updates_run_once_in_each_forward_pass_and_evaluation_uses_the_averages():
    events = []

    def model(images, training=False):
        x = layers.batch_normalization(images, momentum=0.5, training=training, name="bn")
        if training:
            scopes.add_to_collection("update_ops", lambda: events.append("own"))
        return layers.dense(layers.flatten(x), 3, name="logits")

    replica = _replica(model)
    with replica._graph.as_default():
        mean, variance = (v for v in scopes.model_variables() if not v.trainable)
    assert (mean.numpy().tolist(), variance.numpy().tolist()) == ([0.0, 0.0], [1.0, 1.0])
    batch_mean = _IMAGES.mean((0, 1, 2))
    for count in (1, 2):
        _step(replica, step=count)
        assert events == ["own"] * count
        np.testing.assert_allclose(mean.numpy(), batch_mean * (1 - 0.5**count), rtol=1e-5)
    replica.evaluate(Batch(_IMAGES, _LABELS))
    assert len(events) == 2
    np.testing.assert_allclose(mean.numpy(), batch_mean * 0.75, rtol=1e-5)


def test_statistics_of_objects_move_in_the_forward_pass_and_can_be_restored():
    model = layers.Sequential([layers.BatchNormalization(momentum=0.5), layers.Flatten(), layers.Dense(3)])
    replica = _replica(model)
    mean, variance = replica.statistics
    batch_mean = _IMAGES.mean((0, 1, 2))
    _step(replica)
    before = variance.numpy()
    replica.forward(Batch(_IMAGES, _LABELS))
    np.testing.assert_allclose(mean.numpy(), batch_mean * 0.75, rtol=1e-5)
    assert (variance.numpy() != before).all()
    replica.restore_statistics()
    np.testing.assert_allclose(mean.numpy(), batch_mean * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(variance.numpy(), before)


def test_a_model_of_layer_objects_has_variables_of_its_own_in_every_replica():
    model = layers.Sequential(
        [layers.Conv2D(3, 3, activation="relu"), layers.MaxPool2D(2), layers.Flatten(), layers.Dense(3)]
    )
    first, second = _replica(model), _replica(model)
    assert [v.name for v in first.variables] == [v.name for v in second.variables]
    assert not {id(v) for v in first.variables} & {id(v) for v in second.variables}
    for a, b in zip(first.variables, second.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    assert _step(first)[0] == _step(second)[0]
