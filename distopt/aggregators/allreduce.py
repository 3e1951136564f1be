"""AllReduce: the sum over all ranks, or the average over the global batch, in overlapped buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distopt.aggregators.aggregator import Aggregator, Pair
from distopt.aggregators.agreement import Agreement
from distopt.aggregators.buckets import BucketReduction, PlainReduction, SlabReduction
from distopt.aggregators.loose import RowsBesides, reduce_loose
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Slab, Variable, dense_gradient

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
        self._agreement = Agreement(communicator, f"AllReduce(reduction={reduction!r}, {bucket_bytes} bytes)")
        self._leading_slab: int | None = None

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`.

        Raises:
            ValueError: reduction is "mean" and no number of examples was given; a variable comes twice; a
                shape differs from its variable's.
            CommunicatorError: the ranks gave different variables, are at different steps, or one of them
                reported an error.
        """
        if self.reduction == "mean" and ticket is None:
            raise ValueError(
                "reduction='mean' divides by the examples of the global batch, but their number was not "
                "given: pass examples=len(batch) to minimize or apply_gradients, or use reduction='sum'"
            )
        self.exposed_seconds = 0.0
        self.wire_bytes = 0
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
                    slabs[slab.number] = SlabReduction(slab, self._start_bucket, self.bucket_bytes)
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

    def _start_bucket(self, slab: Slab, part: slice) -> BucketReduction:
        """Start the sum of a part of a slab's gradients, complete on this rank; to be overridden."""
        bucket = slab.gradients[part]
        self.wire_bytes += bucket.nbytes
        return PlainReduction(self.communicator.all_reduce(bucket), bucket)

    def _sum_packed(self, packed: Array, divisor: float | None, variables: Sequence[Variable]) -> None:
        """Sum the packed gradients of variables outside an arena, and divide them; to be overridden."""
        del variables
        self.wire_bytes += packed.nbytes
        PlainReduction(self.communicator.all_reduce(packed), packed).finish(divisor)

    def _finish(self, given: list[Pair], slabs: dict[int, SlabReduction], ticket: Ticket) -> list[Pair]:
        """Start what is left, in one order on all ranks, and wait for everything."""
        # Backward gives gradients as they become final, the missing ones last: sort that out.
        ordered = sorted(given, key=lambda pair: pair[1].number)
        self._agreement.start(ordered)
        # Only one slab streams, the first one of the step before: the order in which gradients come
        # depends on which a rank has, the order of the slabs does not.
        order = sorted(slabs, key=lambda number: (number != self._leading_slab, number))
        for number in order:
            slabs[number].fill_missing(slabs[number].slab.variables)
            if number == self._leading_slab:
                slabs[number].start_complete_buckets()
        self.ticket, presence = self._agreement.total(ticket, ordered)
        for number in order:
            slabs[number].start_complete_buckets()
        self._leading_slab = min(slabs, default=None)
        self.ready = self.reduction == "sum" or not self._agreement.says_nothing_to_do(self.ticket)
        divisor = self.ticket.examples if self.reduction == "mean" and self.ready else None
        reduced = reduce_loose(self.communicator, ordered, presence, divisor, self._sum_packed)
        for number in order:
            slabs[number].wait(divisor)
        if not self.ready:
            return [(None, variable) for _, variable in ordered]
        reduced = [(_joined(gradient, variable), variable) for gradient, variable in reduced]
        found = {id(variable): gradient for gradient, variable in reduced}
        # In one order on all ranks, for transforms that go by places or sum over gradients.
        return [(found[id(variable)], variable) for _, variable in ordered]


def _joined(gradient: Any, variable: Variable) -> Any:
    """Add the rows that some ranks had of an arena's variable to what the others had of the whole."""
    if not isinstance(gradient, RowsBesides):
        return gradient
    whole = variable.gradient
    assert whole is not None
    whole += gradient.rows.to_dense()
    return whole
