"""Regularizers: penalties on the values of variables, with their gradients in closed form.

Those whose names end with `_regularizer` have the factors and checks of TensorFlow's slim and
`tf.contrib.layers`: `l2_regularizer(x)` is x * sum(w**2) / 2. Those of Keras, `L1`, `L2` and `L1L2`, have no
half: `L2(x)` is x * sum(w**2), the same as `l2_regularizer(2 * x)`.

A regularizer given to `get_variable` or to a variable scope leaves one `RegularizationLoss` per
variable in a collection; nothing is added to a loss by itself. The penalty doesn't depend on
examples: with gradients that are sums over examples and a division by their global number, whoever
adds it up sees to it that it counts once.

    >>> float(l2_regularizer(0.1)(np.array([1.0, -2.0])))
    0.25
    >>> float(L2(0.1)(np.array([1.0, -2.0])))
    0.5
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, namespace

__all__ = [
    "Regularizer",
    "ElasticNet",
    "L1",
    "L1L2",
    "L2",
    "RegularizerSum",
    "l1",
    "l1_l2",
    "l1_l2_regularizer",
    "l1_regularizer",
    "l2",
    "l2_regularizer",
    "no_regularizer",
    "sum_regularizer",
]

_BLOCK = 32 * 1024  # elements; temporary arrays of this size stay in the cache


class Regularizer(abc.ABC):
    """A penalty on an array, and its gradient. Both take NumPy and CuPy arrays."""

    @abc.abstractmethod
    def loss(self, value: Array) -> Any:
        """Return the penalty: a scalar (an array of rank 0) of the value's dtype, on its device."""

    @abc.abstractmethod
    def gradient(self, value: Array, out: Array | None = None) -> Array:
        """Return the derivative of the penalty by each element.

        Args:
            value: array of any shape. Not modified.
            out: array of the same shape and dtype that takes the result; a new one when None.
        """

    @abc.abstractmethod
    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values."""

    def __call__(self, value: Any) -> Any:
        """Return the penalty on an array or a variable; `no_regularizer` returns None."""
        return self.loss(value.value if hasattr(value, "value") else value)


class ElasticNet(Regularizer):
    """`l1 * sum(|w|) + l2 * sum(w**2) / 2`; its gradient is `l1 * sign(w) + l2 * w`.

    Args:
        l1: factor of the sum of absolute values; sign(0) is 0.
        l2: factor of half the sum of squares.

    Raises:
        ValueError: a factor is negative or not finite.
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        for name, factor in (("l1", l1), ("l2", l2)):
            if not 0.0 <= factor < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more, got {factor}.")
        self.l1 = float(l1)
        self.l2 = float(l2)

    def loss(self, value: Array) -> Any:
        """Return the penalty, summed in float32 over blocks and in float64 over these."""
        xp = namespace(value)
        wide = np.float32 if value.dtype.itemsize < 4 else value.dtype
        total: Any = 0.0
        for (block,) in _blocks(value):
            block = block.astype(wide, copy=False)
            if self.l1:
                total = total + self.l1 * xp.abs(block).sum().astype(np.float64)
            if self.l2:
                total = total + 0.5 * self.l2 * xp.square(block).sum().astype(np.float64)
        return xp.asarray(total).astype(value.dtype)

    def gradient(self, value: Array, out: Array | None = None) -> Array:
        """Return `l1 * sign(value) + l2 * value`."""
        xp = namespace(value)
        result: Array = xp.empty_like(value) if out is None else out
        if self.l2:
            xp.multiply(value, value.dtype.type(self.l2), out=result)
        else:
            result.fill(0)
        if self.l1:
            for block, part in _blocks(value, result):
                signs = xp.sign(block)
                signs *= value.dtype.type(self.l1)
                part += signs
        return result

    def get_config(self) -> dict[str, Any]:
        """Return {"l1": ..., "l2": ...}."""
        return {"l1": self.l1, "l2": self.l2}

    def __repr__(self) -> str:
        return f"ElasticNet(l1={self.l1}, l2={self.l2})"


class L1L2(ElasticNet):
    """Keras' `l1 * sum(|w|) + l2 * sum(w**2)`, without a factor of one half.

    Args:
        l1: factor of the sum of absolute values.
        l2: factor of the sum of squares. (The attribute `l2` is twice it, the factor of half the sum.)

    Raises:
        ValueError: a factor is no number, negative (Keras lets it pass) or not finite.
    """

    def __init__(self, l1: float = 0.0, l2: float = 0.0) -> None:
        for name, factor in (("l1", l1), ("l2", l2)):
            number = isinstance(factor, numbers.Real) and not isinstance(factor, bool)
            if not number or not 0.0 <= factor < math.inf:
                raise ValueError(
                    f"Value: {factor!r} is not a valid regularization penalty number; {name} must be a "
                    "finite number, 0 or more."
                )
        super().__init__(l1, 2 * l2)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"l1": self.l1, "l2": self.l2 / 2}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


class L1(L1L2):
    """Keras' `l1 * sum(|w|)`.

    Args:
        l1: the factor.

    Raises:
        ValueError: it is no number, negative or not finite.
    """

    def __init__(self, l1: float = 0.01) -> None:
        super().__init__(l1, 0.0)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's argument."""
        return {"l1": self.l1}


class L2(L1L2):
    """Keras' `l2 * sum(w**2)`, without a factor of one half.

    Args:
        l2: the factor.

    Raises:
        ValueError: it is no number, negative or not finite.
    """

    def __init__(self, l2: float = 0.01) -> None:
        super().__init__(0.0, l2)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's argument."""
        return {"l2": self.l2 / 2}


def l1_l2(l1: float = 0.01, l2: float = 0.01) -> L1L2:
    """Return Keras' `L1L2`; unlike the class it has defaults of 0.01, as in Keras."""
    return L1L2(l1, l2)


l1 = L1
"""Keras' other name."""
l2 = L2
"""Keras' other name."""


class RegularizerSum(Regularizer):
    """The sum of several penalties.

    Args:
        parts: the regularizers to add up.
    """

    def __init__(self, parts: Sequence[Regularizer]) -> None:
        self.parts = tuple(parts)

    def loss(self, value: Array) -> Any:
        """Return the sum of the parts' penalties."""
        xp = namespace(value)
        total = xp.zeros((), value.dtype)
        for part in self.parts:
            total = total + part.loss(value)
        return xp.asarray(total).astype(value.dtype)

    def gradient(self, value: Array, out: Array | None = None) -> Array:
        """Return the sum of the parts' gradients."""
        result: Array = namespace(value).empty_like(value) if out is None else out
        result.fill(0)
        for part in self.parts:
            result += part.gradient(value)
        return result

    def get_config(self) -> dict[str, Any]:
        """Return {"parts": the parts themselves}."""
        return {"parts": self.parts}

    def __repr__(self) -> str:
        return f"RegularizerSum({list(self.parts)!r})"


class _NoRegularizer(ElasticNet):
    """No penalty at all; unlike None it keeps a variable from inheriting its scope's regularizer."""

    def __call__(self, value: Any) -> None:
        """Return None, as TensorFlow's `no_regularizer` does."""

    def __repr__(self) -> str:
        return "no_regularizer"


no_regularizer: Regularizer = _NoRegularizer()
"""Gives no penalty (its value is None); unlike None it overrides the regularizer of a scope."""


def l1_regularizer(scale: float) -> Regularizer:
    """Return the penalty `scale * sum(|w|)`; for scale 0.0, `no_regularizer`.

    Raises:
        ValueError: `scale` is an integer, negative or not finite.
    """
    return _elastic_net(_checked(scale), 0.0)


def l2_regularizer(scale: float) -> Regularizer:
    """Return the penalty `scale * sum(w**2) / 2`; for scale 0.0, `no_regularizer`.

    Raises:
        ValueError: `scale` is an integer, negative or not finite.
    """
    return _elastic_net(0.0, _checked(scale))


def l1_l2_regularizer(scale_l1: float = 1.0, scale_l2: float = 1.0) -> Regularizer:
    """Return the penalty `scale_l1 * sum(|w|) + scale_l2 * sum(w**2) / 2`.

    Raises:
        ValueError: a scale is an integer, negative or not finite.
    """
    return _elastic_net(_checked(scale_l1), _checked(scale_l2))


def sum_regularizer(regularizers: Sequence[Regularizer | None]) -> Regularizer | None:
    """Return the sum of regularizers; None among them are left out, and only None gives None."""
    given = [regularizer for regularizer in regularizers if regularizer is not None]
    if not given:
        return None
    parts = [regularizer for regularizer in given if regularizer is not no_regularizer]
    return RegularizerSum(parts) if parts else no_regularizer


def _elastic_net(l1: float, l2: float) -> Regularizer:
    return ElasticNet(l1, l2) if l1 or l2 else no_regularizer


def _checked(scale: float) -> float:
    if isinstance(scale, numbers.Integral):
        raise ValueError(f"scale cannot be an integer: {scale!r}. Write it as a float, as in 1.0.")
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"the scale of a regularizer must be a finite number, 0 or more, got {scale}.")
    return float(scale)


def _blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Cut contiguous NumPy arrays of one shape into pieces that fit the cache; others stay whole."""
    if any(namespace(array) is not np or not array.flags.c_contiguous for array in arrays):
        yield arrays
        return
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _BLOCK):
        yield tuple(array[start : start + _BLOCK] for array in flat)
