"""Norms of gradients.

Norms are square roots of sums in float64, of squares in float32 where these neither overflow nor
underflow: right to 2e-7, where TensorFlow sums in float32 and has infinite norms from gradients of
2e19 on. The order of summation is fixed and no BLAS is used, so ranks on different processors get
the same bits. On a GPU nothing here makes the host wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from distopt.backend import Array, namespace
from distopt.transforms.pairs import Gradient, Pair, values_of

__all__ = ["global_norm", "norm_of"]

_BLOCK = 32 * 1024  # elements; squares of this many float32 stay in the cache
# Below, float32 squares may have lost digits; above, they have overflowed.
_SMALLEST_SUM = 1e-30


def global_norm(pairs: Iterable[Pair]) -> Any:
    """Return the Euclidean norm of all gradients together, 0 when all are None.

    Returns:
        A float64 scalar; on a GPU an array of rank 0, for which the host doesn't wait.
    """
    return norm_of([gradient for gradient, _ in pairs])


def norm_of(gradients: Iterable[Gradient]) -> Any:
    """Return the Euclidean norm of some gradients together; those that are None count as zero."""
    parts = [_sum_of_squares(values_of(given)) for given in gradients if given is not None]
    total = sum(parts[1:], parts[0]) if parts else np.float64(0.0)
    return namespace(total).sqrt(total)


def _sum_of_squares(values: Array) -> Any:
    xp = namespace(values)
    if xp is not np:
        return xp.square(values.astype(np.float64)).sum()
    flat = values.reshape(-1)
    squares = np.empty(min(_BLOCK, flat.size), np.float32)
    total = 0.0
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        part = 0.0
        if block.dtype == np.float32:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                part = float(np.add.reduce(np.square(block, out=squares[: block.size])))
        if not _SMALLEST_SUM < part < math.inf:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                part = float(np.square(block.astype(np.float64)).sum())
        total += part
    return np.float64(total)
