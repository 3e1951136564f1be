"""Jacobians, row by row: one backward pass for each element of the target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from distopt.backend import namespace
from distopt.tape.backward import Walk, backward
from distopt.tape.record import Tensor
from distopt.variables import IndexedSlices, Operand, operators

__all__ = ["batch_jacobian", "check_batch", "jacobian", "or_zeros"]


def jacobian(target: Any, sources: list[Any], walk: Walk) -> dict[int, Any]:
    """Return by `id` of each source an array `target.shape + source.shape`, or None.

    Args:
        target: a Tensor.
        sources: Variables and Tensors.
        walk: through whose record; nothing of it may be released on the way.

    Raises:
        TypeError: the target is no Tensor of a floating dtype.
    """
    _check_target(target)
    rows: dict[int, list[Any]] = {id(source): [] for source in sources}
    for element in range(target.size):
        upstream = namespace(target.value).zeros_like(target.value).reshape(-1)
        upstream[element] = 1
        for gradient, source in backward([target], sources, [upstream.reshape(target.shape)], walk):
            rows[id(source)].append(_dense(gradient))
    return {
        id(source): _stacked(rows[id(source)], (*target.shape, *source.shape), source) for source in sources
    }


def batch_jacobian(target: Any, source: Any, walk: Walk) -> Any:
    """Return an array `target.shape + source.shape[1:]`, or None; see `jacobian`."""
    examples, width = len(target), math.prod(target.shape[1:])
    inner = source.shape[1:]
    columns: list[Any] = []
    for element in range(width):
        upstream = namespace(target.value).zeros_like(target.value).reshape(examples, width)
        upstream[:, element] = 1
        found = backward([target], [source], [upstream.reshape(target.shape)], walk)
        gradient = _dense(next(found)[0])
        # [examples, 1, ...]: the columns are joined along the second axis.
        columns.append(None if gradient is None else gradient.reshape((examples, 1, *inner)))
    return _stacked(columns, (*target.shape, *inner), source, axis=1)


def check_batch(target: Any, source: Any) -> None:
    """Check that target and source have examples in common.

    Raises:
        TypeError: the target is no Tensor of a floating dtype.
        ValueError: the first axes differ, or there is none.
    """
    _check_target(target)
    if not target.shape or not source.shape or target.shape[0] != source.shape[0]:
        raise ValueError(
            f"Need first dimension of target shape ({target.shape}) and source shape ({source.shape}) "
            "to match."
        )


def or_zeros(found: Any, target: Any, source: Any, zero: bool, batch: bool = False) -> Any:
    """Return the Jacobian, or zeros when it is None and they are asked for."""
    if found is not None or not zero:
        return found
    shape = (*target.shape, *source.shape[1 if batch else 0 :])
    return namespace(source.value).zeros(shape, source.dtype)


def _check_target(target: Any) -> None:
    if not isinstance(target, Operand) or target.value.dtype.kind not in "fV":
        kind = target.value.dtype if isinstance(target, Operand) else type(target).__name__
        raise TypeError(f"the target of a Jacobian must be a Tensor of a floating dtype, got {kind}")


def _dense(gradient: Any) -> Any:
    return gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient


def _stacked(rows: list[Any], shape: tuple[int, ...], source: Any, axis: int = 0) -> Any:
    """Return rows joined in one array, zeros for those that are None; None if all are."""
    xp = namespace(source.value)
    if not rows:
        return xp.zeros(shape, source.dtype)
    given = [row for row in rows if row is not None]
    if not given:
        return None
    zeros = xp.zeros(np.shape(given[0]), source.dtype)
    filled = [zeros if row is None else row for row in rows]
    if any(isinstance(row, Tensor) for row in filled):
        lined = [row.reshape((1, *row.shape)) if axis == 0 else row for row in filled]
        return operators["concat"](*lined, axis=axis).reshape(shape)
    return (xp.stack(filled) if axis == 0 else xp.concatenate(filled, axis=axis)).reshape(shape)
