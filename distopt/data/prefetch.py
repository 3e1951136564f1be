"""Batches made ahead of time by a thread, and how long the step waited for them."""

from __future__ import annotations

import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")


class _Belt(Generic[T]):
    """What the thread and the `Prefetcher` share; holds no reference to the latter."""

    def __init__(self, make_batch: Callable[[int], T], first: int, end: int | None, depth: int) -> None:
        self.make_batch = make_batch
        self.first = first
        self.end = end
        self.depth = depth
        self.changed = threading.Condition()
        self.ready: deque[T] = deque()
        self.making: int | None = None
        self.error: BaseException | None = None
        self.closed = False
        self.making_seconds = 0.0

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.ready.clear()
            self.changed.notify_all()

    def run(self) -> None:
        step = self.first
        while self.end is None or step < self.end:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or len(self.ready) < self.depth)
                if self.closed:
                    return
                self.making = step
            begin = time.perf_counter()
            try:
                batch = self.make_batch(step)
            except BaseException as error:  # whatever it is, `get` raises it where it is seen
                with self.changed:
                    self.error = error
                    self.making = None
                    self.changed.notify_all()
                return
            with self.changed:
                self.making_seconds += time.perf_counter() - begin
                self.making = None
                if self.closed:
                    return
                self.ready.append(batch)
                self.changed.notify_all()
            del batch  # or its memory could not go back to the pool before the next one is made
            step += 1


class Prefetcher(Generic[T]):
    """Makes the batches of the coming steps in a thread while the current step computes.

    A batch belongs to the caller; its memory goes back to `backend.memory_pool` when the caller
    drops it, so from the first few steps on nothing is allocated (a fixed ring of buffers would do
    the same, but would overwrite batches that somebody kept). An error in `make_batch` is raised by
    the `get` of its step, with the traceback of the thread. The thread is a daemon and ends when
    the prefetcher is closed or dropped: it never keeps a process from ending.

    >>> with Prefetcher(lambda step: 10 * step, first_step=3) as batches:
    ...     print(batches.get(3), batches.get(4))
    30 40

    Args:
        make_batch: step -> batch. Called for consecutive steps, in one thread.
        first_step: the step that the first `get` asks for.
        depth: batches that are ready at most; 0 makes each one inside `get`, without a thread.
        end_step: the first step that is not made; None has no end.

    Attributes:
        waited_seconds: time spent in `get` so far: the exposed cost of input.

    Raises:
        ValueError: `depth` is negative, or `end_step` lies before `first_step`.
    """

    def __init__(
        self,
        make_batch: Callable[[int], T],
        first_step: int = 0,
        depth: int = 2,
        end_step: int | None = None,
    ) -> None:
        if depth < 0:
            raise ValueError(f"depth must be 0 (no thread) or more batches, got {depth}")
        if end_step is not None and end_step < first_step:
            raise ValueError(f"end_step {end_step} lies before first_step {first_step}")
        self._belt = _Belt(make_batch, first_step, end_step, depth)
        self._next = first_step
        self.waited_seconds = 0.0
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._belt.run, name="distopt-prefetch", daemon=True)
            self._thread.start()
        self._finalizer = weakref.finalize(self, self._belt.close)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def making_seconds(self) -> float:
        """Time spent in `make_batch` so far, hidden and exposed."""
        return self._belt.making_seconds

    def get(self, step: int) -> T:
        """Return the batch of a step; steps are asked for one after the other.

        Raises:
            ValueError: another step comes next.
            IndexError: the step is `end_step` or later.
            RuntimeError: the prefetcher is closed.
            BaseException: whatever `make_batch` raised for this step.
        """
        belt = self._belt
        if belt.closed:
            raise RuntimeError(f"the prefetcher is closed; step {step} can't be had from it")
        if step != self._next:
            raise ValueError(
                f"step {step} was asked for, but {self._next} comes next; steps are made in order. "
                "Make a new Prefetcher with first_step to jump."
            )
        if belt.end is not None and step >= belt.end:
            raise IndexError(f"step {step} was asked for, but the steps end before {belt.end}")
        begin = time.perf_counter()
        try:
            batch = self._make(step) if self._thread is None else self._take(step)
        finally:
            self.waited_seconds += time.perf_counter() - begin
        self._next += 1
        return batch

    def _make(self, step: int) -> T:
        begin = time.perf_counter()
        batch = self._belt.make_batch(step)
        self._belt.making_seconds += time.perf_counter() - begin
        return batch

    def _take(self, step: int) -> T:
        belt = self._belt
        with belt.changed:
            belt.changed.wait_for(lambda: belt.ready or belt.error is not None or belt.closed)
            if belt.ready:
                batch = belt.ready.popleft()
                belt.changed.notify_all()
                return batch
            if belt.error is not None:
                raise belt.error
            raise RuntimeError(f"the prefetcher was closed while step {step} was waited for")

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stop the thread and drop the batches that were not taken. May be called again.

        A thread that is still inside `make_batch` after `timeout_seconds` is left to itself with a
        warning; it can't keep the process alive.
        """
        self._finalizer()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        thread.join(timeout_seconds)
        if thread.is_alive():
            warnings.warn(
                f"the input thread is still making step {self._belt.making} after "
                f"{timeout_seconds:g} s and was left behind; see why make_batch takes so long",
                RuntimeWarning,
                stacklevel=2,
            )
