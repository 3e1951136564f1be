"""The communicator of a world of one rank: the same contract, nothing to send."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, ClassVar

from distopt.backend import Array, namespace
from distopt.communicators.communicator import Call, Communicator, Done, Pending

__all__ = ["LocalCommunicator"]


class LocalCommunicator(Communicator):
    """One rank that is its own world."""

    name: ClassVar[str] = "local"

    def __init__(self, label: str = "world") -> None:
        super().__init__(
            rank=0,
            size=1,
            local_rank=0,
            local_size=1,
            host=socket.gethostname(),
            label=label,
            description="one process, no communication",
        )

    def progress(self) -> None:
        """Return: every collective is done at once."""

    def _all_reduce(self, values: Array, op: str, call: Call, number: int) -> Pending:
        return Done(values)

    def _broadcast(self, values: Array, root: int, call: Call, number: int) -> Pending:
        return Done(values)

    def _all_gather(self, values: Array, call: Call, number: int) -> Pending:
        return Done(namespace(values).array(values)[None])

    def _all_gather_parts(self, values: Array, call: Call, number: int) -> Pending:
        return Done(values)

    def _reduce_scatter(self, values: Array, call: Call, number: int) -> Pending:
        return Done(values)

    def _all_to_all(self, parts: Sequence[Array], call: Call, number: int) -> list[Array]:
        return [namespace(parts[0]).array(parts[0])]

    def _all_gather_rows(self, values: Array, call: Call, number: int) -> list[Array]:
        return [namespace(values).array(values)]

    def _barrier(self, call: Call, number: int) -> None:
        return None

    def _broadcast_object(self, value: Any, root: int, call: Call, number: int) -> Any:
        return value

    def _all_gather_object(self, value: Any, call: Call, number: int) -> list[Any]:
        return [value]

    def _split(self, color: int, key: int, label: str, call: Call, number: int) -> Communicator:
        return LocalCommunicator(label)
