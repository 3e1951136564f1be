"""Which algorithm reduces which array: the fastest, as measured on these ranks when it is first needed.

Sizes are taken in classes, powers of 4 bytes; a class is measured once, on scratch memory, for arrays that
lie in shared memory and for those that don't. All ranks gather all times and count each algorithm's as its
slowest rank's, so they decide alike by construction.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from distopt.backend import Array
from distopt.communicators.algorithm import Algorithm

__all__ = ["NAMES", "VARIABLE", "Choice", "algorithm_from_environment", "checked_name", "size_class"]

VARIABLE = "DISTOPT_ALLREDUCE"

NAMES = ("mpi", "mpi-nonblocking", "shared", "ring", "hierarchical")
"""All algorithms that there are; which of them can be used depends on where the ranks are."""

LARGEST_MEASURED = 2 * 2**20
"""Bytes; what is larger goes by this size: the order of the algorithms no longer changes there."""

_ROUNDS = 7
_ROUNDS_OF_SMALL = 40  # one switch to another process takes as long as a hundred small reductions
_WARM_UPS = 3
_BYTES_OF_A_TURN = 16 * 2**10  # small ones are timed several at a time, for the clock's sake
_MOST_OF_A_TURN = 16


def algorithm_from_environment(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return DISTOPT_ALLREDUCE: the name of an algorithm; None for "auto", or where it is not set.

    Raises:
        ValueError: there is no such algorithm.
    """
    return checked_name(environ.get(VARIABLE, "").strip().lower() or "auto")


def checked_name(name: str) -> str | None:
    """Return the name of an algorithm as it is, None for "auto".

    Raises:
        ValueError: there is no such algorithm.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(
            f"the all_reduce algorithm must be auto or one of {', '.join(NAMES)}, got {name!r} (from "
            f"algorithm=... or {VARIABLE})"
        )
    return None if name == "auto" else name


def size_class(size_bytes: int) -> int:
    """Return the exponent of the smallest power of 4 that is at least `size_bytes`, as far as classes go."""
    exponent = 0
    while 4**exponent < min(size_bytes, LARGEST_MEASURED):
        exponent += 1
    return exponent


class Choice:
    """Chooses among algorithms.

    Args:
        algorithms: in the order of preference where nothing is measured; the last one can reduce anything.
        last_is_fallback: whether the last one is taken only where no other can.
        forced: name of the one to take wherever it can; None: the fastest.
        in_shared_memory: whether an array lies there.
        scratch: makes zeroed memory to measure in: (whether in shared memory, bytes) -> float32.
        share: given this rank's seconds, returns those of all ranks. Collective.
        barrier: waits for all ranks.

    Attributes:
        seconds: what was measured, the slowest rank's: (whether in shared memory, class) -> name -> seconds.

    Raises:
        ValueError: there is no algorithm of the forced name.
    """

    def __init__(
        self,
        algorithms: Sequence[Algorithm],
        forced: str | None,
        *,
        last_is_fallback: bool = False,
        in_shared_memory: Callable[[Array], bool],
        scratch: Callable[[bool, int], Array],
        share: Callable[[list[float]], Sequence[Sequence[float]]],
        barrier: Callable[[], None],
    ) -> None:
        names = [algorithm.name for algorithm in algorithms]
        if forced is not None and forced not in names:
            raise ValueError(
                f"all_reduce algorithm {forced!r} is not available here: it must be one of "
                f"{', '.join(names)}, or auto for the fastest (algorithm=... of connect, or {VARIABLE})."
            )
        self._algorithms = list(algorithms)
        self._forced = forced
        self._last_is_fallback = last_is_fallback
        self._in_shared_memory = in_shared_memory
        self._scratch = scratch
        self._share = share
        self._barrier = barrier
        self._chosen: dict[tuple[bool, int, tuple[str, ...]], Algorithm] = {}
        self.seconds: dict[tuple[bool, int], dict[str, float]] = {}

    def choose(self, flat: Array, op: str, number: int) -> Algorithm:
        """Return the algorithm for an array. Collective: at its class's first use it is measured.

        Args:
            flat: as `Algorithm.start` takes it; 16-bit floats leave those that take them.
            op: "sum", "max" or "min".
            number: of the collective that needs it, for messages.
        """
        able = [algorithm for algorithm in self._algorithms if algorithm.can(flat, op)]
        if self._last_is_fallback and len(able) > 1:
            able = able[:-1]
        for algorithm in able:
            if algorithm.name == self._forced:
                return algorithm
        if len(able) == 1 or self._forced is not None:
            return able[0]
        shared, exponent = self._in_shared_memory(flat), size_class(flat.nbytes)
        key = shared, exponent, tuple(algorithm.name for algorithm in able)
        if key not in self._chosen:
            self._chosen[key] = self._measure(able, shared, exponent, number)
        return self._chosen[key]

    def describe(self) -> dict[str, str]:
        """Return in words what was measured and chosen, by kind of memory and size."""
        found: dict[str, str] = {}
        for (shared, exponent), seconds in sorted(self.seconds.items()):
            most = "and more" if 4**exponent >= LARGEST_MEASURED else f"to {_in_bytes(4**exponent)}"
            times = ", ".join(f"{name} {1e6 * took:.1f} us" for name, took in seconds.items())
            kind = "allocated" if shared else "other"
            found[f"{kind} memory, {_in_bytes(4 ** max(exponent - 1, 0))} {most}"] = (
                f"{min(seconds, key=lambda name: seconds[name])} ({times})"
            )
        return found

    def _measure(self, able: Sequence[Algorithm], shared: bool, exponent: int, number: int) -> Algorithm:
        size_bytes = max(4, min(4**exponent, LARGEST_MEASURED))
        flat = self._scratch(shared, size_bytes)
        for algorithm in self._algorithms:
            if algorithm.backlog:
                algorithm.flush()
        starts = [algorithm.prepare(flat, "sum") for algorithm in able]
        repeats = max(1, min(_MOST_OF_A_TURN, _BYTES_OF_A_TURN // size_bytes))
        rounds = _ROUNDS_OF_SMALL if size_bytes <= _BYTES_OF_A_TURN else _ROUNDS
        least = [math.inf] * len(able)
        for turn in range(-_WARM_UPS, rounds):
            for index, start in enumerate(starts):
                self._barrier()
                began = time.perf_counter()
                for _ in range(repeats):
                    start(number).wait()
                took = (time.perf_counter() - began) / repeats
                if turn >= 0:
                    least[index] = min(least[index], took)
        slowest = np.max(np.array(self._share(least)), axis=0)
        self.seconds[shared, exponent] = {
            algorithm.name: float(took) for algorithm, took in zip(able, slowest, strict=True)
        }
        return able[int(np.argmin(slowest))]


def _in_bytes(count: int) -> str:
    for unit in ("B", "KiB"):
        if count < 1024:
            return f"{count} {unit}"
        count //= 1024
    return f"{count} MiB"
