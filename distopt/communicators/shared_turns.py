"""How the ranks of a host keep step in shared memory: counters, and the queue of what waits for them.

A step is one collective in shared memory, or a piece of one: each rank says that it has come ("arrived"),
does its share of the work as soon as all have, and says that it is done; the step is over when all are.
Steps are worked on in the order in which they were submitted, the same on all ranks.

A counter is written by one rank alone, as one aligned word, and only grows. What was written before it must
be seen by whoever sees it: x86 keeps the order of stores and of loads, elsewhere `_fence` does.
"""

from __future__ import annotations

import collections
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Any, Final, cast

from distopt.communicators.algorithm import Waiting
from distopt.communicators.shared_memory import Region
from distopt.errors import CommunicatorError

__all__ = ["PART_BYTES", "Turns"]

_LINE = 16  # words of 8 bytes: two cache lines, since processors fetch neighbours in pairs
_ARRIVED, _DONE, _TOKENS = 0, _LINE, 2 * _LINE
_IN_FLIGHT = 64  # steps that a rank may be ahead: each has a word for its token
PART_BYTES: Final = 8 * (_TOKENS + _IN_FLIGHT)
"""How much of a region the counters of a rank need."""

_POLLS = 50  # some 10 microseconds; then another rank may need this core to come here
_YIELDS = 2000  # then a rank is late by more than a switch of threads takes
_NAP_SECONDS = 1e-4
_ORDERED: Final = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
_lock = threading.Lock()


def _fence() -> None:
    """Let no store or load move across, on processors that reorder them.

    A lock's acquire keeps what follows from moving up, its release what precedes from moving down, and an
    acquire does not move above an earlier release of the same lock: two round trips are a barrier both ways.
    """
    with _lock:
        pass
    with _lock:
        pass


class Turns:
    """The steps of the ranks of one host.

    Args:
        region: where the counters are, with `PART_BYTES` for each rank.
        rank: number of this rank among them.
        waiting: makes the context in which this rank may block.
    """

    def __init__(self, region: Region, rank: int, waiting: Waiting) -> None:
        self._words = [memoryview(cast("Any", part))[: part.size // 8 * 8].cast("q") for part in region.parts]
        self._own = self._words[rank]
        self._others = [words for other, words in enumerate(self._words) if other != rank]
        self._neighbours = [other for other in range(len(self._words)) if other != rank]
        self._rank = rank
        self._waiting = waiting
        self._queue: collections.deque[tuple[int, int, Callable[[], None]]] = collections.deque()
        self._submitted = 0
        self._finished = 0
        self._collective = 0  # the number of the last one, for messages

    @property
    def idle(self) -> bool:
        """Whether no step of this rank is under way."""
        return self._finished == self._submitted

    def submit(self, work: Callable[[], None], token: int, collective: int) -> int:
        """Say that this rank has come to a step; its memory is the others' from now on.

        Args:
            work: does this rank's share, when all have come.
            token: what must be equal on all ranks: a checksum of what the step is about.
            collective: its number, for messages.

        Returns:
            The step's number, for `over` and `complete`.
        """
        number = self._submitted + 1
        if number - self._finished > _IN_FLIGHT:
            self.complete(number - _IN_FLIGHT, collective)
        self._submitted = number
        self._collective = collective
        self._own[_TOKENS + number % _IN_FLIGHT] = token
        self._queue.append((number, token, work))
        if not _ORDERED:
            _fence()
        self._own[_ARRIVED] = number
        return number

    def progress(self) -> bool:
        """Do this rank's share of all steps to which all have come; return whether there was one."""
        queue = self._queue
        moved = False
        while queue:
            number, token, work = queue[0]
            for words in self._others:
                if words[_ARRIVED] < number:
                    return moved
            if not _ORDERED:
                _fence()
            queue.popleft()
            try:
                place = _TOKENS + number % _IN_FLIGHT
                for words in self._others:
                    if words[place] != token:
                        self._raise_mismatch(place, token)
                work()
            finally:
                if not _ORDERED:
                    _fence()
                self._own[_DONE] = number
            moved = True
        return moved

    def over(self, number: int) -> bool:
        """Whether all ranks are done with a step; this rank's share must have been done."""
        if self._finished >= number:
            return True
        if self._own[_DONE] < number:
            return False
        for words in self._others:
            if words[_DONE] < number:
                return False
        if not _ORDERED:
            _fence()
        self._finished = number
        return True

    def test(self, number: int) -> bool:
        """Move on without blocking, and say whether a step is over."""
        if self._queue:
            self.progress()
        return self.over(number)

    def complete(self, number: int, collective: int) -> None:
        """Block until a step is over on all ranks."""
        if self.test(number):
            return
        for _ in range(_POLLS):
            if self.test(number):
                return
        with self._waiting("all_reduce", collective):
            yields = 0
            while not self.test(number):
                yields += 1
                if yields < _YIELDS:
                    os.sched_yield()
                else:
                    time.sleep(_NAP_SECONDS)

    def flush(self) -> None:
        """Block until all steps of this rank are over on all ranks."""
        if self._finished < self._submitted:
            self.complete(self._submitted, self._collective)

    def _raise_mismatch(self, place: int, token: int) -> None:
        different = [
            neighbour
            for neighbour, words in zip(self._neighbours, self._others, strict=True)
            if words[place] != token
        ]
        raise CommunicatorError(
            f"local rank {self._rank} and local rank(s) {different} of this host reduce different "
            "places of shared memory together: other offsets, lengths, dtypes or operations. All ranks must "
            "pass the same slice of what `allocate` gave; set DISTOPT_DEBUG=1 to compare every call."
        )
