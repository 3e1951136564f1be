"""Signals that ask this process to stop: noted, to be acted on between steps."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["MEANING", "SignalNotes"]

MEANING = {
    signal.SIGUSR1: "SIGUSR1: the scheduler is about to take its machine",
    signal.SIGTERM: "SIGTERM: it was told to end",
    signal.SIGINT: "SIGINT: Ctrl-C",
}
"""What is noted, and what it means."""


class SignalNotes:
    """Notes the first signal that asks this process to stop, instead of ending at once.

    One that listens inside another one's time, as a training does after its start-up, takes over what that
    has noted.

    Attributes:
        asked: the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Generator[None]:
        """Note signals inside the block; a second SIGINT raises KeyboardInterrupt."""
        before: dict[int, Any] = {}
        try:
            for number in MEANING:
                before[number] = signal.signal(number, self._note)
        except ValueError:
            before.clear()  # not the main thread (ranks as threads): signals are another's business
        # After all handlers are in place: what comes in between is not lost.
        for handler in before.values():
            earlier = getattr(handler, "__self__", None)
            if isinstance(earlier, SignalNotes) and earlier is not self:
                self.asked = earlier.asked or self.asked
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        del frame
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: this person does not want to wait
        self.asked = self.asked or signal.Signals(number)
