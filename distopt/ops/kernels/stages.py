"""A `Stage` says what to compute; its `Kernel` computes it, a few images at a time.

All arrays are NHWC (batch, height, width, channels), all filters HWIO, as in TensorFlow. A kernel
is bound to one shape, one dtype and one set of parameters, lives from a forward pass to its
backward pass, and keeps its working memory in a `Scratch`, so that the pieces of a batch share
memory that stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from distopt.backend import Array, Device

__all__ = ["Context", "Kernel", "Saved", "Scratch", "Shape", "Stage", "Sum"]

Shape: TypeAlias = tuple[int, int, int]
"""Height, width and channels of one image."""

Saved: TypeAlias = tuple[Array, ...]
"""What the forward pass of a piece keeps for its backward pass."""


class Context(NamedTuple):
    """What a kernel is bound to.

    Attributes:
        shape: height, width and channels of its input.
        dtype: float32 or float64.
        device: where the arrays are.
        piece: the largest number of images it will be given at a time.
    """

    shape: Shape
    dtype: Any
    device: Device
    piece: int


class Kernel(Protocol):
    """A stage bound to a shape, a dtype and parameters; computes a few images at a time."""

    def forward(self, x: Array, out: Array | None, keep: bool) -> tuple[Array, Saved]:
        """Compute one piece.

        Args:
            x: [n, H, W, C], contiguous, n at most `Context.piece`. Not modified, and not kept
                unless the returned tuple holds it.
            out: where the result goes, contiguous; None for a new array.
            keep: whether `backward` will be called; without, the tuple is empty.
        """
        ...

    def backward(self, dy: Array, saved: Saved, input_gradient: bool) -> Array | None:
        """Add one piece's parameter gradients to the sums so far; return dx if it is asked for.

        `dy` is contiguous and is not modified.
        """
        ...

    def parameter_gradients(self) -> list[Array]:
        """Return the sums over all pieces, one for each parameter, and begin new sums."""
        ...


class Stage(Protocol):
    """The description of a step of a chain: hyperparameters only, no arrays."""

    def output_shape(self, shape: Shape, parameters: Sequence[Array]) -> Shape:
        """Return the shape that one image of `shape` becomes; ValueError if it can't be given."""
        ...

    def bytes_per_image(self, shape: Shape, parameters: Sequence[Array], itemsize: int) -> int:
        """Return how much memory the work on one image goes through: it decides the piece size."""
        ...

    def bind(self, context: Context, parameters: Sequence[Array]) -> Kernel:
        """Return a kernel for this shape and dtype and these parameter values."""
        ...


class Scratch:
    """Named working arrays of one kernel; each is allocated once and used for every piece."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._flat: dict[str, Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """Return a contiguous array of any values: the memory of the last call of this name."""
        count = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.size < count:
            flat = self._context.device.empty(count, dtype or self._context.dtype)
            self._flat[name] = flat
        return flat[:count].reshape(shape)

    def zeros(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return a contiguous array that was zero at first; what is written to it stays there."""
        if name not in self._flat:
            self._flat[name] = self._context.device.zeros(shape, self._context.dtype)
        return self._flat[name][: shape[0]]


class Sum:
    """The sum of one parameter's gradient over pieces, each of them a (batched) matrix product."""

    def __init__(self, context: Context, shape: tuple[int, ...]) -> None:
        self._context = context
        self._shape = shape
        self._total: Array | None = None
        self._part: Array | None = None

    def add_product(self, left: Array, right: Array) -> None:
        """Add `left @ right`."""
        xp, device = self._context.device.xp, self._context.device
        if self._total is None:
            self._total = device.empty(self._shape, self._context.dtype)
            xp.matmul(left, right, out=self._total)
            return
        if self._part is None:
            self._part = device.empty(self._shape, self._context.dtype)
        xp.matmul(left, right, out=self._part)
        self._total += self._part

    def result(self) -> Array:
        """Return the sum, zeros where nothing was added, and begin a new one."""
        total, self._total = self._total, None
        if total is None:
            return self._context.device.zeros(self._shape, self._context.dtype)
        return total
