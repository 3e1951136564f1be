"""Gradient accumulation: the gradients of several micro-batches are summed here and exchanged once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Aggregator, Pair
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.arguments import whole_number
from distopt.aggregators.saved import gradients_from_arrays, gradients_to_arrays
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Variable, concatenated, dense_gradient, value_of

__all__ = ["Accumulate"]


class Accumulate(Aggregator):
    """Sums gradients and tickets of `steps` calls, and gives the sums to `inner` in the last of them.

    With `AllReduce(communicator)` in it the result is the mean over all examples of all micro-batches of
    all ranks, never a mean of means: micro-batches may have different sizes, also none. In between
    `ready` is False: no update is made, `iterations` and schedules stand still. All ranks make the same
    number of calls.

    In between `ticket` has this rank's own sums so far; after an exchange the totals of all its
    micro-batches. Nothing is sent in between, so an error or a wish to stop waits for the exchange.

    The sums take 1 x the gradients of memory, in their dtype. In the exchanging call each gradient is
    added to its sum as it comes, so the exchange overlaps that backward pass as it would without this.

    Horovod's `backward_passes_per_step` and PyTorch's `no_sync` sum like this; dividing is left to the
    user there.

    With `Sharded` in it the optimizer's slots are divided as without this; the sums are not.

    Args:
        inner: aggregates the sums.
        steps: how many calls make one exchange.

    Raises:
        TypeError: `inner` is no aggregator, or `steps` no whole number.
        ValueError: `steps` is below 1.
    """

    def __init__(self, inner: Aggregator, steps: int) -> None:
        super().__init__()
        given: Any = inner
        if not isinstance(given, Aggregator):
            raise TypeError(
                f"Accumulate needs an aggregator, such as AllReduce(communicator), got {given!r:.60}"
            )
        self.inner = inner
        self.steps = whole_number(steps, "Accumulate's number of micro-batches, steps,", 1)
        self.ownership = inner.ownership
        self.communicator: Communicator | None = getattr(inner, "communicator", None)
        self.reduction: str = getattr(inner, "reduction", "sum")
        self._calls = 0
        self._sums: dict[int, _Sum] = {}
        self._own = Ticket()
        self._exchanged = False

    @property
    def micro_batches(self) -> int:
        """How many micro-batches wait for the exchange."""
        return self._calls

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Add gradients up, and exchange them in each `steps`-th call; see `Aggregator.reduce`.

        Raises:
            ValueError: `inner` averages, and no number of examples was given; or a shape differs.
        """
        if ticket is None and self.reduction == "mean":
            raise ValueError(
                "reduction='mean' divides by the examples of all micro-batches, but their number was not "
                "given: pass examples=len(batch) to minimize or apply_gradients"
            )
        if self._calls + 1 < self.steps:
            return self._keep(pairs, ticket)
        return self._exchange(pairs, ticket)

    def _keep(self, pairs: Iterable[Pair], ticket: Ticket | None) -> list[Pair]:
        given = list(pairs)
        for gradient, variable in given:
            self._sum_of(variable).add(gradient)
        # A copy: what was given is the caller's, who may go on using it.
        self._own = self._own + (ticket or Ticket())
        self._calls += 1
        self.ticket, self.ready, self._exchanged = self._own, False, False
        self.exposed_seconds, self.wire_bytes = 0.0, 0
        return [(None, variable) for _, variable in given]

    def _sum_of(self, variable: Variable) -> _Sum:
        return self._sums.setdefault(id(variable), _Sum(variable))

    def _exchange(self, pairs: Iterable[Pair], ticket: Ticket | None) -> list[Pair]:
        """Reduce the sums of what was kept and of these pairs, and begin anew."""
        total = Ticket(step=None if ticket is None else ticket.step)
        reduced = self.inner.reduce(self._summed(pairs, ticket, total), total)
        self._begin_anew()
        self._exchanged = True
        self.ticket, self.ready = self.inner.ticket, self.inner.ready
        self.exposed_seconds, self.wire_bytes = self.inner.exposed_seconds, self.inner.wire_bytes
        return reduced

    def _summed(self, pairs: Iterable[Pair], ticket: Ticket | None, total: Ticket) -> Iterator[Pair]:
        """Yield the pairs with what was kept added, in the end those kept only; then fill in the ticket."""
        seen: set[int] = set()
        for gradient, variable in pairs:
            seen.add(id(variable))
            yield self._sum_of(variable).with_last(gradient), variable
        for key, kept in list(self._sums.items()):
            if key not in seen:
                yield kept.with_last(None), kept.variable
        # Now, because some is entered in the ticket only while the pairs are pulled.
        found = self._own + (ticket or Ticket())
        for field in fields(Ticket):
            if field.name != "step":
                setattr(total, field.name, getattr(found, field.name))

    def _begin_anew(self) -> None:
        for kept in self._sums.values():
            kept.clear()
        self._own = Ticket()
        self._calls = 0

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """Pass it on after an exchange. Collective as far as that of `inner` is."""
        if self._exchanged:
            self.inner.after_apply(variables)
            self.wire_bytes = self.inner.wire_bytes  # with what was sent after the update

    def settle(self, variables: Sequence[Variable], others: Sequence[Variable] = ()) -> None:
        """See `Aggregator.settle`; what is kept stays."""
        self.inner.settle(variables, others)

    def flush(self) -> list[Pair]:
        """Exchange the micro-batches that came since the last exchange; [] if there were none. Collective.

        For the end of an epoch that is no multiple of `steps`. What `inner` itself holds back comes when it
        is called again.
        """
        reduced = self._exchange((), None) if self._calls else []
        if not reduced or not self.ready:
            reduced = self.inner.flush()
            self.ready = self.inner.ready
        return reduced

    def state(self) -> dict[str, Array]:
        """Return the state of `inner` and, within an accumulation, the sum over ranks of what is kept.

        A run resumed from it adds in another order than one that went on: equal but for rounding. At a
        multiple of `steps` nothing is kept, and the bits are the same.
        """
        found = {f"inner/{name}": array for name, array in self.inner.state().items()}
        if not self._calls:
            return found
        ticket = self._own.to_array()
        kept = [(s.with_last(None), s.variable) for s in self._sums.values()]
        if self.communicator is not None:
            self.communicator.all_reduce(ticket).wait()
            kept = AllReduce(self.communicator, "sum").reduce(kept)
        return {
            **found,
            "calls": np.array(self._calls, np.int64),
            "ticket": ticket,
            **gradients_to_arrays(kept),
        }

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """Restore what `state` gave, also on another number of ranks: rank 0 gets what was kept.

        Raises:
            ValueError: it is the state of another aggregator or model, or of more `steps`.
        """
        inner = {k.removeprefix("inner/"): a for k, a in state.items() if k.startswith("inner/")}
        self.inner.load_state(inner, variables)
        self._begin_anew()
        left = {name: array for name, array in state.items() if not name.startswith("inner/")}
        if not left:
            return
        if not {"calls", "ticket"} <= left.keys():
            raise ValueError(
                f"the saved state of the aggregator, {sorted(left)[:3]}, is not that of Accumulate; use the "
                "aggregator that the checkpoint was written with"
            )
        calls = int(left.pop("calls"))
        if calls >= self.steps:
            raise ValueError(
                f"the saved state has {calls} micro-batches kept, but Accumulate exchanges every "
                f"{self.steps}; use steps > {calls}"
            )
        ticket = Ticket.from_array(left.pop("ticket"))
        pairs = gradients_from_arrays(left, variables)
        self._calls = calls
        leads = self.communicator is None or self.communicator.rank == 0
        self._own = ticket if leads else Ticket()
        for gradient, variable in pairs:
            self._sum_of(variable).add(gradient if leads else None)


class _Sum:
    """The sum of one variable's gradients: a dense part, rows, both or nothing."""

    def __init__(self, variable: Variable) -> None:
        self.variable = variable
        self._buffer: Array | None = None  # kept from one accumulation to the next
        self._has_dense = False
        self._rows: list[IndexedSlices] = []

    def add(self, gradient: Any) -> None:
        """Add a gradient, of which nothing is kept but the numbers."""
        given = value_of(gradient)
        if given is None:
            return
        with self.variable.device.activate():
            if isinstance(given, IndexedSlices):
                self._rows.append(
                    IndexedSlices(given.values.copy(), given.indices.copy(), self.variable.shape)
                )
                return
            dense = dense_gradient(given, self.variable)
            if self._buffer is None:
                self._buffer = dense.copy()
            elif self._has_dense:
                self._buffer += dense
            else:
                self._buffer[...] = dense
            self._has_dense = True

    def with_last(self, gradient: Any) -> Any:
        """Return the sum of what was added and one more, which is not kept: None, rows, or dense.

        A dense one of a variable in an arena is its place there, else new memory.
        """
        last = value_of(gradient)
        with self.variable.device.activate():
            rows = list(self._rows)
            if isinstance(last, IndexedSlices):
                rows.append(last)
                last = None
            if last is None and not self._has_dense:
                return concatenated(rows) if rows else None
            total = self._dense(last)
            if rows:
                total += concatenated(rows).to_dense()
            return total

    def _dense(self, last: Any) -> Array:
        variable, kept = self.variable, self._buffer if self._has_dense else None
        place = (
            variable.gradient
            if variable.slab is not None
            else variable.device.empty(variable.shape, variable.dtype)
        )
        assert place is not None
        if last is None:
            place[...] = kept
            return place
        if last is not place:
            place[...] = dense_gradient(last, variable)
        if kept is not None:
            place += kept
        return place

    def clear(self) -> None:
        """Begin a new sum."""
        self._has_dense = False
        self._rows = []
