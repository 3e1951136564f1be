"""Over MPI (mpi4py): its own ways to all_reduce, its messages, and what a communicator is made of.

Arrays travel in pieces of 4 MB, which stay in the caches (100 MB in 25 ms instead of 85 ms by one
call) and keep every count far below MPI's limit of 2**31.

The same bits on all ranks: the sums of both MPIs' algorithms (recursive doubling, ring,
Rabenseifner, reduce and broadcast) are computed once and copied, or computed on several ranks with
only the two operands of an addition exchanged, which does not change an IEEE sum. That does not
hold for MPI_MAX of floats where one is NaN: max and min of floats are gathered and combined in rank
order instead. Tested in tests/communicators/communicator_contract.py.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np
from mpi4py import MPI

from distopt.backend import Array
from distopt.communicators.algorithm import Algorithm, Waiting
from distopt.communicators.communicator import Done, Pending, reduce_in_rank_order
from distopt.communicators.hierarchical import Hierarchical, MessageSteps
from distopt.communicators.watchdog import Note, Wait, Watchdog

__all__ = [
    "Blocking",
    "Finished",
    "MpiLinks",
    "Neighbours",
    "NonBlocking",
    "Notes",
    "Watch",
    "flat_bytes",
    "flattened",
    "make_hierarchical",
    "pieces_of",
]

_PIECE_BYTES = 4 * 2**20
_PIECES_IN_FLIGHT = 8  # MPI holds a buffer of a piece's size for each
_OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
_DATATYPES = {
    "b": MPI.SIGNED_CHAR,
    "B": MPI.UNSIGNED_CHAR,
    "h": MPI.SHORT,
    "H": MPI.UNSIGNED_SHORT,
    "i": MPI.INT,
    "I": MPI.UNSIGNED,
    "l": MPI.LONG,
    "L": MPI.UNSIGNED_LONG,
    "q": MPI.LONG_LONG,
    "Q": MPI.UNSIGNED_LONG_LONG,
    "f": MPI.FLOAT,
    "d": MPI.DOUBLE,
}


def flattened(values: Array) -> Array:
    """Return an array's elements as one axis, without a copy."""
    return values.reshape(-1)


def flat_bytes(values: Array) -> Array:
    """Return an array's bytes as one axis, without a copy."""
    return values.reshape(-1).view(np.uint8)


def pieces_of(length: int, step: int) -> Iterator[slice]:
    """Cut [0, length) into slices of `step`; the last one is what is left."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _is_safe(flat: Array, op: str) -> bool:
    """Whether MPI's own reduction gives the same bits on all ranks; NaN in max and min does not."""
    return op == "sum" or flat.dtype.kind != "f"


class Notes:
    """The watchdog's channel: notes as pickled messages on an MPI communicator of their own."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self._communicator = communicator
        self._sends: list[MPI.Request] = []

    def send(self, rank: int, note: Note) -> None:
        """Start to send a note."""
        self._sends.append(self._communicator.isend(note, rank))

    def receive(self) -> list[tuple[int, Note]]:
        """Return what has come, with the ranks it came from."""
        received: list[tuple[int, Note]] = []
        while (message := self._communicator.improbe()) is not None:
            status = MPI.Status()
            note: Note = message.recv(status)
            received.append((status.Get_source(), note))
        return received

    def flush(self) -> None:
        """Wait until all notes are sent."""
        MPI.Request.waitall(self._sends)
        self._sends.clear()


class MpiLinks:
    """Messages between the ranks of an MPI communicator; see `flows.Links`.

    Args:
        mpi: nothing else sends messages on it.
    """

    def __init__(self, mpi: MPI.Intracomm) -> None:
        self._mpi = mpi
        self.rank = mpi.Get_rank()
        self.size = mpi.Get_size()

    def send(self, values: Array, to: int, tag: int) -> MPI.Request:
        """Start to send; the receiver knows the length."""
        return self._mpi.Isend(values.view(np.uint8), to, tag)

    def receive(self, values: Array, source: int, tag: int) -> MPI.Request:
        """Start to receive as many bytes as `values` has."""
        return self._mpi.Irecv(values.view(np.uint8), source, tag)

    def test_some(self, requests: Sequence[MPI.Request]) -> Sequence[int]:
        """Return the places of the requests that are done now."""
        return MPI.Request.Testsome(requests) or []


class Watch:
    """Where a watchdog would look, if there was one."""

    waiting: Wait | None = None


class Neighbours:
    """The ranks of one host."""

    def __init__(self, communicator: MPI.Intracomm) -> None:
        self.communicator = communicator
        self.rank = communicator.Get_rank()
        self.size = communicator.Get_size()

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return one rank's object on all of them."""
        return self.communicator.bcast(value, root)

    def free(self) -> None:
        """Free the MPI communicator."""
        self.communicator.Free()


def make_hierarchical(
    mpi: MPI.Intracomm, neighbours: MPI.Intracomm, waiting: Waiting, background: bool
) -> tuple[Hierarchical, MPI.Intracomm]:
    """Return the all-reduce within and between hosts, and a communicator to free after it. Collective.

    Args:
        mpi: of all ranks.
        neighbours: of the ranks of this host.
        waiting: context of a wait.
        background: whether a thread moves it on.
    """
    local_rank, local_size = neighbours.Get_rank(), neighbours.Get_size()
    places = mpi.allgather((local_rank, local_size))
    owners = min(size for _, size in places)
    hosts = sum(rank == 0 for rank, _ in places)
    across = cast("MPI.Intracomm", mpi.Split(min(local_rank, owners), mpi.Get_rank()))
    links = MpiLinks(neighbours)
    between = MpiLinks(across) if local_rank < owners else None
    algorithm = Hierarchical(
        MessageSteps(links), between, links, hosts, owners, waiting, background=background
    )
    return algorithm, across


class Blocking(Algorithm):
    """MPI's own all_reduce, done when `start` returns."""

    name: ClassVar[str] = "mpi"

    def __init__(
        self,
        mpi: MPI.Intracomm,
        waiting: Waiting,
        watch: Watchdog | Watch,
        label: str,
        before: Callable[[], None],
    ) -> None:
        self._mpi, self._waiting, self._watch, self._label = mpi, waiting, watch, label
        self._before = before  # starts what the others may wait for

    def can(self, flat: Array, op: str) -> bool:
        """See `Algorithm.can`."""
        return True

    def prepare(self, flat: Array, op: str) -> Callable[[int], Pending]:
        """See `Algorithm.prepare`."""
        if flat.nbytes > _PIECE_BYTES or not flat.size or not _is_safe(flat, op):
            return super().prepare(flat, op)
        # A small reduction takes MPI less than a microsecond: here, each store counts.
        before, all_reduce, in_place, operation = (
            self._before,
            self._mpi.Allreduce,
            MPI.IN_PLACE,
            _OPERATIONS[op],
        )
        message = [flat, _DATATYPES[flat.dtype.char]]
        watch, wait, done = self._watch, Wait(self._label, "all_reduce"), Done(flat)

        def start(number: int) -> Pending:
            before()
            wait.number = number
            watch.waiting = wait
            try:
                all_reduce(in_place, message, operation)
            finally:
                watch.waiting = None
            return done

        return start

    def start(self, flat: Array, op: str, number: int) -> Pending:
        """See `Algorithm.start`."""
        self._before()
        with self._waiting("all_reduce", number):
            for part in pieces_of(flat.size, _PIECE_BYTES // flat.itemsize):
                piece = flat[part]
                if _is_safe(flat, op):
                    self._mpi.Allreduce(MPI.IN_PLACE, piece, _OPERATIONS[op])
                else:
                    gathered = np.empty((self._mpi.size, piece.size), piece.dtype)
                    self._mpi.Allgather(piece, gathered)
                    piece[...] = reduce_in_rank_order(list(gathered), op)
        return Done(flat)


class NonBlocking(Algorithm):
    """MPI's non-blocking all_reduce in pieces, moved on by `progress` and `test`.

    Args:
        mpi: the ranks.
        waiting: context of a wait.
        largest_bytes: what is larger is left to others; None: nothing is.
    """

    name: ClassVar[str] = "mpi-nonblocking"

    def __init__(self, mpi: MPI.Intracomm, waiting: Waiting, largest_bytes: int | None = None) -> None:
        self._mpi, self._waiting, self._largest_bytes = mpi, waiting, largest_bytes
        self._queue: collections.deque[tuple[_Reduction, Array, MPI.Op]] = collections.deque()
        self.backlog = self._queue
        self._running: collections.deque[tuple[_Reduction, MPI.Request]] = collections.deque()

    def can(self, flat: Array, op: str) -> bool:
        """See `Algorithm.can`."""
        small = self._largest_bytes is None or flat.nbytes <= self._largest_bytes
        return small and _is_safe(flat, op)

    def start(self, flat: Array, op: str, number: int) -> Pending:
        """See `Algorithm.start`."""
        pieces = [flat[part] for part in pieces_of(flat.size, _PIECE_BYTES // flat.itemsize)]
        reduction = _Reduction(self, flat, number, len(pieces))
        self._queue.extend((reduction, piece, _OPERATIONS[op]) for piece in pieces)
        self._start_queued()
        return reduction

    def progress(self) -> None:
        """See `Algorithm.progress`."""
        if self._running:
            requests = [request for _, request in self._running]
            done = MPI.Request.Testsome(requests) or []
            for index in sorted(done, reverse=True):
                self._running[index][0].pieces_left -= 1
                del self._running[index]
            self._start_queued()

    def complete(self, reduction: _Reduction) -> None:
        """Block until all pieces of a reduction are done."""
        with self._waiting("all_reduce", reduction.number):
            while reduction.pieces_left > 0:
                self._finish_oldest()

    def flush(self) -> None:
        """See `Algorithm.flush`."""
        while self._queue:
            self._finish_oldest()

    def close(self) -> None:
        """See `Algorithm.close`."""
        while self._running or self._queue:
            self._finish_oldest()

    def _start_queued(self) -> None:
        # First in, first out: collectives of one MPI communicator start in the same order
        # everywhere.
        while self._queue and len(self._running) < _PIECES_IN_FLIGHT:
            reduction, piece, operation = self._queue.popleft()
            request = self._mpi.Iallreduce(MPI.IN_PLACE, piece, operation)
            self._running.append((reduction, request))

    def _finish_oldest(self) -> None:
        self._start_queued()
        reduction, request = self._running.popleft()
        request.Wait()
        reduction.pieces_left -= 1
        self._start_queued()


class _Reduction(Pending):
    """A non-blocking all_reduce: its pieces wait in the queue, or are in flight."""

    def __init__(self, algorithm: NonBlocking, flat: Array, number: int, pieces: int) -> None:
        self._algorithm = algorithm
        self._flat = flat
        self.number = number
        self.pieces_left = pieces

    def test(self) -> bool:
        """See `Pending.test`."""
        self._algorithm.progress()
        return self.pieces_left == 0

    def wait(self) -> Array:
        """See `Pending.wait`."""
        if self.pieces_left:
            self._algorithm.complete(self)
        return self._flat


class Finished(Pending):
    """A reduction after which something is left to do, once: to write back what was staged."""

    def __init__(self, pending: Pending, finish: Callable[[], Array]) -> None:
        self._pending = pending
        self._finish = finish
        self._result: Array | None = None

    def test(self) -> bool:
        """See `Pending.test`."""
        if self._result is None and self._pending.test():
            self.wait()
        return self._result is not None

    def wait(self) -> Array:
        """See `Pending.wait`."""
        if self._result is None:
            self._pending.wait()
            self._result = self._finish()
        return self._result
