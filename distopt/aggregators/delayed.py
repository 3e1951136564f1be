"""One-step-delayed aggregation: the exchange of a step's gradients hides behind the whole next step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Aggregator, Pair, taken
from distopt.aggregators.agreement import Agreement
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.saved import gradients_from_arrays, gradients_to_arrays
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Slab, Variable, dense_gradient

__all__ = ["Delayed"]

_PIECE = 1 << 18


class Delayed(Aggregator):
    """Gives the global gradient of the step before, while that of this step is exchanged.

    Step t applies g(t - 1), computed at the variables of step t - 1. The first step has nothing to apply
    (`ready` is False). What is left after the last step comes from `flush`; a checkpoint holds it, so
    resuming gives the bits of a run that was not interrupted.

    Gradients in an arena have a second buffer of the same size, in which they are exchanged while the
    backward pass writes the next ones into the arena: 1 x the gradients more memory. Those outside are
    exchanged within the step, and delayed like the others.

    `ticket` has the totals of the present step: a loss that is not finite, an error and a wish to stop are
    known at once. `ready` says whether the step before had examples.

    With ChainerMN's double buffering, which this is after, the mean is over ranks; here it is the inner
    aggregator's.

    Args:
        inner: aggregates. Only an `AllReduce`, or one of its kind that overrides how a bucket is reduced,
            exchanges in the background; of others the result alone is delayed. How much runs in the
            background is up to the communicator: an all_reduce that blocks hides nothing.

    Raises:
        TypeError: `inner` is no aggregator, or one that does something after each update or holds
            gradients back itself.
    """

    def __init__(self, inner: Aggregator) -> None:
        super().__init__()
        given: Any = inner
        if not isinstance(given, Aggregator):
            raise TypeError(
                f"Delayed needs an aggregator, such as AllReduce(communicator), got {given!r:.60}"
            )
        for name in ("after_apply", "flush"):
            if getattr(type(inner), name) is not getattr(Aggregator, name):
                raise TypeError(
                    f"Delayed can't delay {type(inner).__name__}, which has a `{name}` of its own: it would "
                    "be called for another step. Use AllReduce(communicator), or leave Delayed out."
                )
        self.inner = inner
        self.ownership = inner.ownership
        self.communicator: Communicator | None = getattr(inner, "communicator", None)
        self.reduction: str = getattr(inner, "reduction", "sum")
        self._agreement = None if self.communicator is None else Agreement(self.communicator, "Delayed")
        self._second: dict[int, Variable] = {}  # id of a variable -> its double, whose gradient is exchanged
        self._first: dict[int, Variable] = {}  # and back
        self._buffers: list[tuple[Slab, Array]] = []
        self._pending: Callable[[], list[Pair]] | None = None
        self._pending_ready = True

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Start the exchange of these gradients, and return those of the call before; see `Aggregator`."""
        given = list(self._polled(pairs))
        began = time.perf_counter()
        if not self._second and self._agreement is not None:
            self._agreement.start(sorted(given, key=lambda pair: pair[1].number))
        self._double([variable for _, variable in given])
        due = None if self._pending is None else self._placed(self._pending())
        ready = due is not None and self._pending_ready
        self._pending = None
        sent = [self._moved(gradient, variable) for gradient, variable in given]
        for slab, buffer in self._buffers:
            if due is None:
                buffer[...] = slab.gradients
            else:
                _swap(slab.gradients, buffer)
        self._pending = _started(self.inner, sent, ticket)
        self._pending_ready = self.inner.ready
        self.ticket, self.ready = self.inner.ticket, ready
        self.wire_bytes = self.inner.wire_bytes
        self.exposed_seconds = time.perf_counter() - began
        if not ready or due is None:
            return [(None, variable) for _, variable in sorted(given, key=lambda pair: pair[1].number)]
        return self._of_originals(due)

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """Count what was sent after the update."""
        del variables
        self.wire_bytes = self.inner.wire_bytes

    def _polled(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        for pair in taken(pairs):
            yield pair
            if self.communicator is not None:
                self.communicator.progress()  # MPI moves the last step's data only inside its calls

    def _double(self, variables: Iterable[Variable]) -> None:
        """Make doubles of variables, with gradients in a second buffer where they lie in an arena."""
        new = {id(v): v for given in variables for v in (given.slab.variables if given.slab else [given])}
        ordered = sorted((v for v in new.values() if id(v) not in self._second), key=lambda v: v.number)
        slabs: dict[int, Slab] = {}
        for variable in ordered:
            double = Variable(0.0, variable.trainable, variable.name, variable.dtype, device=variable.device)
            double.value = variable.value
            self._second[id(variable)] = double
            self._first[id(double)] = variable
            if variable.slab is not None:
                slabs[variable.slab.number] = variable.slab
        for _, slab in sorted(slabs.items()):
            buffer = self._allocated(slab)
            self._buffers.append((slab, buffer))
            doubles = [self._second[id(variable)] for variable in slab.variables]
            second = Slab(slab.values, buffer, doubles)
            for variable, double in zip(slab.variables, doubles, strict=True):
                double.slab, double.start = second, variable.start
                double.gradient = buffer[variable.start : variable.start + variable.size].reshape(
                    variable.shape
                )

    def _allocated(self, slab: Slab) -> Array:
        if self.communicator is not None and isinstance(slab.gradients, np.ndarray):
            return self.communicator.allocate(slab.gradients.size, slab.dtype)
        return slab.variables[0].device.zeros(slab.gradients.size, slab.dtype)

    def _moved(self, gradient: Any, variable: Variable) -> Pair:
        """Return the pair as the double's; a dense one of an arena is put there, to go with its slab."""
        double = self._second[id(variable)]
        if gradient is None or isinstance(gradient, IndexedSlices) or variable.slab is None:
            return gradient, double
        if gradient is not variable.gradient:
            place = variable.gradient
            assert place is not None
            place[...] = dense_gradient(gradient, variable)
        return double.gradient, double

    def _placed(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return pairs of doubles with all dense gradients of an arena in the second buffer."""
        found: list[Pair] = []
        for gradient, double in pairs:
            place = double.gradient
            if place is None or gradient is None or isinstance(gradient, IndexedSlices):
                found.append((gradient, double))
                continue
            if gradient is not place:
                place[...] = gradient
            found.append((place, double))
        return found

    def _of_originals(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return pairs of doubles as those of the variables, after the buffers were swapped."""
        found: list[Pair] = []
        for gradient, double in pairs:
            variable = self._first[id(double)]
            in_arena = gradient is not None and gradient is double.gradient
            found.append((variable.gradient if in_arena else gradient, variable))
        return found

    def flush(self) -> list[Pair]:
        """Return the gradients of the last step, which were not given out yet, or []. Collective."""
        if self._pending is None:
            return []
        due = self._placed(self._pending())
        self._pending = None
        for slab, buffer in self._buffers:
            slab.gradients[...] = buffer
        self.ready = self._pending_ready
        if not self.ready:
            return []
        return self._of_originals(due)

    def state(self) -> dict[str, Array]:
        """Return the pending global gradients, for which it waits, and the state of `inner`. Collective."""
        found = {f"inner/{name}": array for name, array in self.inner.state().items()}
        if self._pending is None:
            return found
        due = self._pending()
        self._pending = lambda: due
        found["ready"] = np.array(self._pending_ready, np.int64)
        return found | gradients_to_arrays(due)

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """Restore what `state` gave, also on another number of ranks: what is pending is the same on all.

        Raises:
            ValueError: it is the state of another aggregator or model.
        """
        self._double(variables)
        doubles = [self._second[id(v)] for v in sorted(variables, key=lambda v: v.number)]
        inner = {k.removeprefix("inner/"): a for k, a in state.items() if k.startswith("inner/")}
        self.inner.load_state(inner, doubles)
        left = {name: array for name, array in state.items() if not name.startswith("inner/")}
        self._pending = None
        if not left:
            return
        if "ready" not in left:
            raise ValueError(
                f"the saved state of the aggregator, {sorted(left)[:3]}, is not that of Delayed; use the "
                "aggregator that the checkpoint was written with"
            )
        self._pending_ready = bool(left.pop("ready"))
        due = gradients_from_arrays(left, doubles)
        self._pending = lambda: due


def _started(inner: Aggregator, pairs: list[Pair], ticket: Ticket | None) -> Callable[[], list[Pair]]:
    if isinstance(inner, AllReduce) and type(inner).reduce is AllReduce.reduce:
        return inner.start(pairs, ticket)
    reduced = inner.reduce(pairs, ticket)
    return lambda: reduced


def _swap(first: Array, second: Array) -> None:
    for start in range(0, first.size, _PIECE):
        part = slice(start, start + _PIECE)
        kept = first[part].copy()
        first[part] = second[part]
        second[part] = kept
