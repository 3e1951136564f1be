"""Numbers in blocks of equal length, each with a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distopt.backend import Array, namespace

__all__ = ["Blocks", "check_block", "in_blocks"]


@dataclass(frozen=True)
class Blocks:
    """How n numbers are cut: into `count` blocks of `length`, the last one filled up with zeros."""

    n: int
    length: int

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.n // self.length) if self.n else 0

    def rows(self, values: Array) -> Array:
        """Return [n] as [count, length]; a view where nothing has to be filled up."""
        if self.count * self.length == self.n:
            return values.reshape(self.count, self.length)
        filled = namespace(values).zeros(self.count * self.length, values.dtype)
        filled[: self.n] = values
        return filled.reshape(self.count, self.length)  # type: ignore[no-any-return]

    def flat(self, rows: Array) -> Array:
        """Return [count, length] as [n]."""
        return rows.reshape(-1)[: self.n]

    def sizes(self) -> Array:
        """Return how many of the n numbers each block has, int64 [count]."""
        sizes = np.full(self.count, self.length, np.int64)
        if self.count:
            sizes[-1] = self.n - (self.count - 1) * self.length
        return sizes


def in_blocks(n: int, block: int) -> Blocks:
    """Return how n numbers are cut; fewer than a block are one block of their own length."""
    return Blocks(n, min(block, n) if n else block)


def check_block(name: str, block: int) -> None:
    """Raise where the length of a block makes no sense."""
    if block < 1:
        raise ValueError(f"{name} needs blocks of at least 1 number, got {block}; 4096 is usual")
