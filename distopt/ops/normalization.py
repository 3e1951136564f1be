"""Batch normalization: each channel brought to mean 0 and variance 1 over the examples of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, namespace
from distopt.communicators.communicator import Communicator
from distopt.ops.arithmetic import sqrt, square
from distopt.ops.reductions import reduce_sum
from distopt.tape import Context, Tensor, primitive
from distopt.variables import Operand, value_of

__all__ = ["Moments", "batch_moments", "batch_normalization", "normalize"]

Count: TypeAlias = "int | Array"


@dataclass(frozen=True, eq=False)
class Moments:
    """What a batch says of each channel.

    Attributes:
        mean: [C], in float32 where the batch is of 16 bits.
        variance: [C], the mean of the squared differences from the mean (not divided by count - 1).
        count: values per channel, examples times rows times columns; an array of one number on the
            batch's device where it was summed over ranks.
    """

    mean: Array
    variance: Array
    count: Count


def batch_moments(x: Any, communicator: Communicator | None = None) -> Moments:
    """Return the mean and variance of each channel; zeros where there are no values at all.

    Args:
        x: [..., C], array, Variable or Tensor; nothing is recorded.
        communicator: whose ranks' batches are taken as one. Collective: two all_reduces of C numbers,
            and every rank joins, those without examples too. None: this replica's batch alone.
    """
    value = x.value if isinstance(x, Operand) else x
    xp = namespace(value)
    flat = value.reshape(-1, value.shape[-1])
    wide = np.promote_types(value.dtype, np.float32)
    # In float64: a sum along the first axis of a matrix adds row by row, and errors would grow with rows.
    sums: Array = xp.empty(value.shape[-1] + 1, np.float64)
    sums[:-1] = flat.sum(axis=0, dtype=np.float64)
    sums[-1] = len(flat)
    count: Count = len(flat)
    if communicator is not None:
        communicator.all_reduce(sums).wait()
        count = sums[-1:]
    divisor: Any = max(count, 1) if isinstance(count, int) else xp.maximum(count, 1.0)
    mean = (sums[:-1] / divisor).astype(wide)
    squares: Array = xp.square(flat - mean).sum(axis=0, dtype=np.float64)
    if communicator is not None:
        communicator.all_reduce(squares).wait()
    return Moments(mean, (squares / divisor).astype(wide), count)


@primitive
def batch_normalization(
    context: Context,
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float = 1e-3,
    moments: Moments | None = None,
    communicator: Communicator | None = None,
) -> Any:
    """Return `(x - mean) / sqrt(variance + epsilon) * gamma + beta`, mean and variance those of the batch.

    The gradient flows through mean and variance as well. S. Ioffe and C. Szegedy, "Batch normalization:
    accelerating deep network training by reducing internal covariate shift", 2015,
    https://arxiv.org/abs/1502.03167.

    Args:
        context: of the tape.
        x: [..., C]; the last axis is the channels, statistics are over all others. It may be empty.
        gamma: [C], the factor; None for 1.
        beta: [C], the offset; None for 0.
        epsilon: added to the variance.
        moments: what `batch_moments` gives for x and the communicator, where it is there already.
        communicator: whose ranks' batches are normalized as one, forward and backward. Collective, in
            both directions: an all_reduce of 2 C numbers backward. None: each replica by its own batch.

    Raises:
        ValueError: gamma or beta is no vector of C numbers.
    """
    for name, parameter in (("gamma", gamma), ("beta", beta)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {x.shape[-1:]}, one number per channel of x {x.shape}; "
                f"got {parameter.shape}"
            )
    if moments is None:
        moments = batch_moments(x, communicator)
    xp = namespace(x)
    factor = 1 / xp.sqrt(moments.variance + moments.variance.dtype.type(epsilon))
    normalized = x - moments.mean
    normalized *= factor
    if context.recording:
        context.saved = normalized, factor, moments.count
    output = normalized.copy() if gamma is None else normalized * gamma
    if beta is not None:
        output += beta
    return output.astype(x.dtype, copy=False)


@batch_normalization.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any, Any]:
    normalized, factor, count = context.saved
    x, gamma, beta = context.inputs
    xp = namespace(upstream)
    channels = x.shape[-1]
    flat, rows = upstream.reshape(-1, channels), normalized.reshape(-1, channels)
    own: Array = xp.empty((2, channels), np.float64)
    own[0] = flat.sum(axis=0, dtype=np.float64)
    own[1] = (flat * rows).sum(axis=0, dtype=np.float64)
    # The gradients of gamma and beta are this replica's share, like those of all variables.
    by_gamma = own[1].astype(gamma.dtype) if gamma is not None and context.needs[1] else None
    by_beta = own[0].astype(beta.dtype) if beta is not None and context.needs[2] else None
    communicator = context.options.get("communicator")
    if communicator is not None:
        # Collective, so on every rank whether or not it has examples or needs the gradient.
        communicator.all_reduce(own).wait()
    by_x = None
    if context.needs[0]:
        divisor: Any = max(count, 1) if isinstance(count, int) else xp.maximum(count, 1.0)
        mean, slope = (own / divisor).astype(factor.dtype)
        by_x = upstream - mean - normalized * slope
        by_x *= factor if gamma is None else factor * gamma
        by_x = by_x.astype(x.dtype, copy=False)
    return by_x, by_gamma, by_beta


@batch_normalization.composed
def _(
    x: Any,
    gamma: Any,
    beta: Any,
    *,
    epsilon: float = 1e-3,
    moments: Moments | None = None,
    communicator: Communicator | None = None,
) -> Tensor:
    del moments  # they are constants; here they have to depend on x
    if communicator is not None and communicator.size > 1:
        raise RuntimeError(
            "second derivatives of a batch normalization over several ranks' batches aren't available; "
            "normalize each replica's batch by itself (communicator=None)"
        )
    shape = value_of(x).shape
    axes, count = tuple(range(len(shape) - 1)), max(1, math.prod(shape[:-1]))
    centred = x - reduce_sum(x, axis=axes) / count
    return normalize(centred, 0.0, reduce_sum(square(centred), axis=axes) / count, beta, gamma, epsilon)


def normalize(
    x: Any, mean: Any, variance: Any, beta: Any = None, gamma: Any = None, epsilon: float = 1e-3
) -> Tensor:
    """Return `(x - mean) / sqrt(variance + epsilon) * gamma + beta` for given mean and variance.

    Args:
        x: [..., C].
        mean: [C].
        variance: [C].
        beta: [C], the offset; None for 0.
        gamma: [C], the factor; None for 1.
        epsilon: added to the variance.
    """
    factor = 1.0 / sqrt(variance + epsilon)
    if gamma is not None:
        factor = factor * gamma
    shift = -mean * factor if beta is None else beta - mean * factor
    return x * factor + shift
