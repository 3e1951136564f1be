"""Cut a slab's gradients into buckets, and start the reduction of each as soon as it is complete.

Buckets are slices of the arena: nothing is packed. They start in the arena's order, the same on every
rank, whichever gradients exist and whenever they come.
"""

from __future__ import annotations

from distopt.backend import Array
from distopt.communicators import Communicator, Pending
from distopt.variables import Slab, Variable

__all__ = ["SlabReduction"]


class SlabReduction:
    """The reduction of one slab's gradients in one step.

    Args:
        slab: whose gradients are reduced, in place.
        communicator: over whose ranks.
        bucket_bytes: size of a bucket, the last one of a slab is what is left.
    """

    def __init__(self, slab: Slab, communicator: Communicator, bucket_bytes: int) -> None:
        self.slab = slab
        self._communicator = communicator
        self._bucket = max(1, bucket_bytes // slab.dtype.itemsize)
        self._final: set[int] = set()
        self._next_variable = 0
        self._complete = 0  # elements [0, complete) are final
        self._started = 0  # elements [0, started) are being reduced
        self.pending: list[Pending] = []

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
            stop = min(self._started + self._bucket, size)
            if stop > self._complete:
                return
            self.pending.append(self._communicator.all_reduce(self.slab.gradients[self._started : stop]))
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

    def wait(self, divisor: float | None) -> Array:
        """Wait for every bucket, divide, and return the slab's gradients."""
        start = 0
        for pending in self.pending:
            pending.wait()
            if divisor is not None:
                stop = min(start + self._bucket, self.slab.gradients.size)
                self.slab.gradients[start:stop] /= self.slab.dtype.type(divisor)
                start = stop
        return self.slab.gradients
