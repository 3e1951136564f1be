"""Bias and relu, in place on what a matrix product left, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from distopt.backend import Array
from distopt.ops.kernels.stages import Context, Scratch, Sum

__all__ = ["BiasRelu"]


class BiasRelu:
    """y = relu(y + bias), where both parts are optional.

    Args:
        context: dtype and device.
        bias: one array [K], or nothing.
        relu: whether negative results become zero.
    """

    def __init__(self, context: Context, bias: Sequence[Array], relu: bool) -> None:
        self._xp = context.device.xp
        self._scratch = Scratch(context)
        self._relu = relu
        self._bias = bias[0] if bias else None
        self._sums = [Sum(context, (1, len(array))) for array in bias]

    def forward(self, y: Array) -> None:
        """Add the bias and remove what is negative, in place."""
        if self._bias is not None:
            y += self._bias
        if self._relu:
            # Against an array: NumPy's maximum is five times slower against a scalar.
            self._xp.maximum(y, self._scratch.zeros("zeros", y.shape), out=y)

    def backward(self, dy: Array, y: Array) -> Array:
        """Return the gradient before bias and relu, given their result, and add the bias's."""
        if self._relu:
            positive = self._xp.greater(
                y,
                self._scratch.zeros("zeros", y.shape),
                out=self._scratch.take("positive", y.shape, bool),
            )
            dy = self._xp.multiply(dy, positive, out=self._scratch.take("masked", y.shape))
        for total in self._sums:
            rows = dy.reshape(-1, dy.shape[-1])
            total.add_product(self._ones(len(rows)), rows)
        return dy

    def gradients(self) -> list[Array]:
        """Return [db], or an empty list where there is no bias."""
        return [total.result()[0] for total in self._sums]

    def _ones(self, count: int) -> Array:
        ones = self._scratch.take("ones", (1, count))
        ones.fill(1)
        return ones
