"""AllReduce: the sum over all ranks, or the average over the global batch, in overlapped buckets."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Aggregator, Pair
from distopt.aggregators.buckets import SlabReduction
from distopt.aggregators.loose import reduce_loose
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator, Pending
from distopt.variables import IndexedSlices, Slab, Variable

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
    """

    def __init__(
        self, communicator: Communicator, reduction: str = "mean", bucket_bytes: int = 4 << 20
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean' (by global batch), got {reduction!r}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {bucket_bytes}")
        self.communicator = communicator
        self.reduction = reduction
        self.bucket_bytes = bucket_bytes
        self.exposed_seconds = 0.0
        self.bytes_reduced = 0

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`.

        Raises:
            ValueError: reduction is "mean" and no number of examples was given, or no rank has any.
        """
        if self.reduction == "mean" and ticket is None:
            raise ValueError(
                "reduction='mean' divides by the examples of the global batch, but their number was not "
                "given: pass examples=len(batch) to minimize or apply_gradients, or use reduction='sum'"
            )
        began = time.perf_counter()
        totals = (ticket or Ticket()).to_array()
        ticket_pending = self.communicator.all_reduce(totals)
        self.exposed_seconds = time.perf_counter() - began
        slabs: dict[int, SlabReduction] = {}
        given = self._consume(pairs, slabs)

        began = time.perf_counter()
        presence = self._finish_buckets(given, slabs)
        ticket_pending.wait()
        self.ticket = Ticket.from_array(totals)
        divisor = self._divisor()
        reduced = reduce_loose(self.communicator, given, presence, divisor)
        for reduction in slabs.values():
            reduction.wait(divisor)
        self.exposed_seconds += time.perf_counter() - began
        self.bytes_reduced = totals.nbytes + sum(r.slab.gradients.nbytes for r in slabs.values())
        return reduced

    def _consume(self, pairs: Iterable[Pair], slabs: dict[int, SlabReduction]) -> list[Pair]:
        """Pull the pairs, starting each bucket when it is complete and polling those in flight."""
        given: list[Pair] = []
        order: list[Slab] = []
        for gradient, variable in pairs:
            given.append((gradient, variable))
            slab = variable.slab
            if slab is not None:
                if id(slab) not in slabs:
                    slabs[id(slab)] = SlabReduction(slab, self.communicator, self.bucket_bytes)
                    order.append(slab)
                if gradient is not None:
                    _write_into_arena(gradient, variable)
                    slabs[id(slab)].add(variable)
            began = time.perf_counter()
            if order:
                # Only the first slab streams: a second one's buckets would start in an order that
                # depends on when its gradients come.
                slabs[id(order[0])].start_complete_buckets()
            # MPI moves data only inside its calls; without this, nothing would overlap.
            self.communicator.progress()
            self.exposed_seconds += time.perf_counter() - began
        return given

    def _finish_buckets(self, given: list[Pair], slabs: dict[int, SlabReduction]) -> Array:
        """Start what is left, and agree with all ranks which variables have a gradient of which kind."""
        for reduction in slabs.values():
            reduction.fill_missing(reduction.slab.variables)
            reduction.start_complete_buckets()
        presence = np.array(
            [[g is not None for g, _ in given], [isinstance(g, IndexedSlices) for g, _ in given]], np.float32
        )
        pending: Pending = self.communicator.all_reduce(presence.reshape(-1))
        pending.wait()
        return presence

    def _divisor(self) -> float | None:
        if self.reduction == "sum":
            return None
        if self.ticket.examples == 0:
            raise ValueError(
                "no rank has any example in this step, so there is nothing to average over; "
                "skip the step on every rank, or give at least one rank an example"
            )
        return self.ticket.examples


def _write_into_arena(gradient: Any, variable: Variable) -> None:
    if gradient is variable.gradient or variable.gradient is None:
        return
    dense = gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient
    if np.shape(dense) != variable.shape:
        raise ValueError(
            f"the gradient of variable {variable.name!r} has shape {np.shape(dense)}, "
            f"the variable has {variable.shape}"
        )
    variable.gradient[...] = variable.device.asarray(dense, variable.dtype)
