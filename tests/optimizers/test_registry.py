"""Optimizers by name, and as plain values."""

import json

import numpy as np
import pytest

from distopt import optimizers
from distopt.elementwise import elementwise
from distopt.optimizers import contrib, keras_new, tf1
from distopt.schedules import CosineDecay
from distopt.variables import Variable


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adam", optimizers.Adam),
        ("SGD", optimizers.SGD),
        ("rmsprop", optimizers.RMSprop),
        ("tf1.AdamOptimizer", tf1.AdamOptimizer),
        ("keras_new.adam", keras_new.Adam),
        ("contrib.AdaMaxOptimizer", contrib.AdaMaxOptimizer),
    ],
)
def test_an_optimizer_by_name(name, cls):
    made = optimizers.get(name, learning_rate=0.25)
    assert type(made) is cls
    assert made.learning_rate == 0.25


def test_an_optimizer_is_returned_as_it_is():
    optimizer = optimizers.SGD(0.1)
    assert optimizers.get(optimizer) is optimizer


@pytest.mark.parametrize(
    "optimizer",
    [
        optimizers.Adam(CosineDecay(0.1, 10), amsgrad=True, clipnorm=2.0),
        tf1.MomentumOptimizer(0.1, 0.9, use_nesterov=True),
        contrib.AdamW(0.01, 0.1),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_an_optimizer_goes_through_json(optimizer):
    text = json.dumps(optimizers.serialize(optimizer))
    copy = optimizers.get(json.loads(text))
    assert type(copy) is type(optimizer)
    one, two = Variable([1.0, -2.0]), Variable([1.0, -2.0])
    for step in range(3):
        gradient = np.array([3.0, -0.5], "f4") * (step + 1)
        optimizer.apply_gradients([(gradient, one)])
        copy.apply_gradients([(gradient, two)])
    np.testing.assert_array_equal(one.numpy(), two.numpy())


@elementwise
def registry_descent(value, gradient, *, learning_rate):
    value = value - learning_rate * gradient
    return value  # noqa: RET504


class Own(optimizers.Optimizer):
    rule = registry_descent

    def __init__(self, learning_rate=0.1, **options):
        super().__init__(hyperparameters={"learning_rate": learning_rate}, **options)


def test_own_classes_are_custom_objects():
    config = optimizers.serialize(Own(0.5))
    assert config["class_name"] == "Own"
    with pytest.raises(ValueError, match=r"Unknown optimizer: Own\. Known are .*Adam.*tf1\.AdamOptimizer"):
        optimizers.deserialize(config)
    assert optimizers.deserialize(config, {"Own": Own}).learning_rate == 0.5


def test_wrong_identifiers_are_refused():
    with pytest.raises(ValueError, match="Unknown optimizer: adamant"):
        optimizers.get("adamant")
    with pytest.raises(ValueError, match="Could not interpret optimizer identifier: 3"):
        optimizers.get(3)
    with pytest.raises(ValueError, match=r"has the keys 'class_name' and 'config', got \['name'\]"):
        optimizers.get({"name": "adam"})
    with pytest.raises(TypeError, match=r"arguments \(learning_rate\) go with an optimizer's name"):
        optimizers.get(optimizers.SGD(0.1), learning_rate=0.1)


def test_what_keras_serialised_is_read():
    # tf.keras.optimizers.serialize in TensorFlow 2.15.1, of Adam(CosineDecay(0.1, 5)) and legacy.SGD(0.5).
    rate = {
        "module": "keras.optimizers.schedules",
        "class_name": "CosineDecay",
        "config": {
            "initial_learning_rate": 0.1,
            "decay_steps": 5,
            "alpha": 0.0,
            "name": None,
            "warmup_target": None,
            "warmup_steps": 0,
        },
        "registered_name": None,
    }
    new = {
        "module": "keras.optimizers",
        "class_name": "Adam",
        "config": {
            "name": "Adam",
            "weight_decay": None,
            "clipnorm": None,
            "global_clipnorm": None,
            "clipvalue": None,
            "use_ema": False,
            "ema_momentum": 0.99,
            "ema_overwrite_frequency": None,
            "jit_compile": False,
            "is_legacy_optimizer": False,
            "learning_rate": rate,
            "beta_1": 0.9,
            "beta_2": 0.999,
            "epsilon": 1e-07,
            "amsgrad": False,
        },
        "registered_name": None,
    }
    made = optimizers.deserialize(new)
    assert type(made) is keras_new.Adam
    assert made.learning_rate == CosineDecay(0.1, 5)
    assert made.get_config() == new["config"] | {
        "learning_rate": {"class_name": "CosineDecay", "config": rate["config"]}
    }
    legacy = {
        "module": "keras.optimizers.legacy",
        "class_name": "SGD",
        "config": {"name": "SGD", "learning_rate": 0.5, "decay": 0.0, "momentum": 0.0, "nesterov": False},
        "registered_name": None,
    }
    assert type(optimizers.deserialize(legacy)) is optimizers.SGD
