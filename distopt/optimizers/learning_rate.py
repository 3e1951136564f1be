"""A learning rate that is read at every update, and that code written for tensors can compute with."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

__all__ = ["LearningRate"]


class LearningRate:
    """A callable without arguments that gives the present rate; arithmetic gives another such callable.

    `optimize_loss` hands it to functions that make optimizers, where TensorFlow hands them a tensor:
    `lambda rate: MomentumOptimizer(rate * 0.1, 0.9)` works, and follows a rate that changes.

    Args:
        read: callable without arguments that returns a number.
    """

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __call__(self) -> float:
        """Return the present rate."""
        return float(self._read())

    __float__ = __call__

    def _combined(self, function: Callable[[float, float], float], other: Any, swapped: bool) -> LearningRate:
        def read() -> float:
            now: Any = other() if callable(other) else other
            number = float(now)
            return function(number, self()) if swapped else function(self(), number)

        return LearningRate(read)

    def __add__(self, other: Any) -> LearningRate:
        return self._combined(operator.add, other, False)

    def __radd__(self, other: Any) -> LearningRate:
        return self._combined(operator.add, other, True)

    def __sub__(self, other: Any) -> LearningRate:
        return self._combined(operator.sub, other, False)

    def __rsub__(self, other: Any) -> LearningRate:
        return self._combined(operator.sub, other, True)

    def __mul__(self, other: Any) -> LearningRate:
        return self._combined(operator.mul, other, False)

    def __rmul__(self, other: Any) -> LearningRate:
        return self._combined(operator.mul, other, True)

    def __truediv__(self, other: Any) -> LearningRate:
        return self._combined(operator.truediv, other, False)

    def __rtruediv__(self, other: Any) -> LearningRate:
        return self._combined(operator.truediv, other, True)

    def __pow__(self, other: Any) -> LearningRate:
        return self._combined(operator.pow, other, False)

    def __repr__(self) -> str:
        return f"<LearningRate {self()}>"
