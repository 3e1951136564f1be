"""What an aggregator is: local gradient sums in, identical global gradients out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from distopt.aggregators.ownership import Ownership
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Variable, adopted_gradient, value_of

__all__ = ["Aggregator", "GradientAggregator", "Pair", "begin_step", "taken"]

Pair: TypeAlias = "tuple[Any, Any]"
"""(gradient: array, IndexedSlices or None; Variable)."""

GradientAggregator: TypeAlias = "Aggregator | Callable[[list[Pair]], Iterable[Pair]]"
"""What optimizers accept: one of ours, which stream, or any callable list -> list, as Keras does."""


def begin_step(communicator: Communicator, pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Tell a communicator that a step begins, and return its pairs, to be read instead of the given ones.

    Gradients of other libraries become arrays of NumPy or CuPy. Where a test asked for a NaN at this step
    (`distopt.testing.Fault`), it is in the first gradient.

    Args:
        communicator: over whose ranks the pairs will be reduced.
        pairs: what `Aggregator.reduce` was given; read one by one.
    """
    return taken(pairs, communicator.begin_step())


def taken(pairs: Iterable[Pair], spoiled: bool = False) -> Iterator[Pair]:
    """Return pairs with the gradients of other libraries as arrays, as they come; see `begin_step`.

    Args:
        pairs: what `Aggregator.reduce` was given.
        spoiled: whether the first gradient shall have a NaN: what `Communicator.begin_step` said.
    """
    adopted = ((adopted_gradient(gradient, variable), variable) for gradient, variable in pairs)
    return _with_nan(adopted) if spoiled else adopted


def _with_nan(pairs: Iterable[Pair]) -> Iterator[Pair]:
    done = False
    for given, variable in pairs:
        gradient = given
        if not done and given is not None and not _is_empty(given):
            gradient, done = _spoiled(given, variable), True
        yield gradient, variable
    if not done:
        raise ValueError("a fault asked for a NaN in a gradient of this step, but it has none with elements")


def _is_empty(gradient: Any) -> bool:
    values: Any = gradient.values if isinstance(gradient, IndexedSlices) else value_of(gradient)
    return 0 in getattr(values, "shape", ())


def _spoiled(gradient: Any, variable: Variable) -> Any:
    if isinstance(gradient, IndexedSlices):
        return IndexedSlices(_spoiled(gradient.values, variable), gradient.indices, gradient.dense_shape)
    array: Array = gradient
    if gradient is not variable.gradient:  # the arena is ours to change, other memory is not
        array = variable.device.asarray(value_of(gradient), variable.dtype).copy()
    array.reshape(-1)[:1] = np.nan
    return array


class Aggregator(ABC):
    """Combines gradients over replicas. Consumes pairs one by one, so a tape's generator drives it.

    An aggregator of your own defines `reduce`; the other methods do nothing unless it defines them too.

    Attributes:
        ticket: the totals of the last `reduce`, the same on every rank.
        ready: whether the last `reduce` gave gradients to apply. False: nothing is to be updated in this
            step, because no rank had an example, or because gradients are being accumulated; all
            gradients are None then. The same on every rank (`LocalSGD` alone lets each decide for itself).
        exposed_seconds: time that the last `reduce` spent in communication calls, while nothing was
            computed: starting, polling and waiting, slower ranks included.
        wire_bytes: how many bytes of gradients this rank sent to others for the last `reduce`, encoded where
            a codec is, and of values where ranks exchange these after the update: 0 on one rank. An
            all-reduce of n bytes counts as 2 (size - 1) / size n, whichever way it goes. Tickets don't count.
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

    def aggregate(self, pairs: Iterable[Pair], examples: float | None = None) -> list[Pair]:
        """Return the global gradients: `reduce` by a number of examples, for programs without our optimizers.

        Args:
            pairs: as for `reduce`; the gradients may be arrays of any library that speaks DLPack or an array
                interface, such as PyTorch's and JAX's.
            examples: how many examples this rank's gradients are sums over; aggregators that average by the
                global batch need it.
        """
        return self.reduce(pairs, None if examples is None else Ticket(examples=examples))

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

    def flush(self) -> list[Pair]:
        """Return the global gradients that were held back and not given out yet; none usually. Collective.

        They are applied by `apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)`.
        """
        return []

    def settle(self, variables: Sequence[Variable], others: Sequence[Variable] = ()) -> None:
        """Make alike on all ranks what the aggregator lets differ between steps, usually nothing. Collective.

        To be called where training pauses: before a checkpoint, before an evaluation, at the end.

        Args:
            variables: those that are trained.
            others: what else each rank updates by itself: slots, moving averages.
        """
        del variables, others

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
