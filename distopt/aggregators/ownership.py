"""Who keeps which part of what an optimizer keeps: the division of slots among ranks.

An optimizer knows no ranks. It is given an `Ownership`, asks it for a `Division` that fits its rule, updates
what the division calls its own, and calls `share_values` so that all ranks have all values again.
"""

from __future__ import annotations

import logging
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from distopt.aggregators.traffic import sent_by_half, sent_to_each
from distopt.backend import Array, namespace
from distopt.communicators import Communicator
from distopt.communicators.communicator import cut
from distopt.variables import Slab, Variable

__all__ = ["ByElements", "ByVariables", "Division", "Layout", "Ownership", "Unit", "bucket_slices"]

_log = logging.getLogger("distopt")

Unit: TypeAlias = Literal["elements", "variables"]
"""What is never divided: an element, for rules that take each by itself, or a whole variable."""


def bucket_slices(slab: Slab, bucket_bytes: int) -> list[slice]:
    """Return the buckets of a slab: neighbouring slices of at most `bucket_bytes`, one element at least."""
    step = max(1, bucket_bytes // slab.dtype.itemsize)
    size = int(slab.values.size)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


class Layout:
    """Parts of a slab, laid one after the other in an array of their own.

    Args:
        parts: slices of the slab, ascending, without overlap; neighbours are joined.

    Attributes:
        size: number of elements of all parts.
    """

    def __init__(self, parts: Iterable[slice]) -> None:
        self._parts: list[tuple[int, int, int]] = []  # start and stop in the slab, start in the layout
        self.size = 0
        for part in parts:
            if part.start == part.stop:
                continue
            if self._parts and self._parts[-1][1] == part.start:
                start, _, local = self._parts.pop()
                self._parts.append((start, part.stop, local))
            else:
                self._parts.append((part.start, part.stop, self.size))
            self.size += part.stop - part.start

    def pieces(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """Yield what of [start, stop) of the slab is in the layout: (slice of the slab, of the layout)."""
        for first, last, local in self._parts:
            low, high = max(first, start), min(last, stop)
            if low < high:
                yield slice(low, high), slice(local + low - first, local + high - first)


class Ownership:
    """The ranks that share the state of optimizers.

    Args:
        communicator: the ranks.
        bucket_bytes: each bucket of this size is cut for all ranks, as `reduce_scatter` cuts it.
        sent: told how many bytes of values this rank sends to others after an update.

    Attributes:
        gather_seconds: time that the last update spent in waiting for the values of others.
        loads: bytes of variables that each rank was given whole.
        owners: rank that a variable was given to whole.
    """

    def __init__(
        self, communicator: Communicator, bucket_bytes: int, sent: Callable[[int], None] | None = None
    ) -> None:
        self.communicator = communicator
        self.bucket_bytes = bucket_bytes
        self.gather_seconds = 0.0
        self.sent: Callable[[int], None] = _ignore if sent is None else sent
        self.loads = [0] * communicator.size
        self.owners: weakref.WeakKeyDictionary[Variable, int] = weakref.WeakKeyDictionary()

    def warn(self, message: str) -> None:
        """Log a warning, once for all ranks."""
        if self.communicator.rank == 0:
            _log.warning("%s", message)

    def divide(self, unit: Unit) -> Division:
        """Return the division for an optimizer whose rule takes elements, or whole variables."""
        return ByElements(self) if unit == "elements" else ByVariables(self)

    def owner(self, variable: Variable) -> int:
        """Return the rank that has a variable whole; the one with the least so far where none has it yet.

        All ranks ask for the variables in the same order, so all get the same answers.
        """
        if variable not in self.owners:
            rank = min(range(self.communicator.size), key=lambda number: self.loads[number])
            self.loads[rank] += int(variable.value.nbytes)
            self.owners[variable] = rank
        return self.owners[variable]


def _ignore(nbytes: int) -> None:
    del nbytes


class Division(ABC):
    """How the slots of one optimizer, and the work of its updates, are divided among ranks.

    Variables outside an arena are always given to a rank whole. Where a slab is cut differs between the
    kinds of division.

    Args:
        ownership: who divides.

    Attributes:
        unit: what is never divided.
    """

    unit: ClassVar[Unit]

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership
        self._communicator = ownership.communicator
        self._layouts: dict[Slab, list[Layout]] = {}

    def layout(self, slab: Slab) -> Layout:
        """Return this rank's part of a slab."""
        return self._of_all_ranks(slab)[self._communicator.rank]

    def is_cut(self, variable: Variable) -> bool:
        """Whether several ranks may have a part of a variable each."""
        del variable
        return False

    def holds(self, variable: Variable) -> bool:
        """Whether this rank has a part in the update of a variable: it owns the variable, or it is cut."""
        return self.is_cut(variable) or self.ownership.owner(variable) == self._communicator.rank

    def own(self, variable: Variable, size: int) -> list[slice]:
        """Return this rank's part of a slot, as slices of the flat slot.

        Args:
            variable: whose slot.
            size: number of elements of the slot; that of the variable where it is cut.
        """
        return self._pieces(variable, size, self._communicator.rank)

    def gather(self, variable: Variable, part: Array, shape: Sequence[int], cut: bool | None = None) -> Array:
        """Return a whole slot. Collective.

        Args:
            variable: whose slot.
            part: this rank's part.
            shape: of the whole slot.
            cut: False: the parts were made when the variable was in no arena; None: they are as it is now.
        """
        size = int(np.prod(shape))
        flat = namespace(part).ascontiguousarray(part).reshape(-1)
        found = self._communicator.all_gather_rows(flat)
        if cut is False:
            return found[self.ownership.owner(variable)].reshape(tuple(shape))
        whole = namespace(part).empty(size, part.dtype)
        for rank, rows in enumerate(found):
            start = 0
            for piece in self._pieces(variable, size, rank):
                stop = start + piece.stop - piece.start
                whole[piece] = rows[start:stop]
                start = stop
        return whole.reshape(tuple(shape))

    def share_values(self, variables: Sequence[Variable]) -> None:
        """Give every rank the values that the others have updated, in place. Collective.

        Args:
            variables: those that were updated, the same on all ranks in the same order.
        """
        began = time.perf_counter()
        self._share_values(variables)
        self.ownership.gather_seconds += time.perf_counter() - began

    def _share_values(self, variables: Sequence[Variable]) -> None:
        """Send whole variables from their owners, all of one type at once."""
        groups: dict[Any, list[Variable]] = {}
        for variable in variables:
            groups.setdefault((variable.device, variable.dtype), []).append(variable)
        rank = self._communicator.rank
        for members in groups.values():
            with members[0].device.activate():
                xp = namespace(members[0].value)
                empty = xp.empty(0, members[0].dtype)
                own = [v.value.reshape(-1) for v in members if self.ownership.owner(v) == rank]
                packed = xp.concatenate([empty, *own])
                self.ownership.sent(sent_to_each(packed.nbytes, self._communicator.size))
                found = self._communicator.all_gather_rows(packed)
                starts = [0] * len(found)
                for variable in members:
                    owner = self.ownership.owner(variable)
                    start, starts[owner] = starts[owner], starts[owner] + variable.size
                    if owner != rank:
                        variable.value[...] = found[owner][start : starts[owner]].reshape(variable.shape)

    def _pieces(self, variable: Variable, size: int, rank: int) -> list[slice]:
        return [slice(0, size)] if self.ownership.owner(variable) == rank else []

    def _of_all_ranks(self, slab: Slab) -> list[Layout]:
        if slab not in self._layouts:
            self._layouts[slab] = [Layout(parts) for parts in self._cut(slab)]
        return self._layouts[slab]

    @abstractmethod
    def _cut(self, slab: Slab) -> list[list[slice]]:
        """Return the parts of a slab, by rank."""


class ByElements(Division):
    """Each bucket of a slab is cut for all ranks as `reduce_scatter` cuts it: for elementwise rules."""

    unit: ClassVar[Unit] = "elements"

    def is_cut(self, variable: Variable) -> bool:
        """See `Division.is_cut`: variables in an arena."""
        return variable.slab is not None

    def _share_values(self, variables: Sequence[Variable]) -> None:
        segments: dict[Slab, list[tuple[int, int]]] = {}
        for variable in variables:
            if variable.slab is not None:
                stop = variable.slab.end(variable)
                segments.setdefault(variable.slab, []).append((variable.start, stop))
        for slab in sorted(segments, key=lambda slab: slab.number):
            for bucket in bucket_slices(slab, self.ownership.bucket_bytes):
                if any(a < bucket.stop and bucket.start < b for a, b in segments[slab]):
                    values = slab.values[bucket]
                    self.ownership.sent(sent_by_half(values.nbytes, self._communicator.size))
                    self._communicator.all_gather_parts(values).wait()
        super()._share_values([variable for variable in variables if variable.slab is None])

    def _pieces(self, variable: Variable, size: int, rank: int) -> list[slice]:
        if variable.slab is None:
            return super()._pieces(variable, size, rank)
        start = variable.start
        found = self._of_all_ranks(variable.slab)[rank].pieces(start, start + size)
        return [slice(piece.start - start, piece.stop - start) for piece, _ in found]

    def _cut(self, slab: Slab) -> list[list[slice]]:
        parts: list[list[slice]] = [[] for _ in range(self._communicator.size)]
        for bucket in bucket_slices(slab, self.ownership.bucket_bytes):
            shares = cut(bucket.stop - bucket.start, self._communicator.size)
            for own, share in zip(parts, shares, strict=True):
                own.append(slice(bucket.start + share.start, bucket.start + share.stop))
        return parts


class ByVariables(Division):
    """Each variable belongs to one rank, the largest ones given away first: for rules with norms of layers.

    The memory that a rank needs is at least that of the largest variable.
    """

    unit: ClassVar[Unit] = "variables"

    def _cut(self, slab: Slab) -> list[list[slice]]:
        for variable in sorted(slab.variables, key=lambda v: -v.size):
            self.ownership.owner(variable)
        rank_of = self.ownership.owners
        return [
            [slice(v.start, slab.end(v)) for v in slab.variables if rank_of[v] == rank]
            for rank in range(self._communicator.size)
        ]

    def holds(self, variable: Variable) -> bool:
        """See `Division.holds`."""
        self._settle(variable)
        return super().holds(variable)

    def _pieces(self, variable: Variable, size: int, rank: int) -> list[slice]:
        self._settle(variable)
        return super()._pieces(variable, size, rank)

    def _settle(self, variable: Variable) -> None:
        if variable.slab is not None:
            self._of_all_ranks(variable.slab)  # all of a slab are given away at once, by size
