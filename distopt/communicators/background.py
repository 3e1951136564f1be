"""A thread that moves messages on while the main thread computes.

MPI moves data inside its calls only, and one layer's backward pass can take longer than the transfer of all
gradients. The thread looks at the messages at intervals and sleeps in between: NumPy and BLAS let go of
Python's lock while they compute, so that its short turns hardly cost them anything.
"""

from __future__ import annotations

import threading
import time

from distopt.communicators.flows import Flows

__all__ = ["BackgroundProgress"]

# Up to 2 MB are under way in each direction, 16 ms at 1 Gbit/s; a look takes 20 us, 4 % of a core.
_INTERVAL_SECONDS = 5e-4


class BackgroundProgress:
    """Moves flows on until they are done, then waits until it is woken.

    What goes wrong in a flow is raised where the main thread next moves or waits for it.

    Args:
        flows: what to move on.
        interval_seconds: between two looks; shorter than what is under way lasts: the line is never idle.
    """

    def __init__(self, flows: Flows, interval_seconds: float = _INTERVAL_SECONDS) -> None:
        self._flows = flows
        self._interval_seconds = interval_seconds
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="distopt progress", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let it look after what was just added."""
        self._wake.set()

    def close(self) -> None:
        """End the thread; what is in flight stays where it is."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._flows.busy and not self._closing:
                if not self._flows.attended:
                    try:
                        self._flows.progress()
                    except BaseException:  # kept by the flows, and raised in the main thread
                        break
                time.sleep(self._interval_seconds)
            if self._closing:
                return
