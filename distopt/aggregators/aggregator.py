"""What an aggregator is: local gradient sums in, identical global gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from distopt.aggregators.ownership import Ownership
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.variables import Variable

__all__ = ["Aggregator", "GradientAggregator", "Pair"]

Pair: TypeAlias = "tuple[Any, Any]"
"""(gradient: array, IndexedSlices or None; Variable)."""

GradientAggregator: TypeAlias = "Aggregator | Callable[[list[Pair]], Iterable[Pair]]"
"""What optimizers accept: one of ours, which stream, or any callable list -> list, as Keras does."""


class Aggregator(ABC):
    """Combines gradients over replicas. Consumes pairs one by one, so a tape's generator drives it.

    An aggregator of your own defines `reduce`; the other methods do nothing unless it defines them too.

    Attributes:
        ticket: the totals of the last `reduce`, the same on every rank.
        ready: whether the last `reduce` gave gradients to apply. False: nothing is to be updated in this
            step, because no rank had an example, or because gradients are being accumulated; all
            gradients are None then. The same on every rank.
        exposed_seconds: time that the last `reduce` spent in communication calls, while nothing was
            computed: starting, polling and waiting, slower ranks included.
        wire_bytes: how much of gradients the last `reduce` gave to the communicator, encoded.
        ownership: divides the optimizer's state among the ranks; None: every rank keeps all of it. An
            aggregator that wraps another passes on that one's.
    """

    ownership: Ownership | None = None

    def __init__(self) -> None:
        self.ticket = Ticket()
        self.ready = True
        self.exposed_seconds = 0.0
        self.wire_bytes = 0

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

    def reduce_parts(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Return what `reduce` does; of a gradient in an arena only what this rank owns need be right.

        Args:
            pairs: as for `reduce`.
            ticket: as for `reduce`.
        """
        return self.reduce(pairs, ticket)

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Reduce plain pairs, as a Keras `gradient_aggregator` is called."""
        return self.reduce(pairs)

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """Do what is left after the variables were updated; optimizers call it. Collective.

        Args:
            variables: those that `reduce` was given.
        """
        del variables

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint must hold for the aggregator to go on, by name. Collective."""
        return {}

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """Restore what `state` gave, also on another number of ranks. Collective.

        Args:
            state: the same on every rank.
            variables: all that will be given to `reduce`.

        Raises:
            ValueError: it is the state of another aggregator or model.
        """
        del variables
        if state:
            raise ValueError(
                f"{type(self).__name__} keeps nothing between steps, but the checkpoint holds "
                f"{sorted(state)[:3]} of another aggregator; use the one it was written with"
            )
