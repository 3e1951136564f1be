"""Nothing hangs: a thread of each rank that notices when a collective can't end, and ends the job.

Two things are noticed, and the ranks to blame are named:

- a rank left (returned, or called sys.exit) while another waits for it in a collective: at once;
- a collective lasts longer than DISTOPT_TIMEOUT seconds (a rank is stuck, stopped, or takes other
  turns).

The threads talk over a channel of their own, so that they get through while the main threads are
inside MPI calls. A rank that can't answer (stopped, or holding Python's lock) is named by its
silence.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["Channel", "Note", "Wait", "Watchdog", "timeout_from_environment"]

DEFAULT_TIMEOUT_SECONDS = 600.0
_TICK_SECONDS = 0.2
_LEAVING_TICK_SECONDS = 0.005
_ANSWER_SECONDS = 1.5
_STUCK_EXIT_CODE = 75  # EX_TEMPFAIL


def timeout_from_environment() -> float:
    """Return DISTOPT_TIMEOUT in seconds: 600 where it is not set, 0 for no limit.

    Raises:
        ValueError: it is no number, or negative.
    """
    text = os.environ.get("DISTOPT_TIMEOUT", "").strip()
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT_SECONDS
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise ValueError(f"DISTOPT_TIMEOUT must be a number of seconds >= 0 (0: no limit), got {text!r}")
    return seconds


@dataclass(frozen=True)
class Note:
    """What one rank tells another about itself.

    `counts` is the number of collectives that it has started, by label of the communicator.
    """

    kind: Literal["left", "ask", "answer"]
    host: str
    doing: str
    counts: dict[str, int]


class Channel(Protocol):
    """How notes travel; used by the watchdog's thread only."""

    def send(self, rank: int, note: Note) -> None:
        """Send without blocking."""
        ...

    def receive(self) -> list[tuple[int, Note]]:
        """Return what has come, with the senders."""
        ...

    def flush(self) -> None:
        """Wait until all that was sent has gone."""
        ...


@dataclass
class Wait:
    """A rank in a collective. One object may serve many collectives: `number` tells them apart.

    Attributes:
        label: of the communicator.
        operation: name of the collective.
        number: of the collective in that communicator.
    """

    label: str
    operation: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.operation}, collective number {self.number} of {self.label}"


class Watchdog:
    """Watches the collectives of one rank.

    Args:
        rank: number of this rank.
        size: number of ranks.
        host: name of this host.
        channel: way to the other ranks.
        abort: ends the job: called with an exit code and a message.
        timeout_seconds: limit for one wait; 0 for none.

    Attributes:
        waiting: the collective that this rank is in, or None. To be set by whoever waits: one store is all
            that a collective costs, since when it lasts is noted by the watchdog's thread.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        channel: Channel,
        abort: Callable[[int, str], Any],
        timeout_seconds: float,
    ) -> None:
        self._rank = rank
        self._size = size
        self._host = host
        self._channel = channel
        self._abort = abort
        self._timeout_seconds = timeout_seconds
        self._counts: dict[str, Callable[[], int]] = {}
        self.waiting: Wait | None = None
        self._seen: tuple[Wait, float] | None = None
        self._left: dict[int, Note] = {}
        self._known: dict[int, Note] = {}
        self._stacks_shown = False
        self._leaving = False
        self._wake = threading.Event()
        self._all_left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="distopt watchdog", daemon=True)
        self._thread.start()

    def watch(self, label: str, count: Callable[[], int]) -> None:
        """Take note of a communicator: its label, and what tells how many collectives it has started."""
        self._counts[label] = count

    def leave(self) -> None:
        """Tell the others that this rank is done, and wait until all are; stops the thread."""
        if not self._leaving:
            self._leaving = True
            self.waiting = Wait("world", "waiting for the other ranks to end", -1)
            self._wake.set()
        self._all_left.wait()
        self._thread.join()

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _note(self, kind: Literal["left", "ask", "answer"]) -> Note:
        waiting = self.waiting
        doing = f"in {waiting}" if waiting else "outside of collectives"
        counts = {label: count() for label, count in list(self._counts.items())}
        return Note(kind, self._host, doing, counts)

    def _run(self) -> None:
        told = False
        while True:
            self._wake.wait(_TICK_SECONDS if not self._leaving else _LEAVING_TICK_SECONDS)
            if self._leaving and not told:
                for rank in self._others():
                    self._channel.send(rank, self._note("left"))
                told = True
                self._wake.clear()
            self._read_notes()
            if told and len(self._left) == self._size - 1:
                self._channel.flush()
                self._all_left.set()
                return
            waiting = copy.copy(self.waiting)
            if waiting is None:
                self._seen = None
            else:
                if self._seen is None or self._seen[0] != waiting:
                    self._seen = waiting, time.monotonic()
                self._check(*self._seen)

    def _read_notes(self) -> None:
        for rank, note in self._channel.receive():
            self._known[rank] = note
            if note.kind == "left":
                self._left[rank] = note
            elif note.kind == "ask":
                self._show_stacks(self._note("answer").doing)
                self._channel.send(rank, self._note("answer"))

    def _check(self, waiting: Wait, since: float) -> None:
        gone = [
            rank
            for rank, note in self._left.items()
            if note.counts.get(waiting.label, waiting.number) < waiting.number
        ]
        if gone:
            names = ", ".join(f"rank {rank} (host {self._left[rank].host})" for rank in sorted(gone))
            self._report(
                f"it waits in {waiting}, but {names} already left: it returned, or called "
                "sys.exit, before that collective."
            )
        elif 0 < self._timeout_seconds < time.monotonic() - since:
            self._give_up(waiting)

    def _give_up(self, waiting: Wait) -> None:
        self._show_stacks(f"in {waiting}")
        self._known = dict(self._left)
        for rank in self._others():
            self._channel.send(rank, self._note("ask"))
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline and len(self._known) < self._size - 1:
            time.sleep(0.05)
            self._read_notes()
        if self.waiting != waiting:
            return  # it ended after all, while we asked
        silent = [f"rank {rank}" for rank in self._others() if rank not in self._known]
        blamed = [
            f"rank {rank} (host {note.host}), which is {note.doing}"
            for rank, note in sorted(self._known.items())
            if note.counts.get(waiting.label, waiting.number) < waiting.number
            or (waiting.number < 0 and rank not in self._left)
        ]
        if silent:
            blamed.append(
                f"{', '.join(silent)}, which gives no answer (dead, stopped, cut off, or in C code)"
            )
        self._report(
            f"{waiting}, lasts longer than {self._timeout_seconds:g} s (DISTOPT_TIMEOUT). "
            "It waits for "
            + ("; ".join(blamed) or "no rank in particular: all have called it; see the stacks above")
            + ". Where a longer wait is right, set DISTOPT_TIMEOUT (seconds; 0: no limit)."
        )

    def _report(self, message: str) -> None:
        # Several ranks may notice the same: the lower ones speak first, and end the job with that.
        time.sleep(min(0.5 * self._rank, 3.0))
        self._abort(_STUCK_EXIT_CODE, message)

    def _show_stacks(self, doing: str) -> None:
        """Write what the threads of this rank do; once, in one piece, the innermost call last."""
        stream = sys.__stderr__
        if self._stacks_shown or stream is None:
            return
        self._stacks_shown = True
        text = f"distopt: rank {self._rank} of {self._size} on host {self._host} is {doing}:\n"
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for identity, frame in sys._current_frames().items():  # pyright: ignore[reportPrivateUsage]
            if identity != threading.get_ident():
                text += f"Thread {names.get(identity, identity)}:\n"
                text += "".join(traceback.format_stack(frame))
        stream.write(text)
        stream.flush()
