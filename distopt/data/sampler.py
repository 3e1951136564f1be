"""Which example comes when: the order of training, shards of a batch, batches of an evaluation.

The data position is the number of examples consumed so far, counted over all epochs and all ranks.
It is all that a checkpoint has to hold, and it means the same on any number of ranks and for any
batch size.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

from distopt.backend import Array
from distopt.counter_random import permutation

__all__ = ["Sampler", "evaluation_batches", "shard"]


class Sampler:
    """The order of the training examples: each once per epoch, shuffled anew every time.

    Position p is in epoch p // N and holds example `permutation(seed, epoch, N)[p % N]`. Batches
    run across the end of an epoch, so all of them are full; nothing is dropped or seen twice. A
    batch may be larger than the data set. Safe to use from several threads.

    Args:
        num_examples: N, the size of the data set.
        global_batch: examples in a step, over all replicas.
        seed: any integer in [0, 2**64); the same on every rank.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, num_examples: int, global_batch: int, seed: int) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        if global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, got {global_batch}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        self.num_examples = num_examples
        self.global_batch = global_batch
        self.seed = seed
        # Two: the batch that runs across the end of an epoch needs both.
        self._permutation = lru_cache(maxsize=2)(partial(permutation, seed, n=num_examples))

    def batch(self, step: int) -> tuple[Array, Array]:
        """Return the global batch of a step, counted from 0: `examples(step * B, B)`."""
        return self.examples(step * self.global_batch, self.global_batch)

    def examples(self, position: int, count: int) -> tuple[Array, Array]:
        """Return the epochs and indices of the `count` examples from a data position on.

        Returns:
            Two int64 arrays of shape [count]: each example's epoch and its index in the data set.

        Raises:
            ValueError: `position` or `count` is negative.
        """
        if position < 0 or count < 0:
            raise ValueError(f"position and count must not be negative, got {position} and {count}")
        epochs = np.empty(count, np.int64)
        indices = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(position + done, self.num_examples)
            taken = min(self.num_examples - offset, count - done)
            epochs[done : done + taken] = epoch
            indices[done : done + taken] = self._permutation(epoch)[offset : offset + taken]
            done += taken
        return epochs, indices


def shard(length: int, part: int, parts: int) -> slice:
    """Return the slice of `range(length)` that belongs to one of `parts` owners.

    Slices are contiguous, in order, and differ in size by one at most; the first ones are the
    larger. Where there are more owners than examples, the last slices are empty.

    >>> [shard(7, part, 3) for part in range(3)]
    [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]

    Raises:
        ValueError: `length` is negative, or `part` is not one of `parts`.
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if parts < 1 or not 0 <= part < parts:
        raise ValueError(f"part must be in [0, parts) with parts at least 1, got {part} of {parts}")
    size, larger = divmod(length, parts)
    begin = part * size + min(part, larger)
    return slice(begin, begin + size + (part < larger))


def evaluation_batches(length: int, part: int, parts: int, batch: int) -> list[slice]:
    """Return the batches in which one of `parts` owners evaluates its share of `length` examples.

    Over all parts every example is in exactly one batch. The last batch of a part may be shorter,
    and a part without examples has no batch: sums and counts must be reduced after the loop, not in
    it.

    Raises:
        ValueError: `length` or `batch` is below 1, or `part` is not one of `parts`.
    """
    if length < 1:
        raise ValueError(f"an evaluation needs at least 1 example, got {length}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    own = shard(length, part, parts)
    return [slice(begin, min(begin + batch, own.stop)) for begin in range(own.start, own.stop, batch)]
