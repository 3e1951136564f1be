"""Max and average pooling over the taps of a window.

The inputs that a window of stride s sees at one of its places are one phase of the image (every
s-th row and column), shifted: pooling is elementwise work on such planes, and so is its gradient.
The planes may be strided views of an image, or arrays that a convolution wrote phase by phase (see
convpool.py).
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from distopt.backend import Array
from distopt.ops.kernels.geometry import Axis, Padding, axis, pair
from distopt.ops.kernels.stages import Context, Saved, Scratch, Shape

__all__ = ["AveragePool", "MaxPool", "Planes", "Taps"]

Planes: TypeAlias = dict[tuple[int, int], Array]
"""The phases of some images: (row phase, column phase) -> [n, rows, columns, C]."""

_ALL = slice(None)


class _Tap(NamedTuple):
    """One place of the window: which part of which plane it reads, and for which outputs.

    Outputs outside `window` see padding there. `code` numbers the places, earlier ones higher.
    `is_whole` says that it is the first to touch its plane and touches all of it.
    """

    phase: tuple[int, int]
    plane: tuple[slice, slice, slice]
    window: tuple[slice, slice, slice]
    code: int
    is_whole: bool


class Taps:
    """The places of a pooling window, and pooling over them.

    Attributes:
        fills_planes: whether the gradients write every element of every phase; where not, the
            planes must be zero before.
        code_dtype: what the positions of the maxima are stored in.
    """

    def __init__(self, rows: Axis, columns: Axis, scratch: Scratch, xp: types.ModuleType) -> None:
        self._xp, self._scratch = xp, scratch
        self._rows, self._columns = rows, columns
        places = [
            (_reach(rows, i), _reach(columns, j))
            for i in range(rows.window)
            for j in range(columns.window)
        ]
        # The place where no window has padding: all windows start inside after their padding.
        self._anchor = rows.before * columns.window + columns.before
        whole: set[tuple[int, int]] = set()
        self._taps: list[_Tap] = []
        for number, (row, column) in enumerate(places):
            phase = (row.phase, column.phase)
            is_whole = row.is_whole and column.is_whole and phase not in whole
            if is_whole:
                whole.add(phase)
            self._taps.append(
                _Tap(
                    phase,
                    (_ALL, row.plane, column.plane),
                    (_ALL, row.window, column.window),
                    len(places) - number,
                    is_whole,
                )
            )
        self.fills_planes = len(whole) == rows.stride * columns.stride
        self.code_dtype = np.uint8 if len(places) < 256 else np.uint16

    def views(self, x: Array) -> Planes:
        """Return the phases of images [n, H, W, C] as views."""
        rows, columns = self._rows.stride, self._columns.stride
        return {(i, j): x[:, i::rows, j::columns] for i in range(rows) for j in range(columns)}

    def maximum(self, planes: Planes, out: Array, codes: Array | None) -> None:
        """Write each window's largest value to `out`, and to `codes` where it first was.

        A NaN in a window becomes its value, with code 0: no gradient.
        """
        anchor = self._taps[self._anchor]
        self._xp.copyto(out, planes[anchor.phase][anchor.plane])
        for tap in self._taps:
            if tap is not anchor:
                part = out[tap.window]
                self._xp.maximum(part, planes[tap.phase][tap.plane], out=part)
        if codes is None:
            return
        codes.fill(0)
        equal = self._scratch.take("equal", out.shape, bool)
        for tap in self._taps:
            hit = equal[tap.window]
            self._xp.equal(planes[tap.phase][tap.plane], out[tap.window], out=hit)
            hit = hit.view(np.uint8)
            part = codes[tap.window]
            if codes.dtype == np.uint8:
                self._xp.multiply(hit, tap.code, out=hit)
                self._xp.maximum(part, hit, out=part)
            else:
                self._xp.maximum(part, hit * codes.dtype.type(tap.code), out=part)

    def to_maximum(self, dy: Array, codes: Array, planes: Planes) -> None:
        """Add each output's gradient to the input that `codes` names."""
        equal = self._scratch.take("equal", dy.shape, bool)
        product = self._scratch.take("product", dy.shape)
        for tap in sorted(self._taps, key=lambda tap: not tap.is_whole):
            hit = equal[tap.window]
            self._xp.equal(codes[tap.window], tap.code, out=hit)
            target = planes[tap.phase][tap.plane]
            if tap.is_whole:
                self._xp.multiply(dy[tap.window], hit, out=target)
            else:
                target += self._xp.multiply(dy[tap.window], hit, out=product[tap.window])

    def total(self, planes: Planes, out: Array) -> None:
        """Write each window's sum to `out`."""
        anchor = self._taps[self._anchor]
        self._xp.copyto(out, planes[anchor.phase][anchor.plane])
        for tap in self._taps:
            if tap is not anchor:
                out[tap.window] += planes[tap.phase][tap.plane]

    def to_all(self, dy: Array, planes: Planes) -> None:
        """Add each output's gradient to all inputs of its window."""
        for tap in sorted(self._taps, key=lambda tap: not tap.is_whole):
            target = planes[tap.phase][tap.plane]
            if tap.is_whole:
                target[...] = dy[tap.window]
            else:
                target += dy[tap.window]


class _Reach(NamedTuple):
    phase: int
    plane: slice
    window: slice
    is_whole: bool


def _reach(line: Axis, place: int) -> _Reach:
    """Return what one place of the window reads along an axis."""
    shift, phase = divmod(place - line.before, line.stride)
    length = max(0, -(-(line.size - phase) // line.stride))
    first = max(0, -shift)
    last = max(first, min(line.out, length - shift))
    is_whole = first + shift == 0 and last + shift == length
    return _Reach(phase, slice(first + shift, last + shift), slice(first, last), is_whole)


class _Pool:
    """What both kinds of pooling share: geometry and the arrays around the work on planes."""

    def __init__(self, context: Context, rows: Axis, columns: Axis) -> None:
        self._context = context
        self._scratch = Scratch(context)
        self._taps = Taps(rows, columns, self._scratch, context.device.xp)
        self._out = (rows.out, columns.out, context.shape[2])

    def _output(self, n: int, out: Array | None) -> Array:
        if out is not None:
            return out
        return self._context.device.empty((n, *self._out), self._context.dtype)

    def _gradient(self, n: int) -> Array:
        make = self._context.device.empty if self._taps.fills_planes else self._context.device.zeros
        return make((n, *self._context.shape), self._context.dtype)

    def parameter_gradients(self) -> list[Array]:
        """Return nothing: pooling has no parameters."""
        return []


class _MaxPoolKernel(_Pool):
    def forward(self, x: Array, out: Array | None, keep: bool) -> tuple[Array, Saved]:
        y = self._output(len(x), out)
        codes = self._context.device.empty(y.shape, self._taps.code_dtype) if keep else None
        self._taps.maximum(self._taps.views(x), y, codes)
        return y, () if codes is None else (codes,)

    def backward(self, dy: Array, saved: Saved, input_gradient: bool) -> Array | None:
        if not input_gradient:
            return None
        dx = self._gradient(len(dy))
        self._taps.to_maximum(dy, saved[0], self._taps.views(dx))
        return dx


class _AveragePoolKernel(_Pool):
    def __init__(self, context: Context, rows: Axis, columns: Axis) -> None:
        super().__init__(context, rows, columns)
        counts = np.outer(_counts(rows), _counts(columns))[:, :, None]
        self._shares = context.device.asarray(1.0 / counts, context.dtype)

    def forward(self, x: Array, out: Array | None, keep: bool) -> tuple[Array, Saved]:
        y = self._output(len(x), out)
        self._taps.total(self._taps.views(x), y)
        y *= self._shares
        return y, ()

    def backward(self, dy: Array, saved: Saved, input_gradient: bool) -> Array | None:
        if not input_gradient:
            return None
        dx = self._gradient(len(dy))
        share = self._scratch.take("share", dy.shape)
        self._context.device.xp.multiply(dy, self._shares, out=share)
        self._taps.to_all(share, self._taps.views(dx))
        return dx


def _counts(line: Axis) -> Array:
    """Return how many inputs (not padding) each window holds."""
    starts = np.arange(line.out) * line.stride - line.before
    return np.minimum(starts + line.window, line.size) - np.maximum(starts, 0)


@dataclass(frozen=True)
class _PoolStage:
    """Window, strides and padding, as in TensorFlow; a number stands for both axes.

    Attributes:
        window: rows and columns of the window.
        strides: distance of neighbouring windows.
        padding: "SAME" or "VALID".
    """

    window: int | tuple[int, int] = 2
    strides: int | tuple[int, int] = 2
    padding: Padding = "VALID"

    def axes(self, shape: Shape) -> tuple[Axis, Axis]:
        """Return the geometry over height and width."""
        window, strides = pair(self.window), pair(self.strides)
        return (
            axis(shape[0], window[0], strides[0], self.padding),
            axis(shape[1], window[1], strides[1], self.padding),
        )

    def output_shape(self, shape: Shape, parameters: Sequence[Array]) -> Shape:
        """Return the shape that one image becomes."""
        rows, columns = self.axes(shape)
        return rows.out, columns.out, shape[2]

    def bytes_per_image(self, shape: Shape, parameters: Sequence[Array], itemsize: int) -> int:
        """Return the size of one input."""
        return shape[0] * shape[1] * shape[2] * itemsize


class MaxPool(_PoolStage):
    """The largest value of each window; padding counts for nothing.

    The gradient goes to the first of several equal maxima (row by row), as in TensorFlow and
    PyTorch.
    """

    def bind(self, context: Context, parameters: Sequence[Array]) -> _MaxPoolKernel:
        """Return a kernel for this shape and dtype."""
        return _MaxPoolKernel(context, *self.axes(context.shape))


class AveragePool(_PoolStage):
    """The mean of each window's inputs; padding counts for nothing, as in TensorFlow."""

    def bind(self, context: Context, parameters: Sequence[Array]) -> _AveragePoolKernel:
        """Return a kernel for this shape and dtype."""
        return _AveragePoolKernel(context, *self.axes(context.shape))
