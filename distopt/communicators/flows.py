"""Collectives made of messages: each a generator, and one loop that moves all of them on.

A flow is written like a blocking program: it starts messages, yields them, and goes on when they are done.
`Flows` runs several at a time, so that the arithmetic of one goes on while the messages of the others
travel, never blocks in `progress`, and sleeps where it has to wait: a rank that is late by seconds costs
no core, and messages that the kernel takes in go on meanwhile.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

from distopt.backend import Array

__all__ = ["Flow", "Flows", "Links"]

Flow: TypeAlias = Generator[list[Any], None, None]
"""Yields the requests (of `Links`) after which it goes on; an empty list: at the next look."""

_LONGEST_PAUSE_SECONDS = 2e-3
_PAUSE_SHARE = 0.1
_EAGER_SECONDS = 30e-6


class Links(Protocol):
    """Messages between the ranks of a group.

    Attributes:
        rank: of this one in the group.
        size: number of ranks.
    """

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        ...

    def send(self, values: Array, to: int, tag: int) -> Any:
        """Start to send host memory, [n]; it must stay as it is until the request is done."""
        ...

    def receive(self, values: Array, source: int, tag: int) -> Any:
        """Start to receive into host memory, [n], what `source` sends with that tag, in order."""
        ...

    def test_some(self, requests: Sequence[Any]) -> Sequence[int]:
        """Move messages on without blocking; return the places of the requests that are done now.

        Each is told once. The requests may belong to several groups.
        """
        ...


class _Running:
    """A flow that waits for messages."""

    __slots__ = ("done", "flow", "open_requests")

    def __init__(self, flow: Flow, done: Callable[[], None]) -> None:
        self.flow = flow
        self.done = done
        self.open_requests = 0


class Flows:
    """Runs flows, the oldest first, a bounded number at a time. `progress` may be called by any thread.

    Args:
        links: whose requests the flows yield.
        limit: how many flows run at once; each has messages of its own and a buffer.
    """

    def __init__(self, links: Links, limit: int) -> None:
        self._links = links
        self._limit = limit
        self._queue: collections.deque[tuple[Flow, Callable[[], None]]] = collections.deque()
        self._running = 0
        self._requests: list[Any] = []
        self._owners: list[_Running] = []
        self._looking: list[_Running] = []  # what waits for something else than messages
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self.attended = False  # the main thread waits, and moves everything itself

    def __len__(self) -> int:
        """Return how many flows are not done."""
        return len(self._queue) + self._running

    @property
    def busy(self) -> bool:
        """Whether something is queued or under way."""
        return bool(self._queue or self._running)

    def add(self, flow: Flow, done: Callable[[], None]) -> None:
        """Queue a flow; it starts at the next `progress`. `done` is called when it has ended."""
        self._queue.append((flow, done))

    def progress(self) -> bool:
        """Move on what can move, without blocking; returns whether anything did.

        Raises:
            BaseException: what a flow raised, in this thread or in another one. Nothing moves after that.
        """
        if not self._lock.acquire(blocking=False):
            return False  # another thread is at it
        try:
            if self._error is not None:
                raise self._error
            return self._move()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._lock.release()

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Move everything on until `is_done`, sleeping while nothing moves."""
        with self._attending():
            last_move = time.perf_counter()
            while not is_done():
                moved = self.progress()
                now = time.perf_counter()
                if moved:
                    last_move = now
                elif now - last_move > _EAGER_SECONDS:
                    # Waits at most a tenth longer than it has to.
                    time.sleep(min(_PAUSE_SHARE * (now - last_move), _LONGEST_PAUSE_SECONDS))

    @contextmanager
    def _attending(self) -> Generator[None]:
        self.attended = True
        try:
            yield
        finally:
            self.attended = False

    def _move(self) -> bool:
        moved = self._start_queued()
        looking, self._looking = self._looking, []
        for running in looking:
            self._advance(running)
        if not self._requests:
            return moved or len(self._looking) < len(looking)
        done = self._links.test_some(self._requests)
        ready: list[_Running] = []
        for place in sorted(done, reverse=True):
            running = self._owners.pop(place)
            del self._requests[place]
            running.open_requests -= 1
            if not running.open_requests:
                ready.append(running)
        for running in reversed(ready):
            self._advance(running)
        self._start_queued()
        return moved or bool(done) or len(self._looking) < len(looking)

    def _start_queued(self) -> bool:
        started = False
        while self._queue and self._running < self._limit:
            running = _Running(*self._queue.popleft())
            self._running += 1
            self._advance(running)
            started = True
        return started

    def _advance(self, running: _Running) -> None:
        """Let a flow go on until it waits, or ends."""
        requests = next(running.flow, None)
        if requests is None:
            self._running -= 1
            running.done()
        elif requests:
            running.open_requests = len(requests)
            self._requests += requests
            self._owners += [running] * len(requests)
        else:
            self._looking.append(running)
