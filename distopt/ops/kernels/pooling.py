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
from distopt.ops.kernels import compiled
from distopt.ops.kernels.geometry import Axis, Padding, axis, pair
from distopt.ops.kernels.stages import Context, Saved, Scratch, Shape

__all__ = ["AveragePool", "MaxPool", "Phase", "Planes", "Taps"]

Phase: TypeAlias = tuple[int, int]
"""Rows and columns modulo the strides."""

_ALL = slice(None)


class Planes(NamedTuple):
    """The phases of some images.

    Attributes:
        memory: the contiguous array that holds them all.
        starts: where in it, flattened, each phase has its first value.
        views: each phase as [n, rows, columns, C]; all have the same strides.
    """

    memory: Array
    starts: dict[Phase, int]
    views: dict[Phase, Array]


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
        code_dtype: what the positions of the maxima are stored in.
    """

    def __init__(self, rows: Axis, columns: Axis, scratch: Scratch, xp: types.ModuleType) -> None:
        self._xp, self._scratch = xp, scratch
        self._rows, self._columns = rows, columns
        places = [
            (_reach(rows, i), _reach(columns, j)) for i in range(rows.window) for j in range(columns.window)
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
        self._tables: dict[tuple[int, ...], tuple[Array, Array]] = {}
        self._is_compiled = compiled.usable(xp)
        self._whole_first = sorted(self._taps, key=lambda tap: not tap.is_whole)
        self._fills_planes = len(whole) == rows.stride * columns.stride
        self.code_dtype = np.uint8 if len(places) < 256 else np.uint16

    def views(self, x: Array) -> Planes:
        """Return the phases of images [n, H, W, C] as views."""
        rows, columns = self._rows.stride, self._columns.stride
        _, _, width, channels = x.shape
        phases = [(i, j) for i in range(rows) for j in range(columns)]
        return Planes(
            x,
            {(i, j): (i * width + j) * channels for i, j in phases},
            {(i, j): x[:, i::rows, j::columns] for i, j in phases},
        )

    def maximum(self, planes: Planes, out: Array, codes: Array | None) -> None:
        """Write each window's largest value to `out`, and to `codes` where it first was.

        A NaN in a window becomes its value, with code 0: no gradient.
        """
        if self._is_compiled:
            if codes is None:
                codes = self._scratch.take("codes", out.shape, self.code_dtype)
            maximum = compiled.maximum_of_taps()
            maximum(planes.memory.reshape(-1), *self._table(planes, self._taps), out, codes)
            return
        anchor = self._taps[self._anchor]
        self._xp.copyto(out, planes.views[anchor.phase][anchor.plane])
        for tap in self._taps:
            if tap is not anchor:
                part = out[tap.window]
                self._xp.maximum(part, planes.views[tap.phase][tap.plane], out=part)
        if codes is None:
            return
        codes.fill(0)
        equal = self._scratch.take("equal", out.shape, bool)
        for tap in self._taps:
            hit = equal[tap.window]
            self._xp.equal(planes.views[tap.phase][tap.plane], out[tap.window], out=hit)
            hit = hit.view(np.uint8)
            part = codes[tap.window]
            if codes.dtype == np.uint8:
                self._xp.multiply(hit, tap.code, out=hit)
                self._xp.maximum(part, hit, out=part)
            else:
                self._xp.maximum(part, hit * codes.dtype.type(tap.code), out=part)

    def to_maximum(self, dy: Array, codes: Array, planes: Planes) -> None:
        """Write each input's sum of the gradients of the outputs whose `codes` name it."""
        if self._is_compiled:
            planes.memory.fill(0)
            to_maximum = compiled.to_maximum_of_taps()
            to_maximum(dy, codes, *self._table(planes, self._whole_first), planes.memory.reshape(-1))
            return
        self._clear(planes)
        equal = self._scratch.take("equal", dy.shape, bool)
        product = self._scratch.take("product", dy.shape)
        for tap in self._whole_first:
            hit = equal[tap.window]
            self._xp.equal(codes[tap.window], tap.code, out=hit)
            target = planes.views[tap.phase][tap.plane]
            if tap.is_whole:
                self._xp.multiply(dy[tap.window], hit, out=target)
            else:
                target += self._xp.multiply(dy[tap.window], hit, out=product[tap.window])

    def total(self, planes: Planes, out: Array) -> None:
        """Write each window's sum to `out`."""
        anchor = self._taps[self._anchor]
        self._xp.copyto(out, planes.views[anchor.phase][anchor.plane])
        for tap in self._taps:
            if tap is not anchor:
                out[tap.window] += planes.views[tap.phase][tap.plane]

    def to_all(self, dy: Array, planes: Planes) -> None:
        """Write each input's sum of the gradients of the outputs whose window holds it."""
        self._clear(planes)
        for tap in self._whole_first:
            target = planes.views[tap.phase][tap.plane]
            if tap.is_whole:
                target[...] = dy[tap.window]
            else:
                target += dy[tap.window]

    def _clear(self, planes: Planes) -> None:
        """Zero what the first tap of each phase does not write."""
        size = sum(view.size for view in planes.views.values())
        if not self._fills_planes or size < planes.memory.size:
            planes.memory.fill(0)

    def _table(self, planes: Planes, order: list[_Tap]) -> tuple[Array, Array]:
        """Return the taps and steps for the compiled loops (see compiled.py)."""
        view = planes.views[0, 0]
        key = (id(order), *view.shape, *planes.starts.values())
        if key not in self._tables:
            steps = np.array([stride // view.itemsize for stride in view.strides[:3]], np.int64)
            taps = [
                (
                    planes.starts[tap.phase]
                    + (tap.plane[1].start - tap.window[1].start) * steps[1]
                    + (tap.plane[2].start - tap.window[2].start) * steps[2],
                    tap.code,
                    tap.window[1].start,
                    tap.window[1].stop,
                    tap.window[2].start,
                    tap.window[2].stop,
                )
                for tap in order
            ]
            self._tables[key] = (np.array(taps, np.int64), steps)
        return self._tables[key]


class _Reach(NamedTuple):
    phase: int
    plane: slice
    window: slice
    is_whole: bool


def _reach(line: Axis, place: int) -> _Reach:
    """Return what one place of the window reads along an axis."""
    shift, phase = divmod(place - line.before, line.stride)
    length = line.length_of_phase(phase)
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

    def parameter_gradients(self) -> list[Array]:
        """Return nothing: pooling has no parameters."""
        return []


class _MaxPoolKernel(_Pool):
    def forward(self, x: Array, y: Array, keep: bool) -> Saved:
        codes = self._scratch.fresh("codes", y.shape, self._taps.code_dtype) if keep else None
        self._taps.maximum(self._taps.views(x), y, codes)
        return () if codes is None else (codes,)

    def backward(self, dy: Array, saved: Saved, dx: Array | None) -> None:
        if dx is not None:
            self._taps.to_maximum(dy, saved[0], self._taps.views(dx))


class _AveragePoolKernel(_Pool):
    def __init__(self, context: Context, rows: Axis, columns: Axis) -> None:
        super().__init__(context, rows, columns)
        counts = np.outer(_counts(rows), _counts(columns))[:, :, None]
        self._shares = context.device.asarray(1.0 / counts, context.dtype)

    def forward(self, x: Array, y: Array, keep: bool) -> Saved:
        self._taps.total(self._taps.views(x), y)
        y *= self._shares
        return ()

    def backward(self, dy: Array, saved: Saved, dx: Array | None) -> None:
        if dx is not None:
            share = self._scratch.take("share", dy.shape)
            self._context.device.xp.multiply(dy, self._shares, out=share)
            self._taps.to_all(share, self._taps.views(dx))


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
