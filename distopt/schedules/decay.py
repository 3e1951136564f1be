"""Schedules that fall along a power, a root or a staircase."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsFloat

from distopt.schedules.schedule import LearningRateSchedule, check_positive, check_rate
from distopt.schedules.serialization import serializable

__all__ = [
    "ExponentialDecay",
    "InverseTimeDecay",
    "NaturalExpDecay",
    "PiecewiseConstantDecay",
    "PolynomialDecay",
]


@dataclass(frozen=True)
class _RateDecay(LearningRateSchedule):
    """What decays by a rate per `decay_steps` steps have in common: arguments, their checks, the progress."""

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        check_rate("initial_learning_rate", self.initial_learning_rate)
        check_positive("decay_steps", self.decay_steps)
        check_rate("decay_rate", self.decay_rate)

    def _progress(self, step: SupportsFloat) -> float:
        progress = float(step) / self.decay_steps
        if not self.staircase:
            return progress
        # `decay_steps` is often a rounded fraction (see the function of that name); without the margin, a
        # boundary that falls on a whole step would come one step late for some batch sizes.
        return math.floor(progress * (1.0 + 2.0**-50))


@serializable
@dataclass(frozen=True)
class ExponentialDecay(_RateDecay):
    """Decay exponentially: `initial_learning_rate * decay_rate ** (step / decay_steps)`.

    With `staircase`, `step / decay_steps` is rounded down: the rate falls at once, every
    `decay_steps` steps. A boundary that falls on a whole step takes effect at that step.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: steps in which the rate falls by the factor `decay_rate`; may be fractional.
        decay_rate: the factor.
        staircase: fall in steps instead of smoothly.
        name: for the configuration only.

    Raises:
        ValueError: a rate is negative, or `decay_steps` is not positive.
    """

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        progress = self._progress(step)
        return self.initial_learning_rate * _power(self.decay_rate, progress)


@serializable
@dataclass(frozen=True)
class NaturalExpDecay(_RateDecay):
    """Decay exponentially with base e: `initial_learning_rate * exp(-decay_rate * step / decay_steps)`.

    Keras has no such class; it is the schedule of TensorFlow 1's `natural_exp_decay`.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: the unit in which steps are counted; may be fractional.
        decay_rate: how fast the rate falls: 1 divides it by e in `decay_steps` steps.
        staircase: round `step / decay_steps` down, so that the rate falls in steps.
        name: for the configuration only.

    Raises:
        ValueError: a rate is negative, or `decay_steps` is not positive.
    """

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        progress = self._progress(step)
        return self.initial_learning_rate * math.exp(-self.decay_rate * progress)


@serializable
@dataclass(frozen=True)
class InverseTimeDecay(_RateDecay):
    """Decay as `initial_learning_rate / (1 + decay_rate * step / decay_steps)`.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: the unit in which steps are counted; may be fractional.
        decay_rate: how fast the rate falls: 1 halves it in `decay_steps` steps.
        staircase: round `step / decay_steps` down, so that the rate falls in steps.
        name: for the configuration only.

    Raises:
        ValueError: a rate is negative, or `decay_steps` is not positive.
    """

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        progress = self._progress(step)
        return self.initial_learning_rate / (1.0 + self.decay_rate * progress)


@serializable
@dataclass(frozen=True)
class PolynomialDecay(LearningRateSchedule):
    """Go from the initial to the end rate in `decay_steps` steps, along a power of the time left.

    `(initial - end) * (1 - min(step, decay_steps) / decay_steps) ** power + end`

    With `cycle` it does not stay at the end rate: the period is stretched to the next multiple of
    `decay_steps`, so the rate at step `k * decay_steps` is the end rate and it jumps up after it.

    Args:
        initial_learning_rate: the rate at step 0.
        decay_steps: steps until the end rate is reached.
        end_learning_rate: the last rate; it may be higher than the initial one.
        power: 1 is a straight line.
        cycle: start again beyond `decay_steps`.
        name: for the configuration only.

    Raises:
        ValueError: a rate is negative, or `decay_steps` or `power` is not positive.
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        check_rate("initial_learning_rate", self.initial_learning_rate)
        check_positive("decay_steps", self.decay_steps)
        check_rate("end_learning_rate", self.end_learning_rate)
        check_positive("power", self.power)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        now, period = float(step), float(self.decay_steps)
        if self.cycle:
            period *= max(1, math.ceil(now / period))
        left = 1.0 - min(now, period) / period
        span = self.initial_learning_rate - self.end_learning_rate
        return span * left**self.power + self.end_learning_rate


@serializable
@dataclass(frozen=True)
class PiecewiseConstantDecay(LearningRateSchedule):
    """Use a constant rate between boundaries.

    `values[0]` up to and including step `boundaries[0]`, then `values[1]` up to and including
    `boundaries[1]`, and so on: as in TensorFlow, the boundary step itself still has the old value.

    Args:
        boundaries: steps, strictly increasing.
        values: rates, one more than there are boundaries.
        name: for the configuration only.

    Raises:
        ValueError: the numbers of boundaries and values don't fit, a rate is negative, or the
            boundaries don't increase.
        IndexError: there are no boundaries, as in TensorFlow: that would be a constant rate.
    """

    boundaries: Sequence[float]
    values: Sequence[float]
    name: str | None = None

    def __post_init__(self) -> None:
        # Lists, so that a configuration which went through JSON compares equal.
        object.__setattr__(self, "boundaries", list(self.boundaries))
        object.__setattr__(self, "values", list(self.values))
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                "The length of boundaries should be 1 less than the length of values, got "
                f"{len(self.values)} values and {len(self.boundaries)} boundaries."
            )
        if not self.boundaries:
            raise IndexError(
                f"boundaries must not be empty, got values={self.values}. "
                "For a constant learning rate give the number itself."
            )
        for value in self.values:
            check_rate("each of values", value)
        for before, after in zip(self.boundaries, self.boundaries[1:], strict=False):
            if not before < after:
                raise ValueError(f"boundaries must increase, got {before} before {after}.")

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        return self.values[bisect_left(self.boundaries, float(step))]


def _power(base: float, exponent: float) -> float:
    """Return the power, infinity where Python's raises OverflowError: a rate that grows without end."""
    try:
        return float(base) ** float(exponent)
    except OverflowError:
        return math.inf
