"""For tests of code that runs on several ranks: a world of threads in this process, with faults."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from distopt.communicators.communicator import Communicator
from distopt.communicators.threads import Fault, ThreadWorld
from distopt.errors import CommunicatorError

__all__ = ["Fault", "world"]

Result = TypeVar("Result")


def world(
    n: int,
    function: Callable[[Communicator], Result],
    faults: Sequence[Fault] = (),
    timeout_seconds: float = 60.0,
    hosts: Sequence[str] | None = None,
) -> list[Result]:
    """Run `function(communicator)` on n ranks, each a thread of this process.

    Args:
        n: number of ranks.
        function: what each rank does.
        faults: what shall go wrong, and where.
        timeout_seconds: limit of the whole run, and of a rank's wait in a collective.
        hosts: pretended host name of each rank; this host for all if None.

    Returns:
        What the ranks returned, by rank.

    Raises:
        CommunicatorError: a fault killed a rank, ranks called different collectives, or a rank did
            not end in time.
        ValueError: a fault was never reached, so that it tested nothing.
        BaseException: the error that a rank raised first, with a note that names the rank.

    Example:
        >>> import numpy as np
        >>> from distopt.testing import world
        >>> world(3, lambda ranks: float(ranks.all_reduce(np.ones(1)).wait()[0]))
        [3.0, 3.0, 3.0]

        With faults, at one of a rank's collectives or training steps:

        >>> from distopt.testing import Fault
        >>> world(3, train, faults=[Fault("kill", rank=1, step=3)])  # doctest: +SKIP
        CommunicatorError: rank 0 of 3 on host node7 waits in all_reduce(float32[26], sum), collective
        number 7 of world, for a rank that will not come: rank 1 was killed.
    """
    shared = ThreadWorld(n, faults, timeout_seconds, hosts)
    results: dict[int, Result] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = function(shared.communicator(rank))
        except BaseException as error:
            shared.end(rank, error)
        else:
            shared.end(rank, None)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(n)
    ]
    deadline = time.monotonic() + timeout_seconds + 1.0  # the waiting ranks report first
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if shared.errors:
        rank, error = shared.errors[0]
        error.add_note(f"raised on rank {rank} of {n}")
        raise error
    late = [rank for rank in range(n) if rank not in shared.ended]
    if late:
        raise CommunicatorError(
            f"rank(s) {late} of {n} did not end within {timeout_seconds:g} s, outside of collectives."
        )
    killed = [rank for rank in range(n) if rank not in results]
    if killed:
        raise CommunicatorError(f"rank(s) {killed} of {n} were killed, and no other rank noticed.")
    if shared.faults_to_come:
        raise ValueError(f"these faults were never reached: {shared.faults_to_come}")
    return [results[rank] for rank in range(n)]
