import numpy as np
import pytest

from distopt import initializers, layers, regularizers, scopes
from distopt.constraints import NonNeg


@pytest.fixture(autouse=True)
def graph():
    with scopes.Graph(seed=1).as_default() as graph:
        yield graph


def test_dense_creates_its_variables_once_and_computes_with_them():
    x = np.array([[1.0, 2.0]], "f4")
    options = {
        "kernel_initializer": initializers.Constant([[1.0, -3.0], [2.0, 1.0]]),
        "bias_initializer": initializers.Constant(0.5),
    }
    assert layers.dense(x, 2, name="d", **options).numpy().tolist() == [[5.5, -0.5]]
    with scopes.variable_scope(scopes.get_variable_scope(), reuse=True):
        assert layers.dense(x, 2, relu=True, name="d", **options).numpy().tolist() == [[5.5, 0.0]]
    assert [v.name for v in scopes.trainable_variables()] == ["d/weights", "d/biases"]
    with pytest.raises(ValueError, match="already exists"):
        layers.dense(x, 2, name="d")


def test_a_sequence_is_its_layers_one_after_the_other():
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 8, 8, 2)).astype("f4")
    make = [
        layers.Convolution(4, 3, relu=True, name="c1"),
        layers.MaxPool(2, 2, "SAME"),
        layers.LocalResponseNormalization(1, 1.0, 0.1, 0.75),
    ]
    whole = layers.sequence(x, make).numpy()
    with scopes.variable_scope(scopes.get_variable_scope(), reuse=True):
        step = x
        for layer in make:
            step = layers.sequence(step, [layer])
    np.testing.assert_allclose(step.numpy(), whole, rtol=1e-6, atol=1e-7)
    assert whole.shape == (3, 4, 4, 4)
    shapes = {v.name: v.shape for v in scopes.trainable_variables()}
    assert shapes == {"c1/weights": (3, 3, 2, 4), "c1/biases": (4,)}


def test_conv2d_without_bias_and_with_constraint_and_regularizer():
    layers.conv2d(
        np.zeros((1, 4, 4, 1), "f4"),
        2,
        (1, 2),
        use_bias=False,
        kernel_constraint=NonNeg(),
        kernel_regularizer=regularizers.l2_regularizer(0.1),
        name="c",
    )
    (weights,) = scopes.trainable_variables()
    assert weights.shape == (1, 2, 1, 2)
    assert isinstance(weights.constraint, NonNeg)
    (record,) = scopes.get_regularization_losses()
    assert record.variable is weights


def test_flatten_keeps_the_examples_even_when_there_are_none():
    assert layers.flatten(np.zeros((2, 3, 4))).shape == (2, 12)
    assert layers.flatten(np.zeros((0, 3, 4))).shape == (0, 12)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="units must be at least 1, got 0"):
        layers.dense(np.zeros((1, 2)), 0)
    with pytest.raises(ValueError, match=r"dense needs \[examples, inputs\], got shape \(1, 2, 3\)"):
        layers.dense(np.zeros((1, 2, 3)), 1)
    with pytest.raises(ValueError, match="filters must be at least 1, got 0"):
        layers.Convolution(0, 3)
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        layers.Convolution(1, (3, 0))
