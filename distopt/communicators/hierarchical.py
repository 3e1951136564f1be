"""All-reduce in three steps: within each host, between hosts in rings, within each host again.

Each rank owns a slice of the array. The ranks of a host sum every slice on its owner, the owners of slice j
on all hosts sum it in a ring of their own, and the ranks of a host give each other their slices. What goes
over the network is that of one ring over the hosts, however many ranks they have, instead of one over all
ranks; and all cards of a host can take part. Where hosts have different numbers of ranks, only as many on
each own a slice as the smallest has.

Each slice is summed in one order of ranks and then passed on: the same bits everywhere.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from distopt.backend import Array
from distopt.communicators.algorithm import Waiting
from distopt.communicators.communicator import cut
from distopt.communicators.flows import Flow, Links
from distopt.communicators.ring import (
    PIECES_IN_FLIGHT,
    SEGMENT_BYTES,
    MessageAlgorithm,
    all_gather_flow,
    reduce_scatter_flow,
    ring_flow,
)

__all__ = ["Hierarchical", "HostSteps", "MessageSteps"]


class HostSteps(Protocol):
    """What the ranks of one host do with a piece of an array, as flows: they never block."""

    @property
    def rank(self) -> int:
        """Number of this rank on its host."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks on this host."""
        ...

    def reduce_scatter(self, chunks: list[Array], op: str, scratch: Array, tag: int) -> Flow:
        """Combine chunk c of all ranks of the host on its rank c; see `reduce_scatter_flow`."""
        ...

    def all_gather(self, chunks: list[Array], tag: int) -> Flow:
        """Give every rank of the host chunk c of its rank c."""
        ...


class MessageSteps:
    """`HostSteps` by messages.

    Args:
        links: between the ranks of the host.
    """

    def __init__(self, links: Links) -> None:
        self._links = links
        self.rank = links.rank
        self.size = links.size

    def reduce_scatter(self, chunks: list[Array], op: str, scratch: Array, tag: int) -> Flow:
        """See `HostSteps`."""
        return reduce_scatter_flow(self._links, chunks, op, scratch, tag)

    def all_gather(self, chunks: list[Array], tag: int) -> Flow:
        """See `HostSteps`."""
        return all_gather_flow(self._links, chunks, tag)


class Hierarchical(MessageAlgorithm):
    """All-reduce within hosts and in rings between them.

    Args:
        host: steps of the ranks of this host.
        between: links between the ranks of equal number on all hosts; None on a rank that owns no slice.
        links: any, to test requests with.
        hosts: number of hosts.
        owners: how many ranks of each host own a slice: the number of ranks of the smallest host.
        waiting: context of a wait.
        segment_bytes: size of a message between hosts, at most.
        pieces_in_flight: how many pieces are under way at a time.
        background: see `MessageAlgorithm`.
    """

    name: ClassVar[str] = "hierarchical"

    def __init__(
        self,
        host: HostSteps,
        between: Links | None,
        links: Links,
        hosts: int,
        owners: int,
        waiting: Waiting,
        segment_bytes: int = SEGMENT_BYTES,
        pieces_in_flight: int = PIECES_IN_FLIGHT,
        background: bool = False,
    ) -> None:
        super().__init__(links, waiting, segment_bytes * hosts * owners, pieces_in_flight, background)
        self._host = host
        self._between = between
        self._owners = owners

    def _flow(self, flat: Array, op: str, scratch: Array, tag: int) -> Flow:
        host = self._host
        chunks = [flat[part] for part in cut(flat.size, self._owners)]
        chunks += [flat[:0]] * (host.size - self._owners)
        yield from host.reduce_scatter(chunks, op, scratch, tag)
        if self._between is not None:
            yield from ring_flow(self._between, chunks[host.rank], op, scratch, tag)
        yield from host.all_gather(chunks, tag)
