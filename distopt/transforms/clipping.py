"""The three clips, with Keras' names and TensorFlow's results for NaN, infinite and zero gradients.

    >>> import numpy as np
    >>> pairs = [(np.array([3.0, 4.0]), None), (None, None)]
    >>> clip_by_norm(pairs, 1.0)
    [(array([0.6, 0.8]), None), (None, None)]

In an optimizer they run in the order clipvalue, clipnorm, global_clipnorm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.backend import Array, namespace
from distopt.transforms.norms import global_norm, norm_of
from distopt.transforms.pairs import Pair, Transform, changed, scaled, stored

__all__ = [
    "ClipNorm",
    "ClipValue",
    "GlobalClipNorm",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clips",
]


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
        (changed(gradient, variable, lambda array, out: _clipped(array, limit, out)), variable)
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
        (scaled(gradient, variable, _factor(norm_of([gradient]), limit)), variable)
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
    return [(scaled(gradient, variable, factor), variable) for gradient, variable in pairs]


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


def _clipped(array: Array, limit: float, out: Array | None) -> Array:
    with np.errstate(over="ignore"):  # a limit beyond float16 doesn't limit
        edge = array.dtype.type(limit)
    if array.dtype.kind == "f":
        return namespace(array).clip(array, -edge, edge, out=out)  # type: ignore[no-any-return]
    # NumPy clips bfloat16, kind "V", in float32.
    return stored(namespace(array).clip(array, -edge, edge).astype(array.dtype), out)
