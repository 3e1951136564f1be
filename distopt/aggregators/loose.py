"""Reduce the gradients of variables outside an arena: dense ones packed, sparse ones as rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distopt.aggregators.aggregator import Pair
from distopt.aggregators.sparse import SparseExchange
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Variable, dense_gradient

__all__ = ["reduce_loose"]


def reduce_loose(
    communicator: Communicator,
    given: list[Pair],
    presence: Array,
    divisor: float | None,
    sum_packed: Callable[[Array, float | None, Sequence[Variable]], None],
    exchange: SparseExchange | None = None,
) -> list[Pair]:
    """Return all pairs with global gradients; those of arena variables are their arena views.

    Where all ranks that have a gradient of an arena's variable have rows, it is `RowsInArena`, for the caller
    to take the rows when the arena's part is complete.

    Args:
        communicator: over whose ranks.
        given: this rank's pairs, the same variables in the same order on every rank.
        presence: [3, pairs]: on how many ranks a variable has a gradient, how many of these are
            IndexedSlices, and how many rows these have together.
        divisor: what to divide sums by; None not to.
        sum_packed: sums an array over ranks and divides it, in place; is told whose gradients lie in it.
        exchange: of rows; all ranks' rows are gathered when None.
    """
    exchange = SparseExchange(communicator, "rows") if exchange is None else exchange
    kinds = [_kind(v, int(presence[0, i]), int(presence[1, i])) for i, (_, v) in enumerate(given)]
    dense = [i for i, kind in enumerate(kinds) if kind == "dense"]
    found: dict[int, Any] = {}
    for dtype in sorted({given[i][1].dtype.str for i in dense}):
        members = [i for i in dense if given[i][1].dtype.str == dtype]
        found.update(_reduce_packed(given, members, divisor, sum_packed))
    for i, kind in enumerate(kinds):
        gradient, variable = given[i]
        rows = gradient if isinstance(gradient, IndexedSlices) else None
        if kind == "rows":
            found[i] = exchange.sum(rows, variable, float(presence[2, i]), divisor)
        elif kind == "arena rows":
            found[i] = exchange.indices(rows, variable)
        elif kind == "arena":
            found[i] = variable.gradient
    return [(found.get(i), variable) for i, (_, variable) in enumerate(given)]


def _kind(variable: Variable, present: int, sparse: int) -> str:
    if present == 0:
        return "none"
    # Rows are kept only when no rank has a dense gradient of the variable.
    kind = "rows" if sparse == present else "dense"
    if variable.slab is None:
        return kind
    return "arena rows" if kind == "rows" else "arena"


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
