"""Combine the gradients of several replicas of one rank before they go to the other ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from distopt.aggregators.aggregator import Pair

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
            moved = variable.device.asarray(other)
            if total is None:
                total = moved
            else:
                total += moved
        yield total, variable
