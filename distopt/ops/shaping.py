"""Primitives that move values without computing: reshape, transpose, concat, slices, gather.

All are linear, so that the backward half of one is another: slice_of and scatter_slice, gather and
scatter_rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.backend import namespace
from distopt.ops.broadcasting import unbroadcast
from distopt.tape import Context, Tensor, primitive
from distopt.tape.record import as_operand
from distopt.variables import IndexedSlices, Operand, Variable, operators, value_of

__all__ = [
    "broadcast_to",
    "concat",
    "expand_dims",
    "gather",
    "identity",
    "reshape",
    "scatter_rows",
    "scatter_slice",
    "slice_of",
    "squeeze",
    "stack",
    "stop_gradient",
    "transpose",
]


@primitive
def identity(context: Context, x: Any) -> Any:
    """Return `x` as a Tensor of its own."""
    return x


@identity.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream,)


identity.takes_slices = True


def stop_gradient(x: Any) -> Tensor:
    """Return the value of `x` as a constant: no gradient flows through it."""
    if isinstance(x, Variable):
        return Tensor(x.value.copy())
    return Tensor(x.value if isinstance(x, Operand) else x)


@primitive
def reshape(context: Context, x: Any, *, shape: Sequence[int]) -> Any:
    """Return `x` with another shape; one length may be -1, unless `x` is empty."""
    return x.reshape(tuple(shape))


@reshape.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream.reshape(context.inputs[0].shape),)


@primitive
def broadcast_to(context: Context, x: Any, *, shape: Sequence[int]) -> Any:
    """Return `x` repeated along axes of length 1 and new axes in front, to another shape."""
    return namespace(x).broadcast_to(x, tuple(shape))


@broadcast_to.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (unbroadcast(upstream, context.inputs[0]),)


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
    before: tuple[Any, ...] = (slice(None),) * (axis % upstream.ndim)
    gradients: list[Any] = []
    start = 0
    for part in context.inputs:
        stop = start + part.shape[axis]
        gradients.append(upstream[(*before, slice(start, stop))])
        start = stop
    return tuple(gradients)


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
    return (scatter_slice.alike(upstream, key=context.options["key"], shape=context.inputs[0].shape),)


@primitive
def scatter_slice(context: Context, x: Any, *, key: Any, shape: Sequence[int]) -> Any:
    """Return zeros of a shape with `x` at `[key]`, a key as `slice_of` takes it."""
    result = namespace(x).zeros(tuple(shape), x.dtype)
    result[key] = x
    return result


@scatter_slice.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream[context.options["key"]],)


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
    flat = namespace(value_of(table)).asarray(context.options["indices"]).reshape(-1)
    return (IndexedSlices(upstream.reshape((len(flat), *table.shape[1:])), flat, table.shape),)


@primitive
def scatter_rows(context: Context, values: Any, *, indices: Any, rows: int) -> Any:
    """Return an array of so many rows with `values` [n, ...] added at rows `indices` [n], else zeros.

    Raises:
        ValueError: an index is out of range, or not one for each of the values.
    """
    return IndexedSlices(values, indices, (rows, *values.shape[1:])).to_dense()


@scatter_rows.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (gather.alike(upstream, indices=context.options["indices"]),)


for _moves in (
    identity,
    reshape,
    broadcast_to,
    transpose,
    concat,
    slice_of,
    scatter_slice,
    gather,
    scatter_rows,
):
    _moves.linear = True
for _looks in (identity, reshape, broadcast_to, transpose, slice_of):
    _looks.gives_views = True

operators.update(
    concat=concat,
    identity=identity,
    reshape=reshape,
    scatter_rows=scatter_rows,
    slice_of=slice_of,
    transpose=transpose,
)


def stack(values: Sequence[Any], axis: int = 0, *, name: str | None = None) -> Tensor:
    """Return Tensors, arrays or numbers of one shape joined along a new axis.

    Args:
        values: at least one.
        axis: where the new axis is.
        name: of the result.

    Raises:
        ValueError: there are none, or their shapes differ.
    """
    values = [as_operand(v, values) if isinstance(v, list | tuple) else v for v in values]
    shapes = {tuple(np.shape(value_of(value))) for value in values}
    if len(shapes) != 1:
        raise ValueError(f"stack needs values of one shape, got {sorted(shapes)}")
    return concat(*(expand_dims(value, axis) for value in values), axis=axis, name=name)


def expand_dims(x: Any, axis: int, *, name: str | None = None) -> Tensor:
    """Return `x` with a new axis of length 1 at the place `axis`."""
    x = as_operand(x) if isinstance(x, list | tuple) else x
    shape = list(np.shape(value_of(x)))
    if not -len(shape) - 1 <= axis <= len(shape):
        raise ValueError(f"expand_dims can't put axis {axis} into shape {tuple(shape)}")
    shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, 1)
    return reshape(x if hasattr(x, "shape") else np.asarray(x, np.float32), shape=tuple(shape), name=name)


def squeeze(x: Any, axis: int | Sequence[int] | None = None, *, name: str | None = None) -> Tensor:
    """Return `x` without axes of length 1: those named, or all.

    Raises:
        ValueError: an axis that is named is longer.
    """
    x = as_operand(x) if isinstance(x, list | tuple) else x
    shape = np.shape(value_of(x))
    if axis is not None and any(not -len(shape) <= place < len(shape) for place in np.atleast_1d(axis)):
        raise ValueError(f"squeeze can't take axis {axis} from shape {shape}")
    chosen = range(len(shape)) if axis is None else np.atleast_1d(axis) % len(shape)
    if axis is not None and any(shape[place] != 1 for place in chosen):
        raise ValueError(f"squeeze needs axes of length 1, got axis {axis} of shape {shape}")
    left = tuple(n for place, n in enumerate(shape) if n != 1 or place not in chosen)
    return reshape(x, shape=left, name=name)


operators.update(stack=stack)
