"""All-reduce in a ring: each rank sends to the next one and receives from the one before.

Every rank sends and receives 2 (P - 1) / P of the bytes, the least there can be, and every link carries the
same; MPI's own choice at three hosts sends everything several times. The array is cut into pieces that go
round one behind the other, so that the additions of one go on while the others travel.

Chunk c of a piece is summed once, from rank c + 1 on round to rank c, and then passed on, so all ranks
have the same bits; they depend on the number of ranks and on where the array is cut, not on time.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from distopt.backend import Array
from distopt.communicators.algorithm import Algorithm, Waiting
from distopt.communicators.background import BackgroundProgress
from distopt.communicators.communicator import Pending, cut
from distopt.communicators.flows import Flow, Flows, Links

__all__ = [
    "PIECES_IN_FLIGHT",
    "SEGMENT_BYTES",
    "FlowReduction",
    "MessageAlgorithm",
    "Ring",
    "all_gather_flow",
    "reduce_scatter_flow",
    "ring_flow",
]

SEGMENT_BYTES = (
    64 << 10
)  # at 1 Gbit/s 64 KB fills the line, with both MPIs; Open MPI loses 15 % from 96 KB on
PIECES_IN_FLIGHT = 32  # 8 hid 46 % of the communication at 2 hosts, 32 hide 63 %: the line is seldom idle
_TAGS = 1 << 14  # MPI promises 2**15; no two pieces that can meet are as far apart
_UFUNCS: dict[str, np.ufunc] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def reduce_scatter_flow(links: Links, chunks: list[Array], op: str, scratch: Array, tag: int) -> Flow:
    """Combine chunk c of all ranks on rank c, for every c; what other chunks hold afterwards is not defined.

    Args:
        links: between the ranks.
        chunks: one for each rank, [n_c], of lengths that all ranks have alike; may be empty.
        op: "sum", "max" or "min".
        scratch: memory for the longest chunk, [n], not used by anything else meanwhile.
        tag: of the messages.
    """
    rank, size = links.rank, links.size
    for step in range(size - 1):
        outgoing, incoming = chunks[(rank - step - 1) % size], chunks[(rank - step - 2) % size]
        arrived = scratch[: incoming.size]
        yield from _shift(links, outgoing, arrived, tag)
        if incoming.size:
            with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are values, as in MPI
                _UFUNCS[op](arrived, incoming, out=incoming)


def all_gather_flow(links: Links, chunks: list[Array], tag: int) -> Flow:
    """Give every rank chunk c of rank c, for every c; arguments as of `reduce_scatter_flow`."""
    rank, size = links.rank, links.size
    for step in range(size - 1):
        yield from _shift(links, chunks[(rank - step) % size], chunks[(rank - step - 1) % size], tag)


def ring_flow(links: Links, flat: Array, op: str, scratch: Array, tag: int) -> Flow:
    """Combine an array over all ranks, in place; `scratch` holds at least ceil(n / size) elements."""
    chunks = [flat[part] for part in cut(flat.size, links.size)]
    yield from reduce_scatter_flow(links, chunks, op, scratch, tag)
    yield from all_gather_flow(links, chunks, tag)


def _shift(links: Links, outgoing: Array, incoming: Array, tag: int) -> Flow:
    """Send to the next rank and receive from the one before; empty messages are not sent."""
    rank, size = links.rank, links.size
    requests: list[Any] = []
    if incoming.size:
        requests.append(links.receive(incoming, (rank - 1) % size, tag))
    if outgoing.size:
        requests.append(links.send(outgoing, (rank + 1) % size, tag))
    if requests:
        yield requests


class FlowReduction(Pending):
    """A reduction whose pieces are flows.

    Args:
        flows: which run them.
        flat: what is reduced, and the result.
        wait: blocks until a condition holds, under the watchdog.
    """

    def __init__(
        self, flows: Flows, flat: Array, pieces: int, wait: Callable[[Callable[[], bool]], None]
    ) -> None:
        self._flows = flows
        self._flat = flat
        self._left = pieces
        self._wait = wait

    def piece_done(self) -> None:
        """Note that one piece is done."""
        self._left -= 1

    def is_done(self) -> bool:
        """Whether all pieces are, without moving anything on."""
        return self._left == 0

    def test(self) -> bool:
        """See `Pending.test`."""
        if self._left:
            self._flows.progress()
        return self._left == 0

    def wait(self) -> Array:
        """See `Pending.wait`."""
        if self._left:
            self._wait(self.is_done)
        return self._flat


class MessageAlgorithm(Algorithm):
    """An all-reduce made of flows, moved on by `progress`, `test` and perhaps a thread.

    Args:
        links: whose requests the flows yield.
        waiting: context of a wait.
        piece_bytes: into pieces of at most how many bytes an array is cut, each of which is a flow.
        pieces_in_flight: how many flows run at a time.
        background: whether a thread moves reductions on while this one computes; may differ between ranks,
            and be changed (the attribute) for the reductions that start afterwards.

    Attributes:
        flows: what is in flight.
    """

    def __init__(
        self, links: Links, waiting: Waiting, piece_bytes: int, pieces_in_flight: int, background: bool
    ) -> None:
        self._waiting = waiting
        self._piece_bytes = piece_bytes
        self.backlog = self.flows = Flows(links, pieces_in_flight)
        self.background = background
        self._thread: BackgroundProgress | None = None
        self._buffers: list[Array] = []
        self._tags = itertools.count()

    @abstractmethod
    def _flow(self, flat: Array, op: str, scratch: Array, tag: int) -> Flow:
        """Combine a piece over all ranks, in place; `scratch` has its size."""

    def can(self, flat: Array, op: str) -> bool:
        """See `Algorithm.can`."""
        return isinstance(flat, np.ndarray) and op in _UFUNCS

    def start(self, flat: Array, op: str, number: int) -> Pending:
        """See `Algorithm.start`."""
        pieces = -(-flat.size // max(1, self._piece_bytes // flat.itemsize))

        def wait(is_done: Callable[[], bool]) -> None:
            with self._waiting("all_reduce", number):
                self.flows.wait(is_done)

        reduction = FlowReduction(self.flows, flat, pieces, wait)
        for part in cut(flat.size, pieces) if pieces else []:
            self.flows.add(self._piece(flat[part], op, next(self._tags) % _TAGS), reduction.piece_done)
        self.flows.progress()
        if self.background and self.flows.busy:
            if self._thread is None:
                self._thread = BackgroundProgress(self.flows)
            self._thread.wake()
        return reduction

    def progress(self) -> None:
        """See `Algorithm.progress`."""
        if self.flows.busy:
            self.flows.progress()

    def flush(self) -> None:
        """Finish what is in flight: no other rank may wait for this one, which is about to block in MPI."""
        if self.flows.busy:
            self.flows.wait(lambda: not self.flows.busy)

    def close(self) -> None:
        """See `Algorithm.close`."""
        self.flush()
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        self._buffers.clear()

    def _piece(self, flat: Array, op: str, tag: int) -> Flow:
        buffer = self._buffers.pop() if self._buffers else np.empty(0, np.uint8)
        if buffer.nbytes < flat.nbytes:
            buffer = np.empty(max(flat.nbytes, self._piece_bytes), np.uint8)
        yield from self._flow(flat, op, buffer[: flat.nbytes].view(flat.dtype), tag)
        self._buffers.append(buffer)


class Ring(MessageAlgorithm):
    """All-reduce in a ring.

    Args:
        links: between the ranks.
        waiting: context of a wait.
        segment_bytes: size of a message, at most; large enough that its latency doesn't count, small
            enough that transfer and arithmetic overlap.
        pieces_in_flight: how many pieces go round at a time.
        background: see `MessageAlgorithm`.
    """

    name: ClassVar[str] = "ring"

    def __init__(
        self,
        links: Links,
        waiting: Waiting,
        segment_bytes: int = SEGMENT_BYTES,
        pieces_in_flight: int = PIECES_IN_FLIGHT,
        background: bool = False,
    ) -> None:
        super().__init__(links, waiting, segment_bytes * links.size, pieces_in_flight, background)
        self._links = links

    def _flow(self, flat: Array, op: str, scratch: Array, tag: int) -> Flow:
        return ring_flow(self._links, flat, op, scratch, tag)
