"""What a codec is: float32 numbers in, fewer bytes out, and back again with an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np

from distopt.backend import Array, namespace

__all__ = ["Codec", "Place", "as_bytes", "join"]


@dataclass(frozen=True)
class Place:
    """Where something is encoded: what random numbers of a codec may depend on, and nothing else.

    Attributes:
        step: of the training.
        rank: that encodes.
        group: names of the variables that are encoded together.
        part: number of the part of them.
        stage: 0: a rank's own gradients. 1: the sum of all ranks'.
    """

    step: int
    rank: int
    group: str
    part: int
    stage: int

    def __str__(self) -> str:
        return f"{self.step};{self.rank};{self.group};{self.part};{self.stage}"


class Codec(ABC):
    """Turns float32 numbers into bytes and back. One of your own defines `name`, `encode` and `decode`.

    What it must promise: `decode(encode(x), n)` is the same bits wherever it is computed; a number that is
    not finite makes at least one that is not finite, so that no codec hides a gradient which exploded. It
    keeps nothing between calls, and does not change what it is given.

    Attributes:
        exchange: how ranks exchange payloads. "slices": each rank decodes and sums its slice of all ranks'
            gradients in float32, divides it, and encodes the result again for everybody; what a rank sends
            does not grow with the number of ranks. "gather": every rank gets every rank's payload and sums
            all of them; for codecs that send few of the numbers, which a sum of many is not any more.
        random: whether it draws random numbers, by the place that `at` is given.
    """

    exchange: ClassVar[Literal["slices", "gather"]] = "slices"
    random: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name with its arguments, as on the command line."""

    @abstractmethod
    def encode(self, values: Array) -> Array:
        """Encode numbers.

        Args:
            values: float32 [n], contiguous; n may be 0. Not modified.

        Returns:
            The payload: uint8 [bytes], contiguous, on the same device.
        """

    @abstractmethod
    def decode(self, payload: Array, n: int) -> Array:
        """Return the float32 [n] that `encode` made `payload` of; a new array."""

    def add_decoded(self, payload: Array, total: Array) -> None:
        """Add what `decode` would give to `total`, float32 [n], in place."""
        total += self.decode(payload, total.size)

    def wire_bytes(self, n: int) -> int:
        """Return the length of the payload of n numbers, in bytes.

        This one encodes zeros to find out; a codec that can compute it overrides it.
        """
        return int(self.encode(np.zeros(n, np.float32)).size)

    def at(self, place: Place) -> Self:
        """Return the codec to be used in one place; itself, unless it draws random numbers."""
        del place
        return self

    def __repr__(self) -> str:
        return f"<codec {self.name}>"


def as_bytes(array: Array) -> Array:
    """Return a contiguous array's memory as uint8 [bytes]."""
    return array.reshape(-1).view("u1")  # type: ignore[no-any-return]


def join(*parts: Array) -> Array:
    """Return arrays of any dtype as one array of bytes, in order."""
    return namespace(*parts).concatenate([as_bytes(part) for part in parts])  # type: ignore[no-any-return]
