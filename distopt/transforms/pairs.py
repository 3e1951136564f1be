"""What transforms are made of: (gradient, variable) pairs, and how a gradient is changed.

A gradient is an array, `IndexedSlices`, or None, which passes through. A gradient that lies in its
variable's arena is changed in place, so that what stands in the arena is what the optimizer applies.
Any other array belongs to whoever made it and is not modified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, namespace
from distopt.variables import IndexedSlices, Operand

__all__ = ["Gradient", "Pair", "Transform", "changed", "scaled", "stored", "values_of"]

Gradient: TypeAlias = Array | IndexedSlices | None
Pair: TypeAlias = tuple[Gradient, Any]
Transform: TypeAlias = Callable[[Iterable[Pair]], list[Pair]]


def changed(gradient: Gradient, variable: Any, change: Callable[[Array, Array | None], Array]) -> Gradient:
    """Apply `change(array, out)` to a gradient's values; `out` is the array itself in an arena."""
    if gradient is None:
        return None
    values = values_of(gradient)
    if isinstance(gradient, IndexedSlices):
        return IndexedSlices(change(values, None), gradient.indices, gradient.dense_shape)
    return change(values, values if _in_arena(values, variable) else None)


def scaled(gradient: Gradient, variable: Any, factor: Any) -> Gradient:
    """Multiply a gradient by a number or an array that broadcasts to it, on its own device."""

    def multiplied(array: Array, out: Array | None) -> Array:
        xp = namespace(array)
        if xp is np and np.size(factor) == 1 and float(np.reshape(factor, ())) == 1.0:
            return array
        # Half precision is multiplied in float32: a rounded factor would miss the limit by 0.4 %.
        wide = np.float32 if array.dtype.itemsize < 4 else array.dtype
        typed = xp.asarray(factor).astype(wide)
        with np.errstate(invalid="ignore", under="ignore"):  # inf * 0 is meant to be NaN
            if wide == array.dtype:
                return xp.multiply(array, typed, out=out)  # type: ignore[no-any-return]
            return stored((array.astype(wide) * typed).astype(array.dtype), out)

    return changed(gradient, variable, multiplied)


def stored(array: Array, out: Array | None) -> Array:
    """Return `array`, or `out` with its values in it."""
    if out is None:
        return array
    out[...] = array
    return out


def values_of(gradient: Any) -> Array:
    """Return a gradient's array: the rows of slices, the value of a Tensor; numbers become float32."""
    if isinstance(gradient, IndexedSlices):
        return gradient.values
    if isinstance(gradient, Operand):
        return gradient.value
    return gradient if hasattr(gradient, "dtype") else np.asarray(gradient, np.float32)


def _in_arena(array: Array, variable: Any) -> bool:
    held = getattr(variable, "gradient", None)
    if held is None:
        return False
    return array is held or bool(namespace(array).may_share_memory(array, held))
