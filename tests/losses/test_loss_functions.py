"""Losses against arithmetic on probabilities."""

import math

import numpy as np
import pytest

from distopt import losses
from distopt.losses import Reduction
from distopt.tape import GradientTape
from distopt.variables import Variable

LOG = math.log


def listed(tensor):
    return tensor.numpy().tolist()


def test_squared_and_absolute_errors_are_averaged_over_features():
    true, predicted = [[0.0, 1.0], [0.0, 0.0]], [[2.0, 1.0], [1.0, -3.0]]
    assert listed(losses.mean_squared_error(true, predicted)) == [2.0, 5.0]
    assert listed(losses.mean_absolute_error(true, predicted)) == [1.0, 2.0]


def test_a_vector_is_one_number_per_example():
    assert listed(losses.mean_squared_error([0.0, 1.0], [2.0, 4.0])) == [4.0, 9.0]
    assert float(losses.MeanSquaredError(Reduction.SUM)([0.0, 1.0], [2.0, 4.0])) == 13.0


def test_further_axes_stay():
    true, predicted = np.zeros((2, 3, 4)), np.full((2, 3, 4), 2.0)
    assert losses.mean_squared_error(true, predicted).numpy().tolist() == [[4.0] * 3] * 2


@pytest.mark.parametrize(("true", "predicted"), [((3, 1), (3,)), ((3,), (3, 1))])
def test_a_missing_last_axis_is_added(true, predicted):
    found = losses.mean_squared_error(np.zeros(true), np.arange(3.0).reshape(predicted))
    assert listed(found) == [0.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("true", "predicted"), [((3, 1), (3, 2)), ((1, 2), (3, 2)), ((), (3,)), ((4,), (3,))]
)
@pytest.mark.parametrize(
    "function",
    [
        losses.mean_squared_error,
        losses.mean_absolute_error,
        losses.binary_crossentropy,
        losses.categorical_crossentropy,
    ],
)
def test_other_shapes_are_not_broadcast(function, true, predicted):
    with pytest.raises(ValueError, match="they must be equal"):
        function(np.zeros(true), np.zeros(predicted))


def test_binary_cross_entropy_of_known_probabilities():
    true, chance = [[1.0, 0.0], [0.0, 1.0]], np.array([[0.5, 0.75], [0.2, 0.9]])
    expected = [(-LOG(0.5) - LOG(0.25)) / 2, (-LOG(0.8) - LOG(0.9)) / 2]
    assert listed(losses.binary_crossentropy(true, chance)) == pytest.approx(expected, rel=1e-6)
    logits = np.log(chance / (1 - chance))
    found = losses.binary_crossentropy(true, logits, from_logits=True)
    assert listed(found) == pytest.approx(expected, rel=1e-12)


def test_impossible_probabilities_have_a_finite_loss():
    found = losses.binary_crossentropy([[1.0]], np.array([[0.0]]))
    assert float(found.numpy()[0]) == pytest.approx(-LOG(2e-7))  # Keras' epsilon, twice
    found = losses.categorical_crossentropy([[1.0, 0.0]], np.array([[0.0, 1.0]]))
    assert float(found.numpy()[0]) == pytest.approx(-LOG(1e-7))


def test_certain_float32_probabilities_lose_what_they_lose_in_keras():
    # tf.keras.losses.BinaryCrossentropy(reduction="none") in TensorFlow 2.15.1. 1 - 1e-7 is rounded to
    # 1 - 2**-23, so being wrong costs less by certain ones than by certain zeros.
    true = np.array([[0.0], [1.0], [0.0], [1.0]], "f4")
    chance = np.array([[1.0], [0.0], [0.0], [1.0]], "f4")
    found = listed(losses.binary_crossentropy(true, chance))
    assert found == pytest.approx([15.33323860168457, 15.424948692321777, 0.0, 0.0], rel=1e-6)


def test_label_smoothing():
    found = losses.binary_crossentropy([[1.0]], np.array([[0.8]]), label_smoothing=0.2)
    assert listed(found) == pytest.approx([-0.9 * LOG(0.8) - 0.1 * LOG(0.2)], rel=1e-6)
    chance = np.array([[0.7, 0.2, 0.05, 0.05]])
    found = losses.categorical_crossentropy([[1.0, 0, 0, 0]], chance, label_smoothing=0.4)
    expected = -0.7 * LOG(0.7) - 0.1 * (LOG(0.2) + 2 * LOG(0.05))
    assert listed(found) == pytest.approx([expected], rel=1e-9)
    for function in (losses.binary_crossentropy, losses.categorical_crossentropy):
        with pytest.raises(ValueError, match=r"label_smoothing must be .* got 1\.5"):
            function([[1.0, 0.0]], [[0.5, 0.5]], label_smoothing=1.5)


@pytest.mark.parametrize("from_logits", [False, True])
def test_cross_entropies_of_known_probabilities(from_logits):
    chance = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    given = np.log(chance) + 3.0 if from_logits else chance * 2.0  # scaled to 1 by the loss
    sparse = losses.sparse_categorical_crossentropy([0, 2], given, from_logits)
    one_hot = losses.categorical_crossentropy(np.eye(3)[[0, 2]], given, from_logits)
    expected = [-LOG(0.5), -LOG(0.7)]
    if not from_logits:  # of more than 1: Keras cuts them before it scales the sparse ones
        sparse = losses.sparse_categorical_crossentropy([0, 2], chance)
    assert listed(sparse) == pytest.approx(expected, rel=1e-6)
    assert listed(one_hot) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("from_logits", [False, True])
def test_classes_may_come_after_several_axes(from_logits):
    chance = np.random.default_rng(0).dirichlet(np.ones(4), (2, 3))
    given = np.log(chance) if from_logits else chance
    labels = np.array([[0, 1, 2], [3, 2, 1]])
    expected = -np.log(np.take_along_axis(chance, labels[..., None], -1)[..., 0])
    for found in (
        losses.sparse_categorical_crossentropy(labels, given, from_logits),
        losses.sparse_categorical_crossentropy(labels[..., None], given, from_logits),
        losses.categorical_crossentropy(np.eye(4)[labels], given, from_logits),
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(3,\)"):
        losses.sparse_categorical_crossentropy([0, 1, 2], np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\[examples, ..., classes\], got shape \(3,\)"):
        losses.categorical_crossentropy(np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="labels go from 0 to 3"):
        losses.sparse_categorical_crossentropy([0, 3], np.ones((2, 3)), from_logits=True)


def test_an_empty_batch_gives_no_losses():
    assert losses.sparse_categorical_crossentropy(np.zeros(0, int), np.zeros((0, 3))).shape == (0,)
    assert losses.categorical_crossentropy(np.zeros((0, 3)), np.zeros((0, 3)), True).shape == (0,)


CASES = [
    (losses.MeanSquaredError(), np.array([[0.5, 0.2, 0.3]])),
    (losses.MeanAbsoluteError(), np.array([[0.5, 0.2, 0.3]])),
    (losses.BinaryCrossentropy(), np.array([[1.0, 0.0, 0.3]])),
    (losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1), np.array([[1.0, 0.0, 0.3]])),
    (losses.CategoricalCrossentropy(), np.array([[0.2, 0.7, 0.1]])),
    (losses.CategoricalCrossentropy(from_logits=True), np.array([[0.2, 0.7, 0.1]])),
    (losses.SparseCategoricalCrossentropy(), np.array([1])),
    (losses.SparseCategoricalCrossentropy(from_logits=True), np.array([2])),
]


@pytest.mark.parametrize(("loss", "true"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_gradients_agree_with_finite_differences(loss, true):
    start = np.array([[0.31, 0.42, 0.27]])
    variable = Variable(start)
    with GradientTape() as tape:
        value = loss(true, variable)
    found = tape.gradient(value, variable)
    for place in range(3):
        step = np.zeros((1, 3))
        step[0, place] = 1e-6
        higher, lower = float(loss(true, start + step)), float(loss(true, start - step))
        assert found[0, place] == pytest.approx((higher - lower) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("loss", "true"), CASES, ids=lambda v: getattr(v, "name", ""))
def test_a_loss_object_is_its_function_with_a_reduction(loss, true):
    predicted = np.array([[0.31, 0.42, 0.27]])
    config = loss.get_config()
    again = type(loss).from_config(config)
    assert again.get_config() == config
    assert config["reduction"] == "auto"
    function = getattr(losses, config["name"])
    options = {key: config[key] for key in config if key not in ("reduction", "name")}
    each = function(true, predicted, **options).numpy()
    assert float(again(true, predicted)) == pytest.approx(each.mean())
    for reduction in Reduction.all():
        reduced = function(true, predicted, **options, sample_weight=[3.0], reduction=reduction).numpy()
        np.testing.assert_allclose(np.ravel(reduced), 3.0 * each, rtol=1e-12)


def test_a_loss_of_ones_own_needs_call():
    class Own(losses.Loss):
        pass

    with pytest.raises(NotImplementedError, match=r"Own must define call\(y_true, y_pred\)"):
        Own()([1.0], [1.0])
