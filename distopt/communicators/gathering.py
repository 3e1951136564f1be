"""A communicator made of one operation, so that writing one's own is short."""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, asnumpy, device_of
from distopt.communicators.communicator import (
    Call,
    Communicator,
    Done,
    Pending,
    cut,
    describe_mismatch,
    reduce_in_rank_order,
)
from distopt.errors import CommunicatorError

__all__ = ["GatheringCommunicator"]


class GatheringCommunicator(Communicator):
    """Everything a communicator promises, made of `exchange`: for a transport of your own, to begin with.

    Define `exchange` and `group`. Every collective is then one exchange in which each rank sees what all
    gave, so calls that differ between ranks raise on all of them, sums are formed in rank order, and nothing
    is ever pending. It is right, not fast: each rank receives (size - 1) times what it sends. Override
    `_all_reduce` and others where the transport can do better; docs/extending.md has an example.

    What `exchange` needs must be there before this constructor is called, which exchanges the hosts' names.

    Args:
        rank: number of this rank.
        size: number of ranks.
        label: name of the group, equal on all ranks.
        description: one line for people; the class's name when None.
    """

    def __init__(self, rank: int, size: int, label: str = "world", description: str | None = None) -> None:
        self.rank, self.size, self.host = rank, size, socket.gethostname()  # `exchange` may need them
        hosts: list[str] = self.exchange(self.host)
        super().__init__(
            rank=rank,
            size=size,
            local_rank=hosts[:rank].count(self.host),
            local_size=hosts.count(self.host),
            host=self.host,
            label=label,
            description=description or type(self).__name__,
        )

    @abstractmethod
    def exchange(self, value: Any) -> list[Any]:
        """Give a value to all ranks, and return theirs, by rank; this rank's own may be the same object.

        All ranks call it in the same order. Values can be pickled, and may be large: two ranks that only send
        before they receive wait for each other forever.

        Raises:
            CommunicatorError: another rank is gone; the message names it.
        """

    @abstractmethod
    def group(self, members: Sequence[int], label: str) -> Communicator:
        """Return the communicator of some ranks, this one among them, in the order given."""

    def progress(self) -> None:
        """Return: nothing is ever pending."""

    def _meet(self, call: Call, number: int, value: Any) -> list[Any]:
        """Exchange values, and the calls that they belong to, which must be the same on all ranks."""
        everyone = self.exchange((call, value))
        problem = describe_mismatch(number, [call for call, _ in everyone])
        if problem:
            raise CommunicatorError(f"{self.where}: {problem}")
        return [value for _, value in everyone]

    def _all_reduce(self, values: Array, op: str, call: Call, number: int) -> Pending:
        parts = self._meet(call, number, asnumpy(values))
        return Done(_write(values, reduce_in_rank_order(parts, op)))

    def _reduce_scatter(self, values: Array, call: Call, number: int) -> Pending:
        own = cut(values.size, self.size)[self.rank]
        parts = self._meet(call, number, asnumpy(values))
        return Done(_write(values[own], reduce_in_rank_order([part[own] for part in parts], "sum")))

    def _broadcast(self, values: Array, root: int, call: Call, number: int) -> Pending:
        sent = self._meet(call, number, asnumpy(values) if self.rank == root else None)
        return Done(_write(values, sent[root]))

    def _all_gather(self, values: Array, call: Call, number: int) -> Pending:
        return Done(device_of(values).asarray(np.stack(self._meet(call, number, asnumpy(values)))))

    def _all_gather_parts(self, values: Array, call: Call, number: int) -> Pending:
        own = cut(values.size, self.size)[self.rank]
        return Done(_write(values, np.concatenate(self._meet(call, number, asnumpy(values[own])))))

    def _all_gather_rows(self, values: Array, call: Call, number: int) -> list[Array]:
        everyone = self._meet(call, number, asnumpy(values))
        return [device_of(values).asarray(rows.copy()) for rows in everyone]

    def _all_to_all(self, parts: Sequence[Array], call: Call, number: int) -> list[Array]:
        everyone = self._meet(call, number, [asnumpy(part) for part in parts])
        return [device_of(parts[0]).asarray(sent[self.rank].copy()) for sent in everyone]

    def _allocate(self, size: int, dtype: np.dtype[Any], call: Call, number: int) -> Array:
        self._meet(call, number, None)
        return super()._allocate(size, dtype, call, number)

    def _barrier(self, call: Call, number: int) -> None:
        self._meet(call, number, None)

    def _broadcast_object(self, value: Any, root: int, call: Call, number: int) -> Any:
        return self._meet(call, number, value if self.rank == root else None)[root]

    def _all_gather_object(self, value: Any, call: Call, number: int) -> list[Any]:
        return self._meet(call, number, value)

    def _split(self, color: int, key: int, label: str, call: Call, number: int) -> Communicator:
        wishes: list[tuple[int, int]] = self._meet(call, number, (color, key))
        members = [rank for rank in range(self.size) if wishes[rank][0] == color]
        return self.group(sorted(members, key=lambda rank: (wishes[rank][1], rank)), label)


def _write(target: Array, values: Array) -> Array:
    with np.errstate(over="ignore"):  # a float16 sum may be infinite; that is its value
        target[...] = device_of(target).asarray(values, target.dtype)
    return target
