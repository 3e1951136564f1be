"""Ranks whose data end at different steps stay in step until the last one is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from distopt.communicators import Communicator
from distopt.errors import CommunicatorError

__all__ = ["in_step"]

Batch = TypeVar("Batch")
_END = object()


def in_step(batches: Iterable[Batch], communicator: Communicator) -> Iterator[Batch | None]:
    """Yield this rank's batches, then None until every rank is at the end of its own. Collective.

    Horovod and PyTorch call it "join". A rank without a batch takes part with no examples and no gradients,
    so that each step is that of one process on the union of the batches which there are; and no rank waits
    for one that has left the loop. Every rank makes as many rounds as the one with the most batches:

        for batch in in_step(batches, communicator):
            pairs, examples = [(None, v) for v in variables], 0
            if batch is not None:
                pairs, examples = gradients(batch), len(batch)    # sums over this rank's examples
            optimizer.apply_gradients(pairs, examples=examples)

    Each round is one reduction of 16 bytes. Ranks may have batches of any size, and take any time for them.
    Don't leave the loop by `break` on some ranks only.

    Args:
        batches: of this rank; may be empty.
        communicator: the ranks that go in step.

    Yields:
        A batch, or None where this rank has no more.

    Raises:
        CommunicatorError: on every rank, where `batches` raised an exception on one; it names the rank and
            the exception.
    """
    iterator = iter(batches)
    while True:
        batch, error = _next(iterator)
        counts = np.array([batch is not _END, error is not None], np.float64)
        communicator.all_reduce(counts).wait()
        if counts[1]:
            own = f"rank {communicator.rank} on {communicator.host}: {type(error).__name__}: {error}"
            reasons = communicator.all_gather_object(own if error is not None else "")
            raise CommunicatorError(
                f"no next batch can be had: {'; '.join(filter(None, reasons))}"
            ) from error
        if not counts[0]:
            return
        yield None if batch is _END else batch  # type: ignore[misc]


def _next(iterator: Iterator[Batch]) -> tuple[Batch | object, Exception | None]:
    """Return the next batch or `_END`, and what was raised instead, which the other ranks must hear of."""
    try:
        return next(iterator, _END), None
    except Exception as error:
        return _END, error
