"""Reduce the gradients of variables outside an arena: dense ones packed, sparse ones as rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Pair
from distopt.backend import Array, namespace
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Variable, dense_gradient

__all__ = ["RowsBesides", "reduce_loose"]


class RowsBesides:
    """The rows of all ranks, of an arena's variable of which other ranks have the whole.

    Attributes:
        rows: divided already, to be added when the arena's part is.
    """

    def __init__(self, rows: IndexedSlices) -> None:
        self.rows = rows


def reduce_loose(
    communicator: Communicator,
    given: list[Pair],
    presence: Array,
    divisor: float | None,
    sum_packed: Callable[[Array, float | None, Sequence[Variable]], None],
) -> list[Pair]:
    """Return all pairs with global gradients; dense ones of arena variables are their arena views.

    Args:
        communicator: over whose ranks.
        given: this rank's pairs, the same variables in the same order on every rank.
        presence: [2, pairs]: on how many ranks a variable has a gradient, and how many of these are
            IndexedSlices.
        divisor: what to divide sums by; None not to.
        sum_packed: sums an array over ranks and divides it, in place; is told whose gradients lie in it.
    """
    kinds = [_kind(v, int(presence[0, i]), int(presence[1, i])) for i, (_, v) in enumerate(given)]
    dense = [i for i, kind in enumerate(kinds) if kind == "dense"]
    found: dict[int, Any] = {}
    for dtype in sorted({given[i][1].dtype.str for i in dense}):
        members = [i for i in dense if given[i][1].dtype.str == dtype]
        found.update(_reduce_packed(given, members, divisor, sum_packed))
    for i, kind in enumerate(kinds):
        if kind == "sparse":
            found[i] = _gather_rows(communicator, *given[i], divisor)
        elif kind == "arena":
            found[i] = given[i][1].gradient
        elif kind == "both":
            gradient, variable = given[i]
            rows = gradient if isinstance(gradient, IndexedSlices) else None
            found[i] = RowsBesides(_gather_rows(communicator, rows, variable, divisor))
    return [(found.get(i), variable) for i, (_, variable) in enumerate(given)]


def _kind(variable: Variable, present: int, sparse: int) -> str:
    if present == 0:
        return "none"
    # Rows are kept only when no rank has a dense gradient of the variable.
    if sparse == present:
        return "sparse"
    if variable.slab is None:
        return "dense"
    return "both" if sparse else "arena"


def _reduce_packed(
    given: list[Pair],
    members: list[int],
    divisor: float | None,
    sum_packed: Callable[[Array, float | None, Sequence[Variable]], None],
) -> dict[int, Array]:
    """Sum the gradients of several variables of one dtype as one array."""
    first = given[members[0]][1]
    sizes = [given[i][1].size for i in members]
    flat = first.device.zeros(sum(sizes), first.dtype)
    start = 0
    views: dict[int, Array] = {}
    for i, size in zip(members, sizes, strict=True):
        gradient, variable = given[i]
        view = flat[start : start + size].reshape(variable.shape)
        if gradient is not None:
            view[...] = dense_gradient(gradient, variable)
        views[i] = view
        start += size
    sum_packed(flat, divisor, [given[i][1] for i in members])
    return views


def _gather_rows(
    communicator: Communicator, gradient: IndexedSlices | None, variable: Variable, divisor: float | None
) -> IndexedSlices:
    """Concatenate the rows of all ranks, in rank order; ranks may have different numbers of them."""
    device = variable.device
    if gradient is None:
        gradient = IndexedSlices(
            device.zeros((0, *variable.shape[1:]), variable.dtype), device.zeros(0, np.int64), variable.shape
        )
    xp = namespace(variable.value)
    rows = xp.ascontiguousarray(device.asarray(gradient.values, variable.dtype))
    places = xp.ascontiguousarray(device.asarray(gradient.indices, np.int64))
    values = xp.concatenate(communicator.all_gather_rows(rows))
    indices = xp.concatenate(communicator.all_gather_rows(places))
    if divisor is not None:
        values /= values.dtype.type(divisor)
    return IndexedSlices(values, indices, variable.shape)
