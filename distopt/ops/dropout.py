"""Dropout: some values become zero, chosen by random numbers that don't depend on the rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt import counter_random
from distopt.backend import device_of
from distopt.ops.arithmetic import multiply
from distopt.ops.shaping import identity
from distopt.tape import Tensor
from distopt.variables import Operand

__all__ = ["dropout"]


def dropout(
    x: Any,
    rate: float,
    *,
    seed: int = 0,
    stream: str = "dropout",
    step: int = 0,
    first_example: int = 0,
    noise_shape: Sequence[int | None] | None = None,
    name: str | None = None,
) -> Tensor:
    """Return `x` with a share of its values set to zero, and the others divided by 1 - rate.

    Which values are kept is a function of `seed`, `stream`, `step`, the example's index in the global
    batch and the value's place in the example, and of nothing else: it is the same however the batch is
    cut over ranks. (Philox4x32-10, see `distopt.counter_random`.)

    Args:
        x: [examples, ...].
        rate: probability that a value becomes zero.
        seed: in [0, 2**64).
        stream: tells layers apart that share a seed.
        step: tells steps apart; in [0, 2**32).
        first_example: index of the first example in the global batch.
        noise_shape: shape of the random choice, which is broadcast to that of `x`: with (None, 1, 1, None)
            whole channels of images are dropped. None stands for the length of `x`. When the first is
            1, all examples share a choice, that of example 0 of the batch.
        name: of the result.

    Raises:
        ValueError: `rate` is outside of [0, 1), or `noise_shape` can't be broadcast to that of `x`.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be a number in the range [0, 1), got {rate}.")
    value = x.value if isinstance(x, Operand) else x
    shape = _noise_shape(value.shape, noise_shape)
    if rate == 0:
        return identity(x, name=name)
    xp = device_of(value).xp
    shared = shape[0] == 1 and value.shape[0] != 1
    examples = xp.arange(shape[0], dtype=np.int64)
    if not shared:
        examples += first_example
    per_example = int(np.prod(shape[1:], dtype=np.int64))
    drawn = counter_random.uniform(seed, counter_random.stream(stream), step, examples, per_example)
    kept = (drawn >= rate).reshape(shape).astype(value.dtype)
    kept *= value.dtype.type(1 / (1 - rate))
    return multiply(x, kept, name=name)


def _noise_shape(shape: tuple[int, ...], given: Sequence[int | None] | None) -> tuple[int, ...]:
    if not shape:
        raise ValueError("dropout needs examples along a first axis, got a scalar")
    if given is None:
        return shape
    found = tuple(own if length is None else length for own, length in zip(shape, given, strict=False))
    if len(given) != len(shape) or any(n not in (1, own) for n, own in zip(found, shape, strict=True)):
        raise ValueError(
            f"noise_shape {tuple(given)} can't be broadcast to the shape {shape} of x; each length must be "
            "1, None or that of x."
        )
    return found
