"""Primitives that move values without computing: reshape, transpose, concat, slices, gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.backend import namespace
from distopt.tape import Context, Tensor, primitive
from distopt.variables import IndexedSlices, Operand, operators

__all__ = ["concat", "gather", "identity", "reshape", "slice_of", "stop_gradient", "transpose"]


@primitive
def identity(context: Context, x: Any) -> Any:
    """Return `x` as a Tensor of its own."""
    return x


@identity.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream,)


def stop_gradient(x: Any) -> Tensor:
    """Return the value of `x` as a constant: no gradient flows through it."""
    return Tensor(x.value if isinstance(x, Operand) else x)


@primitive
def reshape(context: Context, x: Any, *, shape: Sequence[int]) -> Any:
    """Return `x` with another shape; one length may be -1, unless `x` is empty."""
    return x.reshape(tuple(shape))


@reshape.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream.reshape(context.inputs[0].shape),)


@primitive
def transpose(context: Context, x: Any, *, axes: Sequence[int] | None = None) -> Any:
    """Return `x` with its axes in another order; reversed when `axes` is None."""
    return x.transpose(axes)


@transpose.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    axes = context.options.get("axes")
    return (upstream.transpose(None if axes is None else np.argsort(axes).tolist()),)


@primitive
def concat(context: Context, *parts: Any, axis: int = 0) -> Any:
    """Return the parts joined along an axis."""
    return namespace(*parts).concatenate(parts, axis=axis)


@concat.gradient
def _(context: Context, upstream: Any) -> tuple[Any, ...]:
    axis = context.options.get("axis", 0)
    ends = np.cumsum([part.shape[axis] for part in context.inputs])[:-1].tolist()
    return tuple(namespace(upstream).split(upstream, ends, axis=axis))


@primitive
def slice_of(context: Context, x: Any, *, key: Any) -> Any:
    """Return `x[key]` for integers, slices, None and Ellipsis, as `tensor[key]` does.

    Raises:
        TypeError: the key holds an array or list; that is what `gather` is for.
    """
    for part in key if isinstance(key, tuple) else (key,):
        if not (part is None or part is Ellipsis or isinstance(part, slice) or hasattr(part, "__index__")):
            raise TypeError(f"an index must be made of integers and slices, got {part!r}; use ops.gather")
        if getattr(part, "ndim", 0):
            raise TypeError(f"an index must be made of integers and slices, got {part!r}; use ops.gather")
    return x[key]


@slice_of.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    x = context.inputs[0]
    gradient = namespace(x).zeros_like(x)
    gradient[context.options["key"]] = upstream
    return (gradient,)


@primitive
def gather(context: Context, table: Any, *, indices: Any) -> Any:
    """Return the rows `table[indices]`; the gradient by the table is an `IndexedSlices`.

    Args:
        context: of the tape.
        table: [rows, ...].
        indices: integers of any shape, 0 to rows - 1.

    Raises:
        ValueError: an index is out of range, or the indices are no integers.
    """
    xp = namespace(table)
    flat = xp.asarray(indices).reshape(-1)
    rows = xp.broadcast_to(table[:1], (len(flat), *table.shape[1:]))
    # For its checks alone: NumPy would take a negative index for one from the end.
    IndexedSlices(rows, flat, table.shape)
    return table[flat].reshape((*np.shape(indices), *table.shape[1:]))


@gather.gradient
def _(context: Context, upstream: Any) -> tuple[IndexedSlices]:
    table = context.inputs[0]
    flat = namespace(table).asarray(context.options["indices"]).reshape(-1)
    return (IndexedSlices(upstream.reshape(len(flat), *table.shape[1:]), flat, table.shape),)


operators.update(slice_of=slice_of)
