"""Divide sums: 16-bit floats in float32, lest a sum or a divisor beyond their range spoil them."""

from __future__ import annotations

import numpy as np

from distopt.backend import Array
from distopt.communicators.communicator import wire_dtype

__all__ = ["divide", "put", "widened"]


def widened(values: Array) -> Array:
    """Return 16-bit floats as a float32 copy, to be summed and divided in; other arrays themselves."""
    wide: Array = values.astype(wire_dtype(values.dtype), copy=False)
    return wide


def divide(values: Array, divisor: float | None) -> None:
    """Divide in place: 16-bit floats in float32, rounded once in the end, others in their own dtype.

    Args:
        values: of floats.
        divisor: None not to divide.
    """
    if divisor is None:
        return
    wide = widened(values)
    wide /= wide.dtype.type(divisor)
    put(wide, values)


def put(total: Array, place: Array, copied: bool = False) -> None:
    """Write what was summed in `widened` values to its place; nothing is done where it lies there already.

    Args:
        total: shaped like `place`; what is beyond its range becomes infinite.
        place: the memory of `total` where both have one dtype, unless `copied`.
        copied: whether `total` always is memory of its own.
    """
    if copied or total.dtype != place.dtype:
        with np.errstate(over="ignore"):  # the value is beyond 16 bits: infinite it is seen
            place[...] = total
