import math

import numpy as np
import pytest

from distopt import ops
from distopt.tape import GradientTape
from distopt.variables import Variable

_ALPHA, _SCALE = 1.6732632423543772, 1.0507009873554805

# Scalar definitions, from the papers and TensorFlow's documentation.
_DEFINITIONS = {
    "relu6": lambda x: min(max(x, 0), 6),
    "leaky_relu": lambda x: x if x > 0 else 0.2 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "selu": lambda x: _SCALE * (x if x > 0 else _ALPHA * (math.exp(x) - 1)),
    "softplus": lambda x: math.log(1 + math.exp(x)),
    "swish": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
_POINTS = [-3.0, -0.7, -0.1, 0.2, 1.5, 4.0, 7.0]


@pytest.mark.parametrize("name", _DEFINITIONS)
def test_values_and_gradients_are_those_of_the_definition(name):
    definition = _DEFINITIONS[name]
    x = Variable(np.array(_POINTS))
    with GradientTape() as tape:
        y = getattr(ops, name)(x)
    np.testing.assert_allclose(y.numpy(), [definition(p) for p in _POINTS], rtol=1e-12)
    slopes = [(definition(p + 1e-6) - definition(p - 1e-6)) / 2e-6 for p in _POINTS]
    np.testing.assert_allclose(tape.gradient(y, x), slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "slope"), [("elu", 1.0), ("softplus", 0.5), ("swish", 0.5), ("gelu", 0.5)])
def test_the_gradient_at_zero(name, slope):
    x = Variable(np.zeros(2, "f4"))
    with GradientTape() as tape:
        y = getattr(ops, name)(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(tape.gradient(y, x), [slope, slope], rtol=1e-6)


def test_softmax_and_its_logarithm():
    x = Variable(np.array([[0.0, math.log(3.0)], [1000.0, 1000.0]]))
    upstream = np.array([[1.0, 0.0], [0.0, 2.0]])
    with GradientTape(persistent=True) as tape:
        y, logarithm = ops.softmax(x), ops.log_softmax(x)
    np.testing.assert_allclose(y.numpy(), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-12)
    np.testing.assert_allclose(logarithm.numpy(), np.log([[0.25, 0.75], [0.5, 0.5]]), rtol=1e-12)
    # p_i (u_i - sum of p u), and u_i - p_i sum of u.
    expected = [[0.25 * 0.75, -0.75 * 0.25], [-0.5, 0.5]]
    np.testing.assert_allclose(tape.gradient(y, x, output_gradients=[upstream]), expected, rtol=1e-12)
    expected = [[0.75, -0.75], [-1.0, 1.0]]
    np.testing.assert_allclose(tape.gradient(logarithm, x, output_gradients=[upstream]), expected, rtol=1e-12)


def test_large_numbers_do_not_overflow():
    x = np.array([-1000.0, 1000.0], "f4")
    assert ops.softplus(x).numpy().tolist() == [0.0, 1000.0]
    assert ops.elu(x).numpy().tolist() == [-1.0, 1000.0]


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_leaky_relu_refuses_other_slopes(alpha):
    with pytest.raises(ValueError, match=r"alpha of leaky_relu must be in \[0, 1\], got"):
        ops.leaky_relu(np.ones(2), alpha)
