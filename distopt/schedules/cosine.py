"""Schedules along cosine waves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import SupportsFloat

from distopt import counter_random
from distopt.schedules.schedule import LearningRateSchedule, check_positive, check_rate
from distopt.schedules.serialization import serializable

__all__ = [
    "CosineDecay",
    "CosineDecayRestarts",
    "LinearCosineDecay",
    "NoisyLinearCosineDecay",
]

_NOISE = counter_random.stream("distopt.noisy_linear_cosine_decay")


@serializable
@dataclass(frozen=True)
class CosineDecay(LearningRateSchedule):
    """Fall along half a cosine wave in `decay_steps` steps, after a linear warm-up where asked for.

    `peak * ((1 - alpha) * (1 + cos(pi * t)) / 2 + alpha)` with `t` going from 0 to 1 and staying
    there. Without `warmup_target` the peak is `initial_learning_rate`, at step 0. With it the
    rate goes linearly from `initial_learning_rate` to `warmup_target` in `warmup_steps` steps,
    and the cosine starts there: the whole takes `warmup_steps + decay_steps` steps.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: length of the cosine.
        alpha: the last rate as a fraction of the peak.
        name: for the configuration only.
        warmup_target: the rate after the warm-up; None for no warm-up.
        warmup_steps: length of the warm-up; as in Keras it counts only with a `warmup_target`.

    Raises:
        ValueError: a rate or `warmup_steps` is negative, or `decay_steps` is not positive.

    Source: Loshchilov and Hutter, "SGDR", 2016, https://arxiv.org/abs/1608.03983.
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = None
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        check_rate("initial_learning_rate", self.initial_learning_rate)
        check_positive("decay_steps", self.decay_steps)
        check_rate("alpha", self.alpha)
        if self.warmup_target is not None:
            check_rate("warmup_target", self.warmup_target)
        check_rate("warmup_steps", self.warmup_steps)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        now, peak = float(step), self.initial_learning_rate
        if self.warmup_target is not None:
            if now < self.warmup_steps:
                return peak + (self.warmup_target - peak) * now / self.warmup_steps
            now, peak = now - self.warmup_steps, self.warmup_target
        return peak * _cosine(min(now / self.decay_steps, 1.0), self.alpha)


@serializable
@dataclass(frozen=True)
class CosineDecayRestarts(LearningRateSchedule):
    """Fall along half a cosine wave again and again, with longer periods and lower peaks.

    Period `i` is `first_decay_steps * t_mul ** i` steps long and starts at
    `initial_learning_rate * m_mul ** i`.

    TensorFlow finds the period with a float32 logarithm, which may be one step off at a restart;
    here the restart is exact.

    Args:
        initial_learning_rate: the rate at step 0.
        first_decay_steps: length of the first period.
        t_mul: how many times longer each period is than the one before, at least 1.
        m_mul: how many times higher each peak is than the one before.
        alpha: the lowest rate as a fraction of `initial_learning_rate`.
        name: for the configuration only.

    Raises:
        ValueError: a rate or `m_mul` is negative, `first_decay_steps` is not positive, or `t_mul`
            is below 1 (the periods would end at a finite step; TensorFlow returns NaN beyond it).

    Source: Loshchilov and Hutter, "SGDR", 2016, https://arxiv.org/abs/1608.03983.
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        check_rate("initial_learning_rate", self.initial_learning_rate)
        check_positive("first_decay_steps", self.first_decay_steps)
        check_rate("m_mul", self.m_mul)
        check_rate("alpha", self.alpha)
        if not 1.0 <= self.t_mul < math.inf:
            raise ValueError(
                f"t_mul must be at least 1, got {self.t_mul}. Periods that shrink end at a finite step."
            )

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        periods = float(step) / self.first_decay_steps
        if self.t_mul == 1.0:
            index = math.floor(periods)
        else:
            index = math.floor(math.log1p(periods * (self.t_mul - 1.0)) / math.log(self.t_mul))
            # The logarithm may be off by one where a period starts; the sums are not.
            while self._start(index + 1) <= periods:
                index += 1
            while self._start(index) > periods:
                index -= 1
        fraction = (periods - self._start(index)) / self.t_mul**index
        return self.initial_learning_rate * _cosine(fraction, self.alpha, self.m_mul**index)

    def _start(self, index: int) -> float:
        """Where a period starts, in units of the first period."""
        if self.t_mul == 1.0:
            return float(index)
        return (self.t_mul**index - 1.0) / (self.t_mul - 1.0)


@serializable
@dataclass(frozen=True)
class LinearCosineDecay(LearningRateSchedule):
    """Fall along a straight line times a cosine wave, in `decay_steps` steps.

    `initial_learning_rate * ((alpha + 1 - t) * (1 + cos(2 pi * num_periods * t)) / 2 + beta)` with
    `t` going from 0 to 1 and staying there. At step 0 this is `1 + alpha + beta` times the initial
    rate, more than the rate itself; with the defaults it ends at `beta` times it.

    Args:
        initial_learning_rate: the unit of the rates.
        decay_steps: length of the decay.
        num_periods: how many cosine waves; 0.5 is one fall.
        alpha: added to the straight line.
        beta: added to the product.
        name: for the configuration only.

    Raises:
        ValueError: an argument is negative, or `decay_steps` is not positive.

    Source: Bello et al., "Neural Optimizer Search with Reinforcement Learning", 2017,
    https://arxiv.org/abs/1709.07417.
    """

    initial_learning_rate: float
    decay_steps: float
    num_periods: float = 0.5
    alpha: float = 0.0
    beta: float = 0.001
    name: str | None = None

    def __post_init__(self) -> None:
        check_rate("initial_learning_rate", self.initial_learning_rate)
        check_positive("decay_steps", self.decay_steps)
        check_rate("num_periods", self.num_periods)
        check_rate("alpha", self.alpha)
        check_rate("beta", self.beta)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        done = min(float(step), self.decay_steps) / self.decay_steps
        wave = _wave(self.num_periods * done)
        return self.initial_learning_rate * ((self.alpha + 1.0 - done) * wave + self.beta)


@serializable
@dataclass(frozen=True)
class NoisyLinearCosineDecay(LearningRateSchedule):
    """`LinearCosineDecay` with normal noise of variance `initial_variance / (1 + step) ** variance_decay`.

    The noise is added to the straight line, before the cosine multiplies it. It can make the rate
    negative, in TensorFlow too; the optimizers refuse such a rate, so choose a variance that is
    small against the line.

    The noise of a step is a function of (seed, step) and nothing else, see `counter_random`: every
    rank gets the same rate, and so does a run that was resumed. (Between processors of different
    make the last digit of the float64 may differ, as of any logarithm.) TensorFlow draws it anew at
    each evaluation.

    Args:
        initial_learning_rate: the unit of the rates.
        decay_steps: length of the decay.
        initial_variance: variance of the noise at step 0.
        variance_decay: how fast the variance falls.
        num_periods: how many cosine waves; 0.5 is one fall.
        alpha: added to the straight line.
        beta: added to the product.
        name: for the configuration only.
        seed: any integer in [0, 2**64).

    Raises:
        ValueError: an argument is negative, `decay_steps` is not positive, or `seed` is out of range.

    Source: Bello et al., "Neural Optimizer Search with Reinforcement Learning", 2017,
    https://arxiv.org/abs/1709.07417.
    """

    initial_learning_rate: float
    decay_steps: float
    initial_variance: float = 1.0
    variance_decay: float = 0.55
    num_periods: float = 0.5
    alpha: float = 0.0
    beta: float = 0.001
    name: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_rate("initial_learning_rate", self.initial_learning_rate)
        check_positive("decay_steps", self.decay_steps)
        check_rate("initial_variance", self.initial_variance)
        check_rate("variance_decay", self.variance_decay)
        check_rate("num_periods", self.num_periods)
        check_rate("alpha", self.alpha)
        check_rate("beta", self.beta)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}.")

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        now = min(float(step), self.decay_steps)
        done = now / self.decay_steps
        deviation = math.sqrt(self.initial_variance / (1.0 + now) ** self.variance_decay)
        line = self.alpha + 1.0 - done + deviation * self._noise(int(float(step)))
        return self.initial_learning_rate * (line * _wave(self.num_periods * done) + self.beta)

    def _noise(self, step: int) -> float:
        """Return the standard normal number of a step."""
        high, low = divmod(step, 1 << 32)
        return float(counter_random.normal(self.seed, _NOISE, high, low, 1)[0])


def _wave(periods: float) -> float:
    """From 1 down to 0 and back in one period."""
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * periods))


def _cosine(fraction: float, alpha: float, peak: float = 1.0) -> float:
    return (1.0 - alpha) * 0.5 * peak * (1.0 + math.cos(math.pi * fraction)) + alpha
