"""Sharded: each rank keeps a part of the optimizer's slots, and updates the values that belong to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from distopt.aggregators.aggregator import Pair
from distopt.aggregators.agreement import Agreement
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.divide import divide, put, widened
from distopt.aggregators.ownership import Ownership
from distopt.aggregators.ticket import Ticket
from distopt.aggregators.traffic import sent_by_half
from distopt.backend import Array
from distopt.communicators import Communicator, Pending
from distopt.communicators.communicator import cut
from distopt.variables import Slab, Variable

__all__ = ["ScatteredReduction", "Sharded"]


class ScatteredReduction:
    """The sum of a bucket: each rank has its part of it, or all ranks have all of it.

    16-bit floats are summed and divided in float32.

    Args:
        communicator: over whose ranks.
        bucket: [n], summed in place.
        whole: whether every rank shall have the whole sum.

    Attributes:
        sent: how many bytes this rank sends to others.
    """

    def __init__(self, communicator: Communicator, bucket: Array, whole: bool) -> None:
        self._communicator, self._bucket, self._whole = communicator, bucket, whole
        self._total = widened(bucket)
        self.sent = sent_by_half(self._total.nbytes, communicator.size)
        if whole:
            self.sent += sent_by_half(bucket.nbytes, communicator.size)
        self._pending: Pending = communicator.reduce_scatter(self._total)

    def finish(self, divisor: float | None) -> None:
        """See `BucketReduction.finish`; without `whole`, only this rank's part is the sum."""
        own = self._pending.wait()
        divide(own, divisor)
        put(own, self._bucket[cut(self._bucket.size, self._communicator.size)[self._communicator.rank]])
        if self._whole:
            self._communicator.all_gather_parts(self._bucket).wait()


class Sharded(AllReduce):
    """Sums or averages gradients as `AllReduce` does, and divides the optimizer's state among the ranks.

    ZeRO stage 1 (Rajbhandari et al. 2020, arxiv.org/abs/1910.02054): each bucket of gradients is
    reduce-scattered; each rank holds the slots of its parts, and updates the values of its parts; the values
    are gathered; then constraints and everything else see whole variables on every rank. An optimizer that
    has this as its `gradient_aggregator` does so by itself. Its updates (`apply_gradients`, `apply`) are
    collective then, and so are `state`, `load_state`, `get_weights` and `set_weights`, which give and take
    whole slots: a checkpoint knows nothing of the number of ranks.

    How slots are divided:

    - A rule that takes each element by itself, as most do: each bucket of the arena is cut into as many
      equal parts as there are ranks. A rank keeps 1/size of the slots, and at most one element for each
      bucket more.
    - A rule with norms of layers (LAMB, LARS, Muon): whole variables, the largest given away first. A rank
      keeps at least the largest variable's.
    - Variables outside an arena: whole variables.
    - Slots of an optimizer ported with Keras' or TensorFlow 1's hooks stay whole on every rank, for nobody
      knows what the hooks touch; so do extra slots of an optimizer of your own, and the weights that belong
      to no variable. A warning says so where nothing is divided.

    Sparse gradients are rows of all ranks on all ranks, as with `AllReduce`; each rank updates its part of
    the rows.

    The same bits: sums are made in the order of the ranks, ((a + b) + c) + ..., and rules work by element or
    by variable, so a step gives the values and slots that the unsharded step gives on gradients summed in
    this order. That is `AllReduce` over threads with any number of ranks, and over MPI with two. MPI's own
    sum of three or more ranks may round otherwise than a sum in rank order; values differ by that much then,
    and by nothing else. The result depends on the number of ranks as `AllReduce`'s does.

    Traffic, in units of the gradients' bytes: reduce-scatter 1, gather of values 1, which is that of an
    all-reduce. Where something looks at whole gradients, they are gathered too, which makes 3: `reduce` gives
    whole gradients always, so the Trainer, loss scaling, `optimize_loss` and you see them;
    `Optimizer.minimize` and `apply_gradients` do without them if they can: no clip, no transformer, no
    overridden `_transform_gradients`, and a rule that takes elements.

    Args:
        communicator: see `AllReduce`, as for those that follow.
        reduction: see there.
        bucket_bytes: see there.

    Attributes:
        ownership: who has what, for the optimizer.

    Raises:
        ValueError: unknown reduction, or `bucket_bytes` below 1.
        TypeError: `communicator` is none.
    """

    def __init__(
        self, communicator: Communicator, reduction: str = "mean", bucket_bytes: int = 4 << 20
    ) -> None:
        super().__init__(communicator, reduction, bucket_bytes)
        self._agreement = Agreement(communicator, f"Sharded(reduction={reduction!r}, {bucket_bytes} bytes)")
        self.ownership = Ownership(communicator, bucket_bytes, self._add_sent)
        self._whole = True

    def reduce_parts(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Reduce as `reduce` does, but leave each gradient of an arena right in this rank's part only.

        The rest of it holds anything. For callers that look at nothing else than
        `ownership.divide("elements")` gives them.
        """
        self._whole = False
        try:
            return self.reduce(pairs, ticket)
        finally:
            self._whole = True

    def _add_sent(self, nbytes: int) -> None:
        self.wire_bytes += nbytes

    def _start_bucket(self, slab: Slab, part: slice) -> ScatteredReduction:
        return self._scattered(slab.gradients[part], self._whole)

    def _sum_packed(self, packed: Array, divisor: float | None, variables: Sequence[Variable]) -> None:
        del variables
        self._scattered(packed, True).finish(divisor)

    def _scattered(self, bucket: Array, whole: bool) -> ScatteredReduction:
        reduction = ScatteredReduction(self.communicator, bucket, whole)
        self.wire_bytes += reduction.sent
        return reduction
