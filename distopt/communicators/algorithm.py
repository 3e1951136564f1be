"""Ways to sum an array over ranks: what each promises, so that one can be chosen by measurement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sized
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

from distopt.backend import Array
from distopt.communicators.communicator import Pending

__all__ = ["Algorithm", "Waiting"]


class Waiting(Protocol):
    """Makes the context in which a rank may block: the watchdog looks on, errors are translated."""

    def __call__(self, operation: str, number: int) -> AbstractContextManager[None]:
        """Return the context of collective `number`."""
        ...


class Algorithm(ABC):
    """One way to do all_reduce, over the ranks of one communicator.

    All ranks start the same reductions in the same order, and choose the same algorithm for each.

    Attributes:
        name: by which it is chosen and reported.
        takes_halves: whether it adds 16-bit floats in float32 by itself; else it is given a float32 copy.
        backlog: what `flush` would deal with, which is only called where this is not empty.
    """

    name: ClassVar[str]
    takes_halves: ClassVar[bool] = False
    backlog: Sized = ()

    @abstractmethod
    def can(self, flat: Array, op: str) -> bool:
        """Say whether it can reduce such an array; the same on all ranks."""

    @abstractmethod
    def start(self, flat: Array, op: str, number: int) -> Pending:
        """Start the reduction of an array, in place.

        Args:
            flat: host memory, contiguous, [n], in the dtype that values are combined in, or see
            `takes_halves`.
            op: "sum", "max" or "min".
            number: of the collective, for messages.
        """

    def prepare(self, flat: Array, op: str) -> Callable[[int], Pending]:
        """Return a function, number -> handle, that does what `start` does, with less to do each time."""
        return lambda number: self.start(flat, op, number)

    def progress(self) -> None:
        """Move what is in flight on, without blocking."""
        return

    def flush(self) -> None:
        """Start whatever waits in a queue of its own, blocking where it must.

        Called before another kind of collective: another rank may wait for what is only queued here.
        """
        return

    def close(self) -> None:
        """Finish what is in flight, and give back what it holds."""
        return
