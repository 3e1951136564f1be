"""Transforms: functions from (gradient, variable) pairs to pairs, between reduction and update.

They see global gradients, the same bits on every rank, so clipping is that of the whole batch. The
three clips have Keras' names and TensorFlow's results for NaN, infinite and zero gradients; in an
optimizer they run in the order clipvalue, clipnorm, global_clipnorm.

    >>> pairs = [(np.array([3.0, 4.0]), None), (None, None)]
    >>> clip_by_norm(pairs, 1.0)
    [(array([0.6, 0.8]), None), (None, None)]

A gradient is an array, `IndexedSlices`, or None, which passes through. Repeated rows of slices are
not summed first: as in TensorFlow [3, 4] at the rows [0, 0] has the norm 5.

A gradient that lies in its variable's arena is changed in place, so that what stands in the arena
is what the optimizer applies. Any other array belongs to whoever made it and is not modified.

Norms are square roots of sums in float64, of squares in float32 where these neither overflow nor
underflow: right to 2e-7, where TensorFlow sums in float32 and has infinite norms from gradients of
2e19 on. The order of summation is fixed and no BLAS is used, so ranks on different processors get
the same bits. On a GPU nothing here makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, namespace
from distopt.variables import IndexedSlices, Operand

__all__ = [
    "ClipNorm",
    "ClipValue",
    "GlobalClipNorm",
    "Gradient",
    "Pair",
    "Transform",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clips",
    "global_norm",
]

Gradient: TypeAlias = Array | IndexedSlices | None
Pair: TypeAlias = tuple[Gradient, Any]
Transform: TypeAlias = Callable[[Iterable[Pair]], list[Pair]]

_BLOCK = 32 * 1024  # elements; squares of this many float32 stay in the cache
# Below, float32 squares may have lost digits; above, they have overflowed.
_SMALLEST_SUM = 1e-30


def clip_by_value(pairs: Iterable[Pair], limit: float) -> list[Pair]:
    """Bring every element into [-limit, limit]. NaN stays NaN; infinity becomes the limit.

    Args:
        pairs: (gradient, variable).
        limit: 0 or more; 0 makes all gradients zero.

    Raises:
        ValueError: `limit` is negative or NaN.
    """
    _check_limit("clipvalue", limit)
    return [
        (_changed(gradient, variable, lambda array, out: _clipped(array, limit, out)), variable)
        for gradient, variable in pairs
    ]


def clip_by_norm(pairs: Iterable[Pair], limit: float) -> list[Pair]:
    """Scale each gradient whose Euclidean norm is above `limit` down to it.

    `g * limit / max(norm, limit)`. A zero gradient stays zero. An infinite element becomes NaN and
    the others of its gradient zero; a NaN makes its whole gradient NaN.

    Args:
        pairs: (gradient, variable).
        limit: 0 or more; 0 makes all gradients zero (but see above).

    Raises:
        ValueError: `limit` is negative or NaN.
    """
    _check_limit("clipnorm", limit)
    return [
        (_scaled(gradient, variable, _factor(_norm([gradient]), limit)), variable)
        for gradient, variable in pairs
    ]


def clip_by_global_norm(pairs: Iterable[Pair], limit: float, use_norm: Any = None) -> list[Pair]:
    """Scale all gradients by one factor, so that the norm of all together is at most `limit`.

    `g * limit / max(global_norm, limit)`. If the global norm is infinite or NaN every gradient
    becomes NaN. As in TensorFlow a negative limit does nothing.

    Args:
        pairs: (gradient, variable).
        limit: the largest global norm; 0 makes all gradients zero.
        use_norm: the global norm, where it is known already.

    Raises:
        ValueError: `limit` is NaN.
    """
    if math.isnan(limit):
        raise ValueError("the limit of clip_by_global_norm must be a number, got nan.")
    pairs = list(pairs)
    norm = global_norm(pairs) if use_norm is None else use_norm
    xp = namespace(norm)
    factor = 1.0 if limit < 0 else _factor(norm, limit)
    factor = xp.where(xp.isfinite(norm), factor, math.nan)
    return [(_scaled(gradient, variable, factor), variable) for gradient, variable in pairs]


def global_norm(pairs: Iterable[Pair]) -> Any:
    """Return the Euclidean norm of all gradients together, 0 when all are None.

    Returns:
        A float64 scalar; on a GPU an array of rank 0, for which the host doesn't wait.
    """
    return _norm([gradient for gradient, _ in pairs])


@dataclass(frozen=True)
class ClipValue:
    """`clip_by_value` with its limit, as a transform.

    Args:
        limit: largest absolute value of an element, 0 or more.

    Raises:
        ValueError: `limit` is negative or NaN.
    """

    limit: float

    def __post_init__(self) -> None:
        _check_limit("clipvalue", self.limit)

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the clipped pairs."""
        return clip_by_value(pairs, self.limit)


@dataclass(frozen=True)
class ClipNorm:
    """`clip_by_norm` with its limit, as a transform.

    Args:
        limit: largest norm of each gradient, 0 or more.

    Raises:
        ValueError: `limit` is negative or NaN.
    """

    limit: float

    def __post_init__(self) -> None:
        _check_limit("clipnorm", self.limit)

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the clipped pairs."""
        return clip_by_norm(pairs, self.limit)


@dataclass(frozen=True)
class GlobalClipNorm:
    """`clip_by_global_norm` with its limit, as a transform.

    Args:
        limit: largest norm of all gradients together, 0 or more.

    Raises:
        ValueError: `limit` is negative or NaN.
    """

    limit: float

    def __post_init__(self) -> None:
        _check_limit("global_clipnorm", self.limit)

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the clipped pairs."""
        return clip_by_global_norm(pairs, self.limit)


def clips(
    clipvalue: float | None = None,
    clipnorm: float | None = None,
    global_clipnorm: float | None = None,
) -> list[Transform]:
    """Return the transforms for an optimizer's three arguments, in Keras' order.

    Args:
        clipvalue: limit of `ClipValue`; None for none.
        clipnorm: limit of `ClipNorm`; None for none.
        global_clipnorm: limit of `GlobalClipNorm`; None for none.

    Raises:
        ValueError: a limit is negative, or both norms are given.
    """
    if clipnorm is not None and global_clipnorm is not None:
        raise ValueError(
            "cannot accept both clipnorm and global_clipnorm, "
            f"got clipnorm={clipnorm} and global_clipnorm={global_clipnorm}."
        )
    transforms: list[Transform] = []
    if clipvalue is not None:
        transforms.append(ClipValue(clipvalue))
    if clipnorm is not None:
        transforms.append(ClipNorm(clipnorm))
    if global_clipnorm is not None:
        transforms.append(GlobalClipNorm(global_clipnorm))
    return transforms


def _check_limit(name: str, limit: float) -> None:
    if not limit >= 0:
        raise ValueError(f"{name} must be 0 or more, got {limit}. Use None not to clip.")


def _factor(norm: Any, limit: float) -> Any:
    """What brings `norm` down to a limit of 0 or more; NaN if the norm is."""
    xp = namespace(norm)
    if limit == 0 or math.isinf(limit):  # 0/0 and inf/inf in the formula below
        return xp.where(xp.isnan(norm), norm, float(limit > 0))
    return limit / xp.maximum(norm, limit)


def _norm(gradients: Iterable[Gradient]) -> Any:
    parts = [_sum_of_squares(_values(given)) for given in gradients if given is not None]
    total = sum(parts[1:], parts[0]) if parts else np.float64(0.0)
    return namespace(total).sqrt(total)


def _sum_of_squares(values: Array) -> Any:
    xp = namespace(values)
    if xp is not np:
        return xp.square(values.astype(np.float64)).sum()
    flat = values.reshape(-1)
    squares = np.empty(min(_BLOCK, flat.size), np.float32)
    total = 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        part = 0.0
        if block.dtype == np.float32:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                part = float(np.add.reduce(np.square(block, out=squares[: block.size])))
        if not _SMALLEST_SUM < part < math.inf:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                part = float(np.square(block.astype(np.float64)).sum())
        total += part
    return np.float64(total)


def _scaled(gradient: Gradient, variable: Any, factor: Any) -> Gradient:
    def scaled(array: Array, out: Array | None) -> Array:
        xp = namespace(array)
        if xp is np and float(factor) == 1.0:
            return array
        # Half precision is multiplied in float32: a rounded factor would miss the limit by 0.4 %.
        wide = np.float32 if array.dtype.itemsize < 4 else array.dtype
        typed = xp.asarray(factor).astype(wide)
        with np.errstate(invalid="ignore", under="ignore"):  # inf * 0 is meant to be NaN
            if wide == array.dtype:
                return xp.multiply(array, typed, out=out)  # type: ignore[no-any-return]
            return _stored((array.astype(wide) * typed).astype(array.dtype), out)

    return _changed(gradient, variable, scaled)


def _clipped(array: Array, limit: float, out: Array | None) -> Array:
    with np.errstate(over="ignore"):  # a limit beyond float16 doesn't limit
        edge = array.dtype.type(limit)
    if array.dtype.kind == "f":
        return namespace(array).clip(array, -edge, edge, out=out)  # type: ignore[no-any-return]
    # NumPy clips bfloat16, kind "V", in float32.
    return _stored(namespace(array).clip(array, -edge, edge).astype(array.dtype), out)


def _stored(array: Array, out: Array | None) -> Array:
    if out is None:
        return array
    out[...] = array
    return out


def _changed(gradient: Gradient, variable: Any, change: Callable[[Array, Array | None], Array]) -> Gradient:
    """Apply `change(array, out)` to a gradient's values; `out` is the array itself in an arena."""
    if gradient is None:
        return None
    values = _values(gradient)
    if isinstance(gradient, IndexedSlices):
        return IndexedSlices(change(values, None), gradient.indices, gradient.dense_shape)
    return change(values, values if _in_arena(values, variable) else None)


def _in_arena(array: Array, variable: Any) -> bool:
    held = getattr(variable, "gradient", None)
    if held is None:
        return False
    return array is held or bool(namespace(array).may_share_memory(array, held))


def _values(gradient: Any) -> Array:
    if isinstance(gradient, IndexedSlices):
        return gradient.values
    if isinstance(gradient, Operand):
        return gradient.value
    return gradient if hasattr(gradient, "dtype") else np.asarray(gradient, np.float32)
