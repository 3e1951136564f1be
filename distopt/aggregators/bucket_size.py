"""How large a bucket should be: measured on the communicator at hand, in a fraction of a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from distopt.communicators import Communicator

__all__ = ["DEFAULT_BUCKET_BYTES", "measured_bucket_bytes"]

DEFAULT_BUCKET_BYTES = 4 << 20
"""Where there is nothing to measure: one rank, or ranks as threads."""

_SMALLEST, _LARGEST = 256 << 10, 16 << 20
_PROBE_BYTES = 1 << 20
_PASS_SECONDS = 0.02
_ALL_SECONDS = 0.25
_AS_GOOD = 1.05


def measured_bucket_bytes(
    communicator: Communicator, slab_bytes: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Return the smallest bucket that costs at most 5 % more than the best. Collective; the same everywhere.

    Some megabytes are summed in buckets of several sizes, all started before the first is waited for.
    Smaller buckets start earlier and leave less to wait for at the end, so the smallest of those that are
    as good is the one to use.

    Args:
        communicator: that will reduce the buckets.
        slab_bytes: how much there is to reduce.
        clock: gives seconds.
    """
    probe = min(_PROBE_BYTES, slab_bytes)
    memory = communicator.allocate(max(1, min(slab_bytes, _LARGEST) // 4), np.float32)

    def seconds(total: int, bucket: int) -> float:
        length, step = max(1, total // 4), max(1, bucket // 4)
        communicator.barrier()
        began = clock()
        pendings = [
            communicator.all_reduce(memory[start : min(start + step, length)])
            for start in range(0, length, step)
        ]
        for pending in pendings:
            pending.wait()
        return clock() - began

    seconds(probe, probe)  # the first time is another matter: connections, pages
    (one,) = _slowest(communicator, [seconds(probe, probe)])
    total = int(min(memory.nbytes, max(probe, probe * _PASS_SECONDS / max(one, 1e-9))))
    sizes = [_SMALLEST]
    while sizes[-1] < min(total, _LARGEST):
        sizes.append(2 * sizes[-1])
    one_pass = max(one * total / max(probe, 1), 1e-9)
    rounds = int(min(3, max(1, _ALL_SECONDS / (one_pass * len(sizes)))))
    best = [min(seconds(total, size) for _ in range(rounds)) for size in sizes]
    slowest = _slowest(communicator, best)
    return next(size for size, took in zip(sizes, slowest, strict=True) if took <= _AS_GOOD * min(slowest))


def _slowest(communicator: Communicator, seconds: list[float]) -> list[float]:
    """Return the maximum over ranks, so that all decide alike."""
    return communicator.all_reduce(np.array(seconds), "max").wait().tolist()
