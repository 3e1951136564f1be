"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from distopt import ops
from distopt.tape import Tensor

__all__ = ["ACTIVATIONS", "Activation", "activate", "activation_of"]

Activation: TypeAlias = str | Callable[[Any], Tensor] | None

ACTIVATIONS: dict[str, Callable[[Any], Tensor]] = {
    "elu": ops.elu,
    "gelu": ops.gelu,
    "leaky_relu": ops.leaky_relu,
    "log_softmax": ops.log_softmax,
    "relu": ops.relu,
    "relu6": ops.relu6,
    "selu": ops.selu,
    "sigmoid": ops.sigmoid,
    "softmax": ops.softmax,
    "softplus": ops.softplus,
    "swish": ops.swish,
    "tanh": ops.tanh,
}
"""What a name in `activation=` stands for; "linear" and None stand for nothing."""


def activation_of(activation: Activation, relu: bool = False) -> Callable[[Any], Tensor] | None:
    """Return the function that an argument `activation` stands for, or None for none.

    Args:
        activation: a name, a function of a Tensor, or None.
        relu: the same as activation="relu", for layers that have this argument.

    Raises:
        ValueError: an unknown name, or both arguments are given.
        TypeError: it is neither a name nor callable.
    """
    if relu:
        if activation is not None:
            raise ValueError(f"relu=True is activation='relu'; got activation={activation!r} besides")
        return ops.relu
    if activation is None or activation == "linear":
        return None
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {activation!r}; there are 'linear', {', '.join(ACTIVATIONS)}, or give "
                "a function"
            )
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise TypeError(f"activation must be a name, a function or None, got {activation!r}")
    return activation


def activate(x: Tensor, activation: Callable[[Any], Tensor] | None) -> Tensor:
    """Return the activation of x, or x itself where there is none."""
    return x if activation is None else activation(x)
