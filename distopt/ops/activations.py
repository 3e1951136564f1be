"""Activation functions made of primitives, so that their gradients of any order are right by construction."""

from __future__ import annotations

import math
from typing import Any

from distopt.ops.arithmetic import absolute, add, exp, log, maximum, minimum, multiply, subtract, tanh
from distopt.ops.dense import relu, sigmoid
from distopt.ops.reductions import reduce_sum
from distopt.ops.shaping import stop_gradient
from distopt.tape import Tensor
from distopt.variables import Operand

__all__ = ["elu", "gelu", "leaky_relu", "log_softmax", "relu6", "selu", "softmax", "softplus", "swish"]

# Klambauer et al., "Self-normalizing neural networks", 2017, https://arxiv.org/abs/1706.02515.
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805


def relu6(x: Any) -> Tensor:
    """Return x cut to [0, 6]."""
    return minimum(relu(x), 6.0)


def leaky_relu(x: Any, alpha: float = 0.2) -> Tensor:
    """Return x where it is positive, and alpha * x elsewhere.

    Raises:
        ValueError: alpha is outside of [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha of leaky_relu must be in [0, 1], got {alpha}")
    return maximum(multiply(x, alpha), x)


def elu(x: Any, alpha: float = 1.0) -> Tensor:
    """Return x where it is positive, and alpha * (exp(x) - 1) elsewhere."""
    # The number comes first in maximum, so that at 0 one of the two has the gradient, not both.
    return maximum(0.0, x) + alpha * (exp(minimum(x, 0.0)) - 1.0)


def selu(x: Any) -> Tensor:
    """Return the scaled elu that keeps mean 0 and variance 1."""
    return _SELU_SCALE * elu(x, _SELU_ALPHA)


def softplus(x: Any) -> Tensor:
    """Return log(1 + exp(x)), computed so that it doesn't overflow."""
    size = absolute(x)
    return multiply(add(x, size), 0.5) + log(exp(-size) + 1.0)


def swish(x: Any) -> Tensor:
    """Return x * sigmoid(x)."""
    return multiply(x, sigmoid(x))


def gelu(x: Any) -> Tensor:
    """Return x times the normal distribution function of x, in the approximation by tanh.

    D. Hendrycks and K. Gimpel, "Gaussian error linear units", 2016, https://arxiv.org/abs/1606.08415.
    """
    cubic = add(x, multiply(multiply(x, multiply(x, x)), 0.044715))
    return multiply(multiply(x, 0.5), tanh(cubic * math.sqrt(2 / math.pi)) + 1.0)


def log_softmax(x: Any) -> Tensor:
    """Return the logarithm of `softmax`, computed so that it doesn't overflow."""
    shifted = _shifted(x)
    return shifted - log(reduce_sum(exp(shifted), axis=-1, keepdims=True))


def softmax(x: Any) -> Tensor:
    """Return exp(x) divided by its sum over the last axis."""
    powers = exp(_shifted(x))
    return powers / reduce_sum(powers, axis=-1, keepdims=True)


def _shifted(x: Any) -> Tensor:
    """Return x minus its largest value along the last axis, a constant that cancels."""
    value = x.value if isinstance(x, Operand) else x
    return subtract(x, stop_gradient(value.max(axis=-1, keepdims=True)))
