"""Sums in a given order in shared memory: each rank adds up its slice of all ranks' arrays, for all.

As in `shared_reduce.py` each number is read once by one rank and its sum written once to each. But here ranks
bring several arrays, other numbers of them, from other places: each rank writes where its own are into a
table next to the counters, which the others read when it has come.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from distopt.backend import Array
from distopt.communicators.communicator import Pending, cut
from distopt.communicators.shared_reduce import HostSteps, Share
from distopt.communicators.shared_turns import TABLE_ROWS, TABLE_WIDTH
from distopt.communicators.sum_order import SumOrder

__all__ = ["SharedCombine", "combine_share"]

_BLOCK_BYTES = 128 * 2**10
"""Less than in `shared_reduce.py`: more arrays, and sums on the way, share the core's cache."""

_OFFSET_BITS = 44  # of a word in the table; the rest is the number of the region
_PLANS_KEPT = 4096


def combine_share(
    arrays: Sequence[Array], additions: Sequence[tuple[int, int]], results: Sequence[int]
) -> Share:
    """Return the work of adding up slices of arrays in a given order, and of writing the sum to some.

    Args:
        arrays: what is added, each [n], of one dtype; nobody else touches them meanwhile.
        additions: see `SumOrder`; at least one.
        results: numbers of the arrays that receive the sum. The others stay as they are.
    """
    length = max(1, _BLOCK_BYTES // arrays[0].itemsize)
    size = arrays[0].size
    program, open_sums = _with_places(additions)
    *inner, (last_left, last_right, _) = program
    into, *copies = results
    scratch = [np.empty(min(length, size), arrays[0].dtype) for _ in range(open_sums)]
    blocks = [
        [array[start : start + length] for array in arrays]
        + [memory[: min(length, size - start)] for memory in scratch]
        for start in range(0, size, length)
    ]

    def work() -> None:
        for block in blocks:
            for left, right, target in inner:
                np.add(block[left], block[right], out=block[target])
            # Into an array that may be an operand: by now all others were read.
            total = block[into]
            np.add(block[last_left], block[last_right], out=total)
            for copy in copies:
                block[copy][...] = total

    return work


def _with_places(additions: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int, int]], int]:
    """Return (left, right, target) of each addition, and how many sums are open at once.

    Targets are behind the arrays, whose lines in other cores' caches then stay unwritten.
    """
    count = len(additions) + 1
    place = list(range(count))
    program: list[tuple[int, int, int]] = []
    free: list[int] = []
    used = 0
    for left, right in additions:
        at = place[left], place[right]
        ready = [p for p in at if p >= count]
        if ready:
            target, *released = ready
            free += released
        elif free:
            target = free.pop()
        else:
            target, used = count + used, used + 1
        program.append((*at, target))
        place[left] = target
    return program, used


class SharedCombine:
    """Sums in a given order, of arrays in memory that the ranks of a host share.

    Args:
        steps: of the ranks of this host, which are all ranks.
    """

    def __init__(self, steps: HostSteps) -> None:
        self._steps = steps
        self._row = 0
        self._plans: dict[tuple[object, ...], Share] = {}
        self._tokens: dict[tuple[object, ...], int] = {}

    def can(self, order: SumOrder) -> bool:
        """Whether the table has room for the arrays of every rank; the same on all ranks."""
        return max(order.counts) <= TABLE_WIDTH

    def start(self, arrays: Sequence[Array], order: SumOrder, number: int) -> Pending:
        """Start the sum of all ranks' arrays; it comes into each rank's last one.

        Args:
            arrays: this rank's, each [n], n > 0, in shared memory.
            order: of the sum.
            number: of the collective, for messages.
        """
        size, dtype = arrays[-1].size, arrays[-1].dtype
        row = self._row = (self._row + 1) % TABLE_ROWS
        tables = self._steps.turns.tables
        for column, array in enumerate(arrays):
            found = self._steps.memory.locate(array)
            if found is None:
                raise ValueError(
                    f"an array of {array.nbytes} bytes is not in shared memory; `allocate` makes such"
                )
            region, offset = found
            tables[self._steps.memory.rank][row * TABLE_WIDTH + column] = (
                region.number << _OFFSET_BITS | offset
            )

        def work() -> None:
            places = tuple(
                tables[rank][row * TABLE_WIDTH + column]
                for rank, count in enumerate(order.counts)
                for column in range(count)
            )
            key = places, order, size, dtype
            if key not in self._plans:
                if len(self._plans) >= _PLANS_KEPT:
                    self._plans.clear()
                self._plans[key] = self._plan(places, order, size, dtype)
            self._plans[key]()

        return self._steps.submit(work, self._token(order, size, dtype), number, arrays[-1])

    def close(self) -> None:
        """Let go of the memory."""
        self._plans.clear()

    def _token(self, order: SumOrder, size: int, dtype: np.dtype[np.generic]) -> int:
        key = order, size, dtype
        if key not in self._tokens:
            if len(self._tokens) >= _PLANS_KEPT:
                self._tokens.clear()
            self._tokens[key] = zlib.crc32(f"combine {order} {size} {dtype.str}".encode())
        return self._tokens[key]

    def _plan(self, places: Sequence[int], order: SumOrder, size: int, dtype: np.dtype[np.generic]) -> Share:
        """Return this rank's share of the sum of arrays at some places."""
        memory = self._steps.memory
        part = cut(size, memory.size)[memory.rank]
        owners = [rank for rank, count in enumerate(order.counts) for _ in range(count)]
        slices: list[Array] = []
        for rank, place in zip(owners, places, strict=True):
            number, offset = place >> _OFFSET_BITS, place & (1 << _OFFSET_BITS) - 1
            slices.append(memory.view(rank, number, offset, size, dtype)[part])
        results = [int(last) - 1 for last in np.cumsum(order.counts)]
        return combine_share(slices, order.additions, results)
