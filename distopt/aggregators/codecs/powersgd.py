"""PowerSGD: gradients of matrices as products of two thin ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from distopt import counter_random
from distopt.backend import Array, namespace

__all__ = ["PowerSGD"]

_STREAM = counter_random.stream("distopt.codecs.powersgd")
_NOTHING_LEFT = 1e-6
"""A column of which so little is left after the others were taken out is noise of float32."""


class PowerSGD:
    """One step of power iteration per training step, towards the best approximation of a given rank.

    Vogels, Karimireddy and Jaggi, "PowerSGD", 2019. The gradient M [m, k] of a variable [..., k] is sent as
    P = M Q [m, rank] and, with P's columns made orthonormal, Q = transpose(M) P [k, rank], both summed over
    ranks in float32; the result is P transpose(Q). Q is where the next step starts, which is why this
    codec keeps something between steps even without `ErrorFeedback`. Vectors, and matrices so small that
    nothing would be saved, are sent as they are.

    What it leaves out never has more squares than what it was given, but it can be as much: use it with
    `ErrorFeedback`. A number that is not finite makes NaN of its variable.

    Args:
        rank: of the approximation; 1 to 4 are usual.
        seed: of the first Q.

    Raises:
        ValueError: a rank below 1.
    """

    random = False

    def __init__(self, rank: int = 2, seed: int = 0) -> None:
        if rank < 1:
            raise ValueError(f"PowerSGD approximates by a rank of at least 1, got {rank}")
        self.rank, self.seed = rank, seed

    @property
    def name(self) -> str:
        """Short name with its arguments, as on the command line."""
        return f"powersgd:{self.rank}"

    def __repr__(self) -> str:
        return f"<codec {self.name}>"

    def saves(self, shape: Sequence[int]) -> bool:
        """Say whether a variable of this shape is approximated; else it is sent as it is."""
        return len(shape) >= 2 and 4 * math.prod(shape) > self.wire_bytes(shape)

    def wire_bytes(self, shape: Sequence[int]) -> int:
        """Return how many bytes P and Q have, for a variable that is approximated."""
        return 4 * self.rank * sum(matrix_shape(shape))

    def first_q(self, name: str, shape: Sequence[int]) -> Array:
        """Return where a variable starts: normal numbers by its name, float32 [rank, k], NumPy."""
        columns = matrix_shape(shape)[1]
        drawn = counter_random.normal(
            self.seed, _STREAM, zlib.crc32(name.encode()), np.arange(self.rank), columns
        )
        return drawn.astype(np.float32)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (m, k) of a variable that is taken as a matrix: its last axis is k, all others m."""
    return math.prod(shape[:-1]), shape[-1]


def orthonormal(rows: Array) -> Array:
    """Make rows orthonormal, in order; those that depend on others become zero.

    Gram-Schmidt, twice over, in float64 and elementwise: ranks with other processors must find the same
    bits, which a library's matrix product does not promise.

    Args:
        rows: float32 [rank, m].

    Returns:
        float32 [rank, m].
    """
    xp = namespace(rows)
    result = rows.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for number, row in enumerate(result):
            before = xp.sqrt((row * row).sum())
            for other in (*result[:number], *result[:number]):
                row -= (row * other).sum() * other
            length = xp.sqrt((row * row).sum())
            row[...] = xp.where(length <= _NOTHING_LEFT * before, 0.0, row / length)
        return result.astype(np.float32)  # type: ignore[no-any-return]


def product(p: Array, q: Array) -> Array:
    """Return the matrix [m, k] of p [rank, m] and q [rank, k]; the same bits on every processor."""
    total = p[0][:, None] * q[0]
    for left, right in zip(p[1:], q[1:], strict=True):
        total += left[:, None] * right
    return total


def next_start(q: Array, fresh: Array) -> Array:
    """Return q's rows with length 1, and `fresh` ones for those of zeros, which would stay zeros."""
    xp = namespace(q)
    long = q.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        lengths = xp.sqrt((long * long).sum(axis=1, keepdims=True))
        return xp.where(lengths > 0, long / lengths, fresh).astype(np.float32)  # type: ignore[no-any-return]
