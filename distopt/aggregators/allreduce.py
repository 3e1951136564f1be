"""AllReduce: the sum over all ranks, or the average over the global batch, in overlapped buckets."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Aggregator, Pair
from distopt.aggregators.buckets import SlabReduction
from distopt.aggregators.loose import RowsBesides, reduce_loose
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.errors import CommunicatorError
from distopt.variables import IndexedSlices, Variable, dense_gradient

__all__ = ["AllReduce"]


class AllReduce(Aggregator):
    """Sums gradients over ranks; or divides the sum by the global number of examples.

    Gradients that lie in an arena are reduced in place, in buckets that start while backward still runs.
    Others are packed and reduced at the end.

    Args:
        communicator: over whose ranks.
        reduction: "mean": the sum over ranks divided by the examples of the global batch, which are
            counted in the same step, so ranks with unequal or no examples are right. "sum": the sum.
        bucket_bytes: size of the pieces that are reduced at a time, in bytes. 4 MiB measured best for
            MPI within a host.

    Attributes:
        exposed_seconds: time that the last `reduce` spent in communication calls, while nothing was
            computed: starting, polling and waiting, slower ranks included.
        bytes_reduced: how much the last `reduce` gave to the communicator.

    Raises:
        ValueError: unknown reduction, or `bucket_bytes` below 1.
        TypeError: `communicator` is none.
    """

    def __init__(
        self, communicator: Communicator, reduction: str = "mean", bucket_bytes: int = 4 << 20
    ) -> None:
        super().__init__()
        given: Any = communicator
        if not isinstance(given, Communicator):
            raise TypeError(
                f"AllReduce needs a communicator, such as distopt.connect() gives, got {given!r:.60}"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean' (by global batch), got {reduction!r}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        self.communicator = communicator
        self.reduction = reduction
        self.bucket_bytes = bucket_bytes
        self.exposed_seconds = 0.0
        self.bytes_reduced = 0
        self._leading_slab: int | None = None

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`.

        Raises:
            ValueError: reduction is "mean" and no number of examples was given, or no rank has any; a
                variable comes twice; a shape differs from its variable's.
            CommunicatorError: the ranks gave different variables.
        """
        if self.reduction == "mean" and ticket is None:
            raise ValueError(
                "reduction='mean' divides by the examples of the global batch, but their number was not "
                "given: pass examples=len(batch) to minimize or apply_gradients, or use reduction='sum'"
            )
        self.exposed_seconds = 0.0
        slabs: dict[int, SlabReduction] = {}
        given = self._consume(pairs, slabs)
        return self._timed(lambda: self._finish(given, slabs, ticket or Ticket()))

    def _timed(self, communicate: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = communicate()
        self.exposed_seconds += time.perf_counter() - began
        return result

    def _consume(self, pairs: Iterable[Pair], slabs: dict[int, SlabReduction]) -> list[Pair]:
        """Pull the pairs, starting each bucket when it is complete and polling those in flight."""
        given: list[Pair] = []
        seen: set[int] = set()
        for gradient, variable in pairs:
            if id(variable) in seen:
                raise ValueError(
                    f"variable {variable.name!r} comes twice; add its gradients up before reducing them"
                )
            seen.add(id(variable))
            given.append((gradient, variable))
            slab = variable.slab
            if slab is not None:
                if slab.number not in slabs:
                    slabs[slab.number] = SlabReduction(slab, self.communicator, self.bucket_bytes)
                if isinstance(gradient, IndexedSlices):
                    variable.gradient[...] = 0  # the rows go by themselves, at the end
                elif gradient is not None and gradient is not variable.gradient:
                    variable.gradient[...] = dense_gradient(gradient, variable)
                if gradient is not None:
                    slabs[slab.number].add(variable)
            leading = slabs.get(self._leading_slab) if self._leading_slab is not None else None
            if leading is not None:
                self._timed(leading.start_complete_buckets)
            # MPI moves data only inside its calls; without this, nothing would overlap.
            self._timed(self.communicator.progress)
        return given

    def _finish(self, given: list[Pair], slabs: dict[int, SlabReduction], ticket: Ticket) -> list[Pair]:
        """Start what is left, in one order on all ranks, and wait for everything."""
        # Only one slab streams, the first one of the step before: the order in which gradients come
        # depends on which a rank has, the order of the slabs does not.
        order = sorted(slabs, key=lambda number: (number != self._leading_slab, number))
        for number in order:
            slabs[number].fill_missing(slabs[number].slab.variables)
            slabs[number].start_complete_buckets()
        self._leading_slab = min(slabs, default=None)
        # Backward gives gradients as they become final, the missing ones last: sort that out.
        ordered = sorted(given, key=lambda pair: pair[1].number)
        totals = np.concatenate([ticket.to_array(), _fingerprint(ordered)])
        self.communicator.all_reduce(totals).wait()
        self._check_same_variables(totals[-2:])
        self.ticket = Ticket.from_array(totals[:-2])
        divisor = self._divisor()
        reduced = reduce_loose(self.communicator, ordered, self._presence(ordered), divisor)
        for number in order:
            slabs[number].wait(divisor)
        reduced = [(_joined(gradient, variable), variable) for gradient, variable in reduced]
        self.bytes_reduced = totals.nbytes + sum(r.slab.gradients.nbytes for r in slabs.values())
        found = {id(variable): gradient for gradient, variable in reduced}
        # In one order on all ranks, for transforms that go by places or sum over gradients.
        return [(found[id(variable)], variable) for _, variable in ordered]

    def _presence(self, given: list[Pair]) -> Array:
        """Return on how many ranks each variable has a gradient, and on how many it is sparse."""
        presence = np.array(
            [[g is not None for g, _ in given], [isinstance(g, IndexedSlices) for g, _ in given]], np.float32
        )
        self.communicator.all_reduce(presence.reshape(-1)).wait()
        return presence

    def _check_same_variables(self, sums: Array) -> None:
        """Raise on every rank unless all gave variables of the same shapes and dtypes.

        The sum of squares is the square of the sum over the number of ranks only if all are equal.
        """
        size = self.communicator.size
        if size * int(sums[1]) != int(sums[0]) ** 2:
            raise CommunicatorError(
                f"the {size} ranks gave gradients of different variables (their shapes and dtypes, in the "
                "order of their creation, differ). Build the same model in the same order on every rank, "
                "and give every variable on every rank, with None where it has no gradient."
            )

    def _divisor(self) -> float | None:
        if self.reduction == "sum":
            return None
        if self.ticket.examples == 0:
            raise ValueError(
                "no rank has any example in this step, so there is nothing to average over; "
                "skip the step on every rank, or give at least one rank an example"
            )
        return self.ticket.examples


def _joined(gradient: Any, variable: Variable) -> Any:
    """Add the rows that some ranks had of an arena's variable to what the others had of the whole."""
    if not isinstance(gradient, RowsBesides):
        return gradient
    whole = variable.gradient
    assert whole is not None
    whole += gradient.rows.to_dense()
    return whole


def _fingerprint(given: list[Pair]) -> Array:
    """Return a number that tells lists of variables apart, and its square, small enough to sum exactly."""
    schema = ";".join(f"{v.shape}{v.dtype.str}{v.slab is not None}" for _, v in given)
    number = float(zlib.crc32(schema.encode()) & 0xFFFFF)
    return np.array([number, number * number])
