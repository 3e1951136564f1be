"""Noise on gradients, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from distopt import counter_random
from distopt.backend import Array, Device, device_of, namespace
from distopt.schedules import LearningRateSchedule
from distopt.transforms.pairs import Gradient, Pair, changed, stored
from distopt.variables import IndexedSlices, Operand, Variable, number_now

__all__ = ["GradientNoise", "truncated_normal"]

_STREAM = counter_random.stream("distopt.gradient_noise")
_PIECE = 1 << 16  # elements that share an address of the random numbers; they fit a core's L2 cache
_PIECES = 1 << 16  # pieces of one variable

# The quantile of the normal distribution between -2 and 2 standard deviations: v * P(v * v) / Q(v * v)
# for v in (-1, 1). Coefficients fitted by least squares to Python's statistics.NormalDist; the largest
# error is 2e-9.
_WIDTH = 0.4772498680518208  # the probability of [0, 2]
_P = (
    2.5066283083553014,
    -7.087158871833704,
    7.413064351408915,
    -3.4435373638515614,
    0.6477945174873575,
    -0.0280484371778802,
)
_Q = (
    1.0,
    -3.0658843355720644,
    3.569176109686922,
    -1.932629191380711,
    0.46884141610570446,
    -0.03741781930494663,
)


class GradientNoise:
    """Add truncated normal noise to every gradient, as `optimize_loss(gradient_noise_scale=...)` does.

    The noise is standard normal, cut at two standard deviations, times `scale`: its standard deviation
    is 0.88 `scale` and it is never above 2 `scale`. A gradient that is None stays None; IndexedSlices
    become dense.

    Every rank adds the same noise to the global gradient: a number depends on the seed, the step, the
    place of the variable among the pairs and the place of the element, and on nothing else. It is made by
    integer arithmetic, products, sums and one division, each correctly rounded: the same bits on every
    processor and on a GPU. (A normal by logarithm and cosine would let ranks on different processors
    drift apart.) TensorFlow draws from a generator, so its numbers are others.

    Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015,
    https://arxiv.org/abs/1511.06807; they let the scale fall, which a schedule does.

    Args:
        scale: number, Variable, callable without arguments, or a schedule, which gets the step; 0 or more.
        seed: any integer in [0, 2**64).
        step: number, Variable or callable without arguments: at which step this call is. None: the calls
            are counted here, in a Variable that `variables()` returns, so that it can be saved.

    Raises:
        ValueError: `scale` is negative or NaN, or `seed` out of range.
    """

    def __init__(self, scale: Any, seed: int = 0, step: Any = None) -> None:
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}.")
        if not callable(scale) and not isinstance(scale, Operand):
            _check_scale(float(scale))
        self.scale = scale
        self.seed = seed
        self.step = step
        self._calls: Variable | None = None
        if step is None:
            # On the host, whatever the current device: it is read there at every call.
            self._calls = Variable(np.int64(0), trainable=False, name="GradientNoise/step", device=Device())

    def variables(self) -> list[Variable]:
        """Return what a checkpoint needs: the count of calls, where no `step` was given."""
        return [] if self._calls is None else [self._calls]

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the pairs with noise.

        Raises:
            ValueError: the scale of this step is negative or NaN, or a gradient's shape is not known.
        """
        step = int(number_now(self.step if self._calls is None else self._calls))
        scale = self._scale_at(step)
        pairs = list(pairs)
        # By the order in which variables were made, which is the same on ranks that got them in another.
        order = sorted(range(len(pairs)), key=lambda i: getattr(pairs[i][1], "number", i))
        position = {place: number for number, place in enumerate(order)}
        noisy = [
            (self._noisy(gradient, variable, scale, step, position[place]), variable)
            for place, (gradient, variable) in enumerate(pairs)
        ]
        if self._calls is not None:
            self._calls.assign_add(1)
        return noisy

    def _scale_at(self, step: int) -> float:
        if isinstance(self.scale, LearningRateSchedule):
            return _check_scale(self.scale(step))
        return _check_scale(number_now(self.scale))

    def _noisy(self, gradient: Gradient, variable: Any, scale: float, step: int, position: int) -> Gradient:
        if isinstance(gradient, IndexedSlices):
            shape = gradient.dense_shape or variable.shape
            gradient = IndexedSlices(gradient.values, gradient.indices, shape).to_dense()

        def added(array: Array, out: Array | None) -> Array:
            # In C order, so that an element's number doesn't depend on how the array lies.
            contiguous = out is not None and out.flags.c_contiguous
            result: Array = array if contiguous else namespace(array).array(array, order="C")
            flat = result.reshape(-1)
            pieces = 1 if namespace(flat) is np else -(-flat.size // _PIECE)  # a GPU takes all at once
            for start in range(0, flat.size, max(1, pieces) * _PIECE):
                part = flat[start : start + pieces * _PIECE]
                noise = truncated_normal(
                    self.seed, step, position * _PIECES + start // _PIECE, part.size, part
                )
                noise *= scale
                noise += part
                part[...] = noise.astype(part.dtype)
            return result if contiguous else stored(result, out)

        return changed(gradient, variable, added)


def truncated_normal(seed: int, step: int, first: int, count: int, like: Array) -> Array:
    """Return `count` standard normal numbers cut at 2, float64, on the device of `like`.

    Args:
        seed: key of the random numbers.
        step: their epoch.
        first: number of the first piece; each piece is an index with 65,536 numbers.
        count: how many.
        like: an array on the device that is to hold them.
    """
    xp = namespace(like)
    with device_of(like).activate():
        indices = xp.arange(first, first + -(-count // _PIECE), dtype=np.int64)
        each = min(count, _PIECE)
        words = counter_random.words(seed, _STREAM, step, indices, each)
        # The middle of 2**32 intervals of (-1, 1), which no rounding touches.
        place = words.reshape(-1)[:count].astype(np.float64)
        place += 0.5 - 2.0**31
        place *= 2.0**-31
        square = place * place
        place *= _WIDTH
        place *= _polynomial(_P, square)
        place /= _polynomial(_Q, square)
        return xp.clip(place, -2.0, 2.0, out=place)  # type: ignore[no-any-return]


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    result = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result += coefficient
        result *= x
    result += coefficients[0]
    return result


def _check_scale(scale: float) -> float:
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"the scale of gradient noise must be a finite number, 0 or more, got {scale}.")
    return scale
