"""How a sliding window covers an axis: output sizes and TensorFlow's padding arithmetic."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

__all__ = ["Axis", "Padding", "axis", "pair"]

Padding: TypeAlias = Literal["SAME", "VALID"]


class Axis(NamedTuple):
    """One spatial axis under a sliding window.

    Output position o covers the inputs from `o * stride - before` to `o * stride - before +
    window`.

    Attributes:
        size: number of inputs.
        window: number of inputs that the window covers.
        stride: distance of neighbouring windows.
        before: positions of padding before the first input.
        after: positions of padding after the last input.
        out: number of outputs.
    """

    size: int
    window: int
    stride: int
    before: int
    after: int
    out: int

    @property
    def covered(self) -> int:
        """Positions from the first that a window covers to the last, padding included."""
        return (self.out - 1) * self.stride + self.window if self.out else 0


def axis(size: int, window: int, stride: int, padding: Padding) -> Axis:
    """Return the geometry of an axis, as TensorFlow defines it.

    "SAME": out = ceil(size / stride), and the padding that this needs goes half before and half
    after, the odd one after. "VALID": no padding, out = ceil((size - window + 1) / stride).

    Raises:
        ValueError: window or stride below 1, an unknown padding, or "VALID" with a window that does
            not fit into the input.
    """
    if window < 1 or stride < 1:
        raise ValueError(f"window and stride must be at least 1, got {window} and {stride}.")
    if padding == "SAME":
        out = -(-size // stride)
        total = max((out - 1) * stride + window - size, 0)
        return Axis(size, window, stride, total // 2, total - total // 2, out)
    if padding == "VALID":
        if size < window:
            raise ValueError(
                f"a window of {window} does not fit into {size} inputs with padding 'VALID'. "
                "Use padding='SAME', a smaller window, or larger images."
            )
        return Axis(size, window, stride, 0, 0, (size - window) // stride + 1)
    raise ValueError(f"padding must be 'SAME' or 'VALID', got {padding!r}.")


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of a value that is given once for both or for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
