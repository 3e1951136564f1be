"""Constraints: what a variable's value must satisfy after each update.

Names, arguments and formulas are those of `tf.keras.constraints`. A constraint is a callable from
the value, a NumPy or CuPy array, to the new value of the same shape; the optimizer applies it after
the update of a variable that has one. Functions of your own do as well.

    >>> MaxNorm(1.0)(np.array([[3.0, 0.3], [4.0, 0.4]])).round(3).tolist()
    [[0.6, 0.3], [0.8, 0.4]]
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, namespace

__all__ = [
    "Constraint",
    "MaxNorm",
    "MinMaxNorm",
    "NonNeg",
    "UnitNorm",
    "max_norm",
    "min_max_norm",
    "non_neg",
    "unit_norm",
]

Axis: TypeAlias = int | Sequence[int] | None
"""Axes over which a norm is taken; None takes it over all."""

_EPSILON = 1e-7  # Keras' backend.epsilon()


class Constraint(abc.ABC):
    """Base of the constraints: a callable array -> array of the same shape and dtype."""

    @abc.abstractmethod
    def __call__(self, value: Array) -> Array:
        """Return the value that satisfies the constraint; `value` itself is not modified."""

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class NonNeg(Constraint):
    """Negative weights become zero. NaN stays NaN."""

    def __call__(self, value: Array) -> Array:
        """Return max(value, 0)."""
        return namespace(value).maximum(value, value.dtype.type(0))  # type: ignore[no-any-return]

    def get_config(self) -> dict[str, Any]:
        """Return an empty dictionary: there are no arguments."""
        return {}


class MinMaxNorm(Constraint):
    """Norms are brought into [min_value, max_value], wholly or by a part `rate` of the way.

    `w * (rate * clip(n, min_value, max_value) + (1 - rate) * n) / (1e-7 + n)` with `n` the
    Euclidean norm over `axis`. The 1e-7 is Keras'; a vector of zeros stays zero.

    Args:
        min_value: smallest norm.
        max_value: largest norm.
        rate: 1 puts the norm in the range at once; less, step by step.
        axis: axes over which the norm is taken: 0 for the inputs of each column of a dense layer's
            [inputs, outputs], (0, 1, 2) for a filter of [height, width, inputs, outputs].

    Raises:
        ValueError: the bounds are negative or in the wrong order, or `rate` is not in [0, 1].
    """

    def __init__(
        self,
        min_value: float = 0.0,
        max_value: float = 1.0,
        rate: float = 1.0,
        axis: Axis = 0,
    ) -> None:
        if not 0.0 <= min_value <= max_value:
            raise ValueError(
                f"a norm's bounds must be 0 <= min_value <= max_value, got {min_value} and {max_value}."
            )
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be in [0, 1], got {rate}.")
        self.min_value = min_value
        self.max_value = max_value
        self.rate = rate
        self.axis = axis

    def __call__(self, value: Array) -> Array:
        """Return the value with its norms brought into the range."""
        norms = _norms(value, self.axis)
        clipped = namespace(value).clip(norms, self.min_value, self.max_value)
        desired = self.rate * clipped + (1.0 - self.rate) * norms
        return _scaled(value, desired / (_EPSILON + norms))

    def get_config(self) -> dict[str, Any]:
        """Return the four arguments."""
        return {
            "min_value": self.min_value,
            "max_value": self.max_value,
            "rate": self.rate,
            "axis": self.axis,
        }


class MaxNorm(Constraint):
    """Norms above `max_value` are brought down to it: `w * clip(n, 0, max_value) / (1e-7 + n)`.

    Args:
        max_value: largest norm.
        axis: axes over which the norm is taken; see `MinMaxNorm`.

    Raises:
        ValueError: `max_value` is negative.

    Source: Srivastava et al., "Dropout", JMLR 15, 2014, section 5.1.
    """

    def __init__(self, max_value: float = 2.0, axis: Axis = 0) -> None:
        if not max_value >= 0.0:
            raise ValueError(f"max_value must be 0 or more, got {max_value}.")
        self.max_value = max_value
        self.axis = axis

    def __call__(self, value: Array) -> Array:
        """Return the value with no norm above the largest."""
        norms = _norms(value, self.axis)
        desired = namespace(value).minimum(norms, self.max_value)
        return _scaled(value, desired / (_EPSILON + norms))

    def get_config(self) -> dict[str, Any]:
        """Return the two arguments."""
        return {"max_value": self.max_value, "axis": self.axis}


class UnitNorm(Constraint):
    """Every norm becomes 1: `w / (1e-7 + n)`; a vector of zeros stays zero.

    Args:
        axis: axes over which the norm is taken; see `MinMaxNorm`.
    """

    def __init__(self, axis: Axis = 0) -> None:
        self.axis = axis

    def __call__(self, value: Array) -> Array:
        """Return the value with norms of 1."""
        return _scaled(value, 1.0 / (_EPSILON + _norms(value, self.axis)))

    def get_config(self) -> dict[str, Any]:
        """Return the argument."""
        return {"axis": self.axis}


max_norm = MaxNorm
min_max_norm = MinMaxNorm
non_neg = NonNeg
unit_norm = UnitNorm


def _norms(value: Array, axis: Axis) -> Array:
    """Euclidean norms, the axes kept with length 1; float32 at least."""
    xp = namespace(value)
    wide = value.astype(np.float32) if value.dtype.itemsize < 4 else value
    axes = axis if axis is None or isinstance(axis, int) else tuple(axis)
    return xp.sqrt(xp.square(wide).sum(axis=axes, keepdims=True))  # type: ignore[no-any-return]


def _scaled(value: Array, factors: Array) -> Array:
    return (value * factors).astype(value.dtype, copy=False)
