"""Combine the gradients of several replicas of one rank before they go to the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from distopt.aggregators.aggregator import Pair
from distopt.variables import IndexedSlices, Variable, add_gradients

__all__ = ["combine_replicas"]


def combine_replicas(replicas: Sequence[Iterable[Pair]]) -> Iterator[Pair]:
    """Yield the first replica's pairs with the gradients of all replicas summed, in replica order.

    The other replicas are run to their end first; the first one's gradients are then summed and passed
    on as they come, so their reduction still overlaps its backward pass.

    Args:
        replicas: one iterable of (gradient, variable) per replica, with variables of the same names.

    Raises:
        ValueError: a replica lacks a variable that the first has.
    """
    others = [{variable.name: gradient for gradient, variable in pairs} for pairs in replicas[1:]]
    for gradient, variable in replicas[0]:
        total = gradient
        for number, found in enumerate(others, 1):
            if variable.name not in found:
                raise ValueError(
                    f"replica {number} of this rank has no variable {variable.name!r}, replica 0 has; "
                    "build the same model on every replica"
                )
            other = found[variable.name]
            if other is None:
                continue
            total = _added(total, other, variable)
        yield total, variable


def _added(total: Any, other: Any, variable: Variable) -> Any:
    if isinstance(other, IndexedSlices):
        moved: Any = IndexedSlices(
            variable.device.asarray(other.values), variable.device.asarray(other.indices), other.dense_shape
        )
    else:
        moved = variable.device.asarray(other)
    if total is None:
        return moved
    if total is variable.gradient and not isinstance(moved, IndexedSlices):
        total += moved  # the arena is ours to change
        return total
    return add_gradients(total, moved)
