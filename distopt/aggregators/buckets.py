"""Cut a slab's gradients into buckets, and start the reduction of each as soon as it is complete.

Buckets are slices of the arena: nothing is packed. They start in the arena's order, the same on every
rank, whichever gradients exist and whenever they come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from distopt.aggregators.divide import divide, put, widened
from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array
from distopt.communicators import Communicator, Pending
from distopt.variables import Slab, Variable

__all__ = ["BucketReduction", "PlainReduction", "RecordedReduction", "SlabReduction", "bucket_length"]

_LEAST_TAIL_BYTES = 64 << 10


class BucketReduction(Protocol):
    """The reduction of a bucket, under way."""

    def finish(self, divisor: float | None) -> None:
        """Wait for it, and leave the sum over ranks, divided where there is a divisor, in the bucket."""
        ...


class PlainReduction:
    """A sum over ranks that is divided when it is there. 16-bit floats are summed and divided in float32.

    Args:
        communicator: over whose ranks.
        bucket: [n], summed in place.

    Attributes:
        sent: how many bytes this rank sends to others.
    """

    def __init__(self, communicator: Communicator, bucket: Array) -> None:
        self._bucket = bucket
        self._total = widened(bucket)
        self.sent = sent_by_all_reduce(self._total.nbytes, communicator.size)
        self._pending: Pending = communicator.all_reduce(self._total)

    def finish(self, divisor: float | None) -> None:
        """See `BucketReduction.finish`."""
        self._pending.wait()
        divide(self._total, divisor)
        put(self._total, self._bucket)


class RecordedReduction:
    """A reduction whose end is noted.

    Args:
        reduction: the reduction.
        ended: called when it has been waited for.
    """

    def __init__(self, reduction: BucketReduction, ended: Callable[[], None]) -> None:
        self._reduction = reduction
        self._ended = ended

    def finish(self, divisor: float | None) -> None:
        """See `BucketReduction.finish`."""
        self._reduction.finish(divisor)
        self._ended()


def bucket_length(left: int, bucket: int, itemsize: int) -> int:
    """Return how many elements the next bucket has.

    What becomes final at the end of backward is exposed, whole buckets of it. So buckets halve towards the
    end, down to 64 KB, where a message costs as much as its latency: at most that much waits for the last
    gradient.

    Args:
        left: elements that are in no bucket yet, at least 1.
        bucket: elements of a full bucket.
        itemsize: bytes of an element.
    """
    least = min(bucket, _LEAST_TAIL_BYTES // itemsize)
    return min(left, bucket, max(least, -(-left // 2)))


class SlabReduction:
    """The reduction of one slab's gradients in one step.

    Args:
        slab: whose gradients are reduced, in place.
        start_bucket: starts the reduction of a part of the slab's gradients.
        bucket_bytes: size of a bucket; see `bucket_length` for the last ones.
    """

    def __init__(
        self, slab: Slab, start_bucket: Callable[[Slab, slice], BucketReduction], bucket_bytes: int
    ) -> None:
        self.slab = slab
        self._start_bucket = start_bucket
        self._bucket = 1
        self.set_bucket_bytes(bucket_bytes)
        self._final: set[int] = set()
        self._next_variable = 0
        self._complete = 0  # elements [0, complete) are final
        self._started = 0  # elements [0, started) are being reduced
        self._running: list[BucketReduction] = []

    def set_bucket_bytes(self, bucket_bytes: int) -> None:
        """Change the size of the buckets that start from now on."""
        self._bucket = max(1, bucket_bytes // self.slab.dtype.itemsize)

    def add(self, variable: Variable) -> None:
        """Note that the segment of `variable` is final."""
        self._final.add(id(variable))
        members = self.slab.variables
        while self._next_variable < len(members) and id(members[self._next_variable]) in self._final:
            self._complete = self.slab.end(members[self._next_variable])
            self._next_variable += 1

    def start_complete_buckets(self) -> None:
        """Start the reduction of every bucket that is complete."""
        size = self.slab.gradients.size
        while self._started < size:
            stop = self._started + bucket_length(size - self._started, self._bucket, self.slab.dtype.itemsize)
            if stop > self._complete:
                return
            self._running.append(self._start_bucket(self.slab, slice(self._started, stop)))
            self._started = stop

    @property
    def all_started(self) -> bool:
        """Whether every bucket's reduction has been started."""
        return self._started == self.slab.gradients.size

    def fill_missing(self, variables: list[Variable]) -> None:
        """Let variables that got no gradient contribute zeros, so that every rank starts every bucket."""
        for variable in variables:
            if id(variable) not in self._final and variable.gradient is not None:
                variable.gradient[...] = 0
                self.add(variable)

    def wait(self, divisor: float | None) -> None:
        """Wait for every bucket, in order, and divide it."""
        for bucket in self._running:
            bucket.finish(divisor)
