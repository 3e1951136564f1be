"""AllReduce: the sum over all ranks, or the average over the global batch, in overlapped buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distopt.aggregators.aggregator import Aggregator, Pair, begin_step
from distopt.aggregators.agreement import Agreement, DisagreementError
from distopt.aggregators.arguments import whole_number
from distopt.aggregators.bucket_size import DEFAULT_BUCKET_BYTES, measured_bucket_bytes
from distopt.aggregators.buckets import BucketReduction, PlainReduction, RecordedReduction, SlabReduction
from distopt.aggregators.loose import reduce_loose
from distopt.aggregators.sparse import (
    RowsInArena,
    SparseExchange,
    SparseMode,
    local_rows,
    put_into_arena,
)
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
        bucket_bytes: size of the pieces that are reduced at a time, in bytes; None: measured at the first
            step where ranks are processes (see `bucket_size`), else 4 MiB. With 3 ranks or more the order
            of additions depends on the size: give one where runs shall repeat to the last bit.
        sparse: how rows of variables outside an arena go: "rows", "dense" for the whole table, or "auto"
            for what is faster; see `SparseExchange`. The result is the same. Rows of an arena's variables
            are summed in the arena; keep a large table of which few rows are in use out of it.

    Raises:
        ValueError: unknown reduction or `sparse`, or `bucket_bytes` below 1.
        TypeError: `communicator` is none, or `bucket_bytes` no whole number.

    Attributes:
        bucket_bytes: size of a bucket; None until it is measured.
        recorder: told of what happened when, (lane, name, start, stop) with times of `perf_counter`: of the
            lanes "backward", "buckets" (from start until its end is noticed) and "exposed". None: nothing is.
    """

    def __init__(
        self,
        communicator: Communicator,
        reduction: str = "mean",
        bucket_bytes: int | None = None,
        sparse: SparseMode = "auto",
    ) -> None:
        super().__init__()
        given: Any = communicator
        if not isinstance(given, Communicator):
            raise TypeError(
                f"AllReduce needs a communicator, such as distopt.connect() gives, got {given!r:.60}"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean' (by global batch), got {reduction!r}")
        if bucket_bytes is not None:
            bucket_bytes = whole_number(bucket_bytes, "bucket_bytes", 1)
        self.communicator = communicator
        self.reduction = reduction
        self.bucket_bytes = bucket_bytes
        self.recorder: Callable[[str, str, float, float], None] | None = None
        size = "measured" if bucket_bytes is None else f"{bucket_bytes} bytes"
        self.sparse = SparseExchange(communicator, sparse)
        self._agreement = Agreement(
            communicator, f"AllReduce(reduction={reduction!r}, {size}, sparse={sparse!r})"
        )
        self._leading_slab: int | None = None
        self._slabs_before: dict[int, Slab] | None = None

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`.

        Raises:
            ValueError: reduction is "mean" and no number of examples was given; a variable comes twice; a
                shape differs from its variable's.
            CommunicatorError: the ranks gave different variables, are at different steps, or one of them
                reported an error.
        """
        return self.start(pairs, ticket)()

    def start(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> Callable[[], list[Pair]]:
        """Start `reduce` and return what waits for its end and gives its result; `ticket` is known at once.

        Gradients must not be touched in between, and no other step may be started. Those outside an arena
        are reduced before this returns.

        Args:
            pairs: see `Aggregator.reduce`.
            ticket: see `Aggregator.reduce`.

        Raises:
            ValueError, CommunicatorError: as `reduce`.
        """
        if self.reduction == "mean" and ticket is None:
            raise ValueError(
                "reduction='mean' divides by the examples of the global batch, but their number was not "
                "given: pass examples=len(batch) to minimize or apply_gradients, or use reduction='sum'"
            )
        self.exposed_seconds = 0.0
        self.wire_bytes = self.sparse.wire_bytes = 0
        slabs: dict[int, SlabReduction] = {}
        given = self._consume(begin_step(self.communicator, pairs), slabs)
        finish = self._timed("start", lambda: self._start_rest(given, slabs, ticket or Ticket()))
        return lambda: self._timed("finish", finish)

    def _timed(self, name: str, communicate: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = communicate()
        ended = time.perf_counter()
        self.exposed_seconds += ended - began
        self._record("exposed", name, began, ended)
        return result

    def _record(self, lane: str, name: str, began: float, ended: float) -> None:
        if self.recorder is not None:
            self.recorder(lane, name, began, ended)

    def _consume(self, pairs: Iterable[Pair], slabs: dict[int, SlabReduction]) -> list[Pair]:
        """Pull the pairs, starting each bucket when it is complete and polling those in flight."""
        given: list[Pair] = []
        seen: set[int] = set()
        resumed = time.perf_counter()
        for gradient, variable in pairs:
            self._record("backward", variable.name, resumed, time.perf_counter())
            if id(variable) in seen:
                raise ValueError(
                    f"variable {variable.name!r} comes twice; add its gradients up before reducing them"
                )
            seen.add(id(variable))
            if isinstance(gradient, IndexedSlices):
                gradient = local_rows(gradient, variable)
            given.append((gradient, variable))
            slab = variable.slab
            if slab is not None:
                if slab.number not in slabs:
                    size = self.bucket_bytes or DEFAULT_BUCKET_BYTES
                    slabs[slab.number] = SlabReduction(slab, self._start_recorded, size)
                if isinstance(gradient, IndexedSlices):
                    put_into_arena(gradient, variable)
                elif gradient is not None and gradient is not variable.gradient:
                    variable.gradient[...] = dense_gradient(gradient, variable)
                if gradient is not None:
                    slabs[slab.number].add(variable)
            leading = slabs.get(self._leading_slab) if self._leading_slab is not None else None
            if leading is not None:
                self._timed("start", leading.start_complete_buckets)
            # MPI moves data only inside its calls; without this, little would overlap.
            self._timed("poll", self.communicator.progress)
            resumed = time.perf_counter()
        return given

    def _start_recorded(self, slab: Slab, part: slice) -> BucketReduction:
        began = time.perf_counter()
        bucket = self._start_bucket(slab, part)
        if self.recorder is None:
            return bucket
        name = f"{(part.stop - part.start) * slab.dtype.itemsize} bytes"
        return RecordedReduction(bucket, lambda: self._record("buckets", name, began, time.perf_counter()))

    def _measure_bucket(self, slabs: dict[int, SlabReduction]) -> None:
        """Decide the size of buckets, once: in the first step with an arena, before any bucket starts."""
        if self.bucket_bytes is None and slabs:
            self.bucket_bytes = DEFAULT_BUCKET_BYTES
            if self.communicator.size > 1 and self.communicator.processes:
                largest = max(found.slab.gradients.nbytes for found in slabs.values())
                self.bucket_bytes = measured_bucket_bytes(self.communicator, largest)
            for found in slabs.values():
                found.set_bucket_bytes(self.bucket_bytes)

    def _start_bucket(self, slab: Slab, part: slice) -> BucketReduction:
        """Start the sum of a part of a slab's gradients, complete on this rank; to be overridden."""
        bucket = slab.gradients[part]
        reduction = PlainReduction(self.communicator, bucket)
        self.wire_bytes += reduction.sent
        return reduction

    def _sum_packed(self, packed: Array, divisor: float | None, variables: Sequence[Variable]) -> None:
        """Sum the packed gradients of variables outside an arena, and divide them; to be overridden."""
        del variables
        reduction = PlainReduction(self.communicator, packed)
        self.wire_bytes += reduction.sent
        reduction.finish(divisor)

    def _start_rest(
        self, given: list[Pair], slabs: dict[int, SlabReduction], ticket: Ticket
    ) -> Callable[[], list[Pair]]:
        """Start what is left, in one order on all ranks, and return what waits for everything."""
        # Backward gives gradients as they become final, the missing ones last: sort that out.
        ordered = sorted(given, key=lambda pair: pair[1].number)
        self._agreement.start(ordered)
        self._measure_bucket(slabs)
        # Only one slab streams, the first one of the step before: the order in which gradients come
        # depends on which a rank has, the order of the slabs does not.
        own_slabs = {number: slabs[number].slab for number in slabs}
        self._add_leading(slabs)
        order = sorted(slabs, key=lambda number: (number != self._leading_slab, number))
        for number in order:
            slabs[number].fill_missing(slabs[number].slab.variables)
            if number == self._leading_slab:
                slabs[number].start_complete_buckets()
        try:
            self.ticket, presence = self._agreement.total(ticket, ordered)
        except DisagreementError:
            self._drain(slabs, order)
            raise
        for number in order:
            slabs[number].start_complete_buckets()
        self._choose_leading(own_slabs)
        self.ready = self.reduction == "sum" or not self._agreement.says_nothing_to_do(self.ticket)
        divisor = self.ticket.examples if self.reduction == "mean" and self.ready else None
        reduced = reduce_loose(self.communicator, ordered, presence, divisor, self._sum_packed, self.sparse)
        self.wire_bytes += self.sparse.wire_bytes
        running, ready = [slabs[number] for number in order], self.ready

        def finish() -> list[Pair]:
            for slab in running:
                slab.wait(divisor)
            if not ready:
                return [(None, variable) for _, variable in ordered]
            found = {id(variable): _joined(gradient, variable) for gradient, variable in reduced}
            # In one order on all ranks, for transforms that go by places or sum over gradients.
            return [(found[id(variable)], variable) for _, variable in ordered]

        return finish

    def _drain(self, slabs: dict[int, SlabReduction], order: list[int]) -> None:
        """Wait for what has been started, on all ranks, before a step is given up."""
        for number in order:
            slabs[number].wait(None)

    def _add_leading(self, slabs: dict[int, SlabReduction]) -> None:
        """Take part in the leading slab's reduction even where this rank was given nothing of it.

        The other ranks may have started it already; that the variables differ is found by the ticket.
        """
        number = self._leading_slab
        if number is not None and number not in slabs:
            slab = (self._slabs_before or {})[number]
            slabs[number] = SlabReduction(
                slab, self._start_recorded, self.bucket_bytes or DEFAULT_BUCKET_BYTES
            )

    def _choose_leading(self, slabs: dict[int, Slab]) -> None:
        """Let the first slab stream in the next step, unless the slabs change from step to step."""
        same = self._slabs_before is None or self._slabs_before.keys() == slabs.keys()
        self._leading_slab = min(slabs, default=None) if same else None
        self._slabs_before = slabs


def _joined(gradient: Any, variable: Variable) -> Any:
    """Take the rows of an arena's variable when the arena's part is complete."""
    return gradient.slices(variable) if isinstance(gradient, RowsInArena) else gradient
