"""Pooling loops compiled by numba, where it is installed: a third of NumPy's time.

NumPy walks through a window tap by tap, several times; a compiled loop keeps the maximum and its place in
registers. Both give the same values.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from distopt.backend import Array
from distopt.elementwise import jitted

__all__ = ["maximum_of_taps", "to_maximum_of_taps", "usable"]


def usable(xp: types.ModuleType) -> bool:
    """Return whether loops on arrays of this namespace can be compiled (see DISTOPT_NUMBA)."""
    return xp is np and jitted.usable()


@functools.cache
def maximum_of_taps() -> Callable[..., None]:
    """Return `maximum(flat, taps, steps, y, codes)`, compiled at its first call.

    flat: the inputs, as one row of numbers. taps [count, 6]: for each place of the window, where it
    starts in `flat`, its code, and its first and last (exclusive) output row and column. steps: the
    distance in `flat` between inputs of neighbouring images, output rows and output columns.
    y [n, rows, columns, C] and codes, of the same shape, are written.
    """

    def maximum(flat: Array, taps: Array, steps: Array, y: Array, codes: Array) -> None:
        images, rows, columns, channels = y.shape
        for image in range(images):
            for row in range(rows):
                for column in range(columns):
                    best = y[image, row, column]
                    place = codes[image, row, column]
                    is_first = True
                    here = image * steps[0] + row * steps[1] + column * steps[2]
                    for tap in range(len(taps)):
                        if not (taps[tap, 2] <= row < taps[tap, 3] and taps[tap, 4] <= column < taps[tap, 5]):
                            continue
                        start = here + taps[tap, 0]
                        values = flat[start : start + channels]
                        code = codes.dtype.type(taps[tap, 1])
                        if is_first:
                            is_first = False
                            for channel in range(channels):
                                best[channel] = values[channel]
                                place[channel] = code
                            continue
                        for channel in range(channels):
                            value = values[channel]
                            larger = (value > best[channel]) | (value != value)
                            best[channel] = value if larger else best[channel]
                            place[channel] = code if larger else place[channel]
                    for channel in range(channels):
                        is_nan = best[channel] != best[channel]
                        place[channel] = 0 if is_nan else place[channel]

    return _compile(maximum)


@functools.cache
def to_maximum_of_taps() -> Callable[..., None]:
    """Return `to_maximum(dy, codes, taps, steps, flat)`, compiled at its first call.

    Adds dy to the element of `flat` that the code names; the arguments are those of `maximum`.
    """

    def to_maximum(dy: Array, codes: Array, taps: Array, steps: Array, flat: Array) -> None:
        images, _, _, channels = dy.shape
        zero = dy.dtype.type(0)
        for image in range(images):
            for tap in range(len(taps)):
                code = codes.dtype.type(taps[tap, 1])
                for row in range(taps[tap, 2], taps[tap, 3]):
                    for column in range(taps[tap, 4], taps[tap, 5]):
                        start = taps[tap, 0] + image * steps[0] + row * steps[1] + column * steps[2]
                        target = flat[start : start + channels]
                        gradient = dy[image, row, column]
                        place = codes[image, row, column]
                        for channel in range(channels):
                            hit = place[channel] == code
                            target[channel] += gradient[channel] if hit else zero

    return _compile(to_maximum)


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    import numba

    result: Any = numba.njit(nogil=True, error_model="numpy")(function)
    return result
