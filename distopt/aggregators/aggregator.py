"""What an aggregator is: local gradient sums in, identical global gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from distopt.aggregators.ticket import Ticket

__all__ = ["Aggregator", "GradientAggregator", "Pair"]

Pair: TypeAlias = "tuple[Any, Any]"
"""(gradient: array, IndexedSlices or None; Variable)."""

GradientAggregator: TypeAlias = "Aggregator | Callable[[list[Pair]], Iterable[Pair]]"
"""What optimizers accept: one of ours, which stream, or any callable list -> list, as Keras does."""


class Aggregator(ABC):
    """Combines gradients over replicas. Consumes pairs one by one, so a tape's generator drives it.

    Attributes:
        ticket: the totals of the last `reduce`, the same on every rank.
    """

    def __init__(self) -> None:
        self.ticket = Ticket()

    @abstractmethod
    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Return the global gradients of the same variables. Collective.

        Args:
            pairs: (gradient, variable), each gradient a sum over this rank's examples. Every rank gives
                the same variables, in any order and with None where it has no gradient. A gradient
                that is its variable's view of the arena is reduced in place.
            ticket: this rank's part of the step.

        Returns:
            Pairs whose gradients have identical bits on every rank, in the same order on every rank; None
            where no rank had a gradient.
        """

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Reduce plain pairs, as a Keras `gradient_aggregator` is called."""
        return self.reduce(pairs)
