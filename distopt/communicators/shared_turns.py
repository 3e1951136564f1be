"""How the ranks of a host keep step in shared memory: counters, and the queue of what waits for them.

A step is one collective in shared memory, or a piece of one: each rank says that it has come ("arrived"),
does its share of the work as soon as all have, and says that it is done; the step is over when all are.
Steps are worked on in the order in which they were submitted, the same on all ranks.

A counter is written by one rank alone, as one aligned word, and only grows. What was written before it must
be seen by whoever sees it: x86 keeps the order of stores and of loads, elsewhere `_fence` does.
"""

from __future__ import annotations

import collections
import contextvars
import os
import platform
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias, cast

import numpy as np

from distopt.communicators.algorithm import Waiting
from distopt.communicators.shared_memory import Region
from distopt.errors import CommunicatorError

__all__ = ["PART_BYTES", "TABLE_ROWS", "TABLE_WIDTH", "Backlog", "Turns"]

_LINE = 16  # words of 8 bytes: two cache lines, since processors fetch neighbours in pairs
_ARRIVED, _DONE, _TOKENS = 0, _LINE, 2 * _LINE
_IN_FLIGHT = 64  # steps that a rank may be ahead: each has a word for its token
_TABLE = _TOKENS + _IN_FLIGHT
TABLE_ROWS: Final = 2 * _IN_FLIGHT
"""A row written before `submit` is not written again before that step is over, if rows go round."""
TABLE_WIDTH: Final = 32
PART_BYTES: Final = 8 * (_TABLE + TABLE_ROWS * TABLE_WIDTH)
"""How much of a region the counters of a rank need."""

_POLLS = 500  # some 150 microseconds: on a busy machine, giving up the core costs milliseconds
_POLLS_SHARING = 16  # where another rank needs this core to come here
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


Backlog: TypeAlias = "collections.deque[tuple[int, int, Callable[[], None]]]"
"""Of steps: number, token, work."""


class Turns:
    """The steps of the ranks of one host.

    Args:
        region: where the counters are, with `PART_BYTES` for each rank.
        rank: number of this rank among them.
        waiting: makes the context in which this rank may block.
        backlog: an empty queue, for the steps of which this rank has yet to do its share.

    Attributes:
        backlog: see above. Empty: no other rank waits for this one.
        tables: of each rank, [TABLE_ROWS * TABLE_WIDTH]: what it tells the others of its steps. What a rank
            wrote before `submit` is there when the others do their share.
    """

    def __init__(self, region: Region, rank: int, waiting: Waiting, backlog: Backlog) -> None:
        self._words = [memoryview(cast("Any", part))[: part.size // 8 * 8].cast("q") for part in region.parts]
        self._own = self._words[rank]
        self._others = [words for other, words in enumerate(self._words) if other != rank]
        self.tables = [words[_TABLE : _TABLE + TABLE_ROWS * TABLE_WIDTH] for words in self._words]
        self._neighbours = [other for other in range(len(self._words)) if other != rank]
        self._rank = rank
        self._waiting = waiting
        self.backlog = backlog
        # Not `np.errstate` around each: entering it takes as long as a small reduction.
        context = contextvars.copy_context()
        context.run(np.seterr, all="ignore")  # as MPI does: an infinite sum is a value, not a warning
        self._quietly = context.run
        self._submitted = 0
        self._finished = 0
        self._polls = _POLLS if len(self._words) <= (os.cpu_count() or 1) else _POLLS_SHARING
        self._collective = 0  # the number of the last one, for messages

    def submit(self, work: Callable[[], None], token: int, collective: int) -> int:
        """Say that this rank has come to a step; its memory is the others' from now on. Moves on, too.

        Args:
            work: does this rank's share, when all have come.
            token: what must be equal on all ranks: a checksum of what the step is about.
            collective: its number, for messages.

        Returns:
            The step's number, for `test` and `complete`.
        """
        number = self._submitted + 1
        if number - self._finished > _IN_FLIGHT:
            self.complete(number - _IN_FLIGHT)
        self._submitted = number
        self._collective = collective
        own = self._own
        own[_TOKENS + number % _IN_FLIGHT] = token
        self.backlog.append((number, token, work))
        if not _ORDERED:
            _fence()
        own[_ARRIVED] = number
        self.progress()
        return number

    def progress(self) -> None:
        """Do this rank's share of all steps to which all have come."""
        queue = self.backlog
        while queue:
            number, token, work = queue[0]
            for words in self._others:
                if words[_ARRIVED] < number:
                    return
            if not _ORDERED:
                _fence()
            queue.popleft()
            try:
                place = _TOKENS + number % _IN_FLIGHT
                for words in self._others:
                    if words[place] != token:
                        self._raise_mismatch(place, token)
                self._quietly(work)
            finally:
                if not _ORDERED:
                    _fence()
                self._own[_DONE] = number

    def test(self, number: int) -> bool:
        """Move on without blocking, and say whether a step is over on all ranks."""
        if self._finished < number:
            if self.backlog:
                self.progress()
            for words in self._words:
                if words[_DONE] < number:
                    return False
            if not _ORDERED:
                _fence()
            self._finished = number
        return True

    def complete(self, number: int) -> None:
        """Block until a step is over on all ranks."""
        for _ in range(self._polls):
            if self.test(number):
                return
        self._wait_for(lambda: self.test(number))

    def flush(self) -> None:
        """Block until this rank has done its share of all that it has started."""

        def none_left() -> bool:
            self.progress()
            return not self.backlog

        if self.backlog and not none_left():
            self._wait_for(none_left)

    def finish(self) -> None:
        """Block until all that this rank has started is over on all ranks."""
        self.complete(self._submitted)

    def _wait_for(self, done: Callable[[], bool]) -> None:
        with self._waiting("all_reduce", self._collective):
            yields = 0
            while not done():
                yields += 1
                if yields < _YIELDS:
                    os.sched_yield()
                else:
                    time.sleep(_NAP_SECONDS)

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
