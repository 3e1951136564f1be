"""Learning-rate schedules: pure functions of the step, serialisable.

A schedule is called with the number of updates done so far (0, 1, 2 ...) and returns the learning
rate of the next update, as a Python float. It keeps no state, so a resumed run continues on the
same curve, and every rank gets the same number. Names, arguments and formulas are those of
`tf.keras.optimizers.schedules`; the arithmetic is float64 (TensorFlow's is float32, it agrees to
1e-5).

    >>> rate = ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5, staircase=True)
    >>> [rate(step) for step in (0, 9, 10, 25)]
    [0.1, 0.1, 0.05, 0.025]
    >>> deserialize(serialize(rate)) == rate
    True

A schedule counts steps. To let the rate decay by examples seen, whatever the number of ranks,
compute `decay_steps` from the global batch with the function of that name.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, SupportsFloat

__all__ = [
    "LearningRateSchedule",
    "ExponentialDecay",
    "InverseTimeDecay",
    "PolynomialDecay",
    "PiecewiseConstantDecay",
    "CosineDecay",
    "CosineDecayRestarts",
    "LinearWarmup",
    "decay_steps",
    "scale_learning_rate",
    "serialize",
    "deserialize",
]


class LearningRateSchedule(abc.ABC):
    """Base of the schedules: a pure function from the step to the learning rate.

    To make one of your own, define `__call__`, and make the class a dataclass (or define
    `get_config`) so that it can be saved with the optimizer.
    """

    @abc.abstractmethod
    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate of the update that follows `step` finished updates."""

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values that JSON can hold."""
        if not dataclasses.is_dataclass(self):
            raise TypeError(
                f"{type(self).__name__} can't be saved: it is no dataclass and has no "
                "get_config(). Define get_config() to return the constructor's arguments."
            )
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the schedule that `get_config` described."""
        return cls(**config)


@dataclass(frozen=True)
class ExponentialDecay(LearningRateSchedule):
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

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        _check_rate("initial_learning_rate", self.initial_learning_rate)
        _check_positive("decay_steps", self.decay_steps)
        _check_rate("decay_rate", self.decay_rate)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        progress = _progress(float(step), self.decay_steps, self.staircase)
        return self.initial_learning_rate * self.decay_rate**progress


@dataclass(frozen=True)
class InverseTimeDecay(LearningRateSchedule):
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

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        _check_rate("initial_learning_rate", self.initial_learning_rate)
        _check_positive("decay_steps", self.decay_steps)
        _check_rate("decay_rate", self.decay_rate)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        progress = _progress(float(step), self.decay_steps, self.staircase)
        return self.initial_learning_rate / (1.0 + self.decay_rate * progress)


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
        _check_rate("initial_learning_rate", self.initial_learning_rate)
        _check_positive("decay_steps", self.decay_steps)
        _check_rate("end_learning_rate", self.end_learning_rate)
        _check_positive("power", self.power)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        now, period = float(step), float(self.decay_steps)
        if self.cycle:
            period *= max(1, math.ceil(now / period))
        left = 1.0 - min(now, period) / period
        span = self.initial_learning_rate - self.end_learning_rate
        return span * left**self.power + self.end_learning_rate


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
                "values must be one more than boundaries, got "
                f"{len(self.values)} values and {len(self.boundaries)} boundaries."
            )
        for value in self.values:
            _check_rate("each of values", value)
        for before, after in zip(self.boundaries, self.boundaries[1:], strict=False):
            if not before < after:
                raise ValueError(f"boundaries must increase, got {before} before {after}.")

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        return self.values[bisect_left(self.boundaries, float(step))]


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
        _check_rate("initial_learning_rate", self.initial_learning_rate)
        _check_positive("decay_steps", self.decay_steps)
        _check_rate("alpha", self.alpha)
        if self.warmup_target is not None:
            _check_rate("warmup_target", self.warmup_target)
        _check_rate("warmup_steps", self.warmup_steps)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        now, peak = float(step), self.initial_learning_rate
        if self.warmup_target is not None:
            if now < self.warmup_steps:
                return peak + (self.warmup_target - peak) * now / self.warmup_steps
            now, peak = now - self.warmup_steps, self.warmup_target
        return peak * _cosine(min(now / self.decay_steps, 1.0), self.alpha)


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
        _check_rate("initial_learning_rate", self.initial_learning_rate)
        _check_positive("first_decay_steps", self.first_decay_steps)
        _check_rate("m_mul", self.m_mul)
        _check_rate("alpha", self.alpha)
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


@dataclass(frozen=True)
class LinearWarmup(LearningRateSchedule):
    """Reach another schedule by a straight line over the first `warmup_steps` steps.

    Below `warmup_steps` the rate is the point `step / warmup_steps` of the way from
    `initial_learning_rate` to `schedule(step)`; from there on it is `schedule(step)`. The
    schedule is not moved: the boundaries after the warm-up stay where they are, as in Goyal et
    al., "Accurate, Large Minibatch SGD", 2017, section 2.2, https://arxiv.org/abs/1706.02677.
    (The warm-up that `CosineDecay` has, like Keras', does move the cosine.) Not in TensorFlow.

    Args:
        schedule: what follows, or a number for a constant rate.
        warmup_steps: length of the warm-up; 0 for none.
        initial_learning_rate: the rate at step 0.
        name: for the configuration only.

    Raises:
        ValueError: a rate or `warmup_steps` is negative.
    """

    schedule: LearningRateSchedule | float
    warmup_steps: float
    initial_learning_rate: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, LearningRateSchedule):
            _check_rate("schedule", self.schedule)
        _check_rate("warmup_steps", self.warmup_steps)
        _check_rate("initial_learning_rate", self.initial_learning_rate)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        schedule = self.schedule
        target = schedule(step) if isinstance(schedule, LearningRateSchedule) else float(schedule)
        now = float(step)
        if now >= self.warmup_steps:
            return target
        start = self.initial_learning_rate
        return start + (target - start) * now / self.warmup_steps

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, the inner schedule serialised."""
        config = super().get_config()
        if isinstance(self.schedule, LearningRateSchedule):
            config["schedule"] = serialize(self.schedule)
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the schedule that `get_config` described."""
        arguments: dict[str, Any] = dict(config)
        if isinstance(arguments["schedule"], Mapping):
            arguments["schedule"] = deserialize(arguments["schedule"])
        return cls(**arguments)


def decay_steps(num_examples: int, epochs: float, global_batch: int) -> float:
    """Return the number of steps, with its fraction, that `epochs` passes over the data take.

    The rate then depends on the examples seen and not on the number of ranks: the CIFAR-10
    tutorial's decay by 0.1 every 350 epochs of 50,000 examples is
    `ExponentialDecay(0.1, decay_steps(50_000, 350, global_batch), 0.1, staircase=True)`.

    Args:
        num_examples: examples in one epoch.
        epochs: passes over the data; may be fractional.
        global_batch: examples in one step, those of all ranks together.

    Raises:
        ValueError: an argument is not positive.
    """
    _check_positive("num_examples", num_examples)
    _check_positive("epochs", epochs)
    _check_positive("global_batch", global_batch)
    return num_examples * epochs / global_batch


def scale_learning_rate(learning_rate: float, global_batch: int, reference_batch: int = 256) -> float:
    """Return the rate for another global batch: `learning_rate * global_batch / reference_batch`.

    The linear scaling rule of Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.1;
    use it with a `LinearWarmup`.

    Raises:
        ValueError: the rate is negative, or a batch is not positive.
    """
    _check_rate("learning_rate", learning_rate)
    _check_positive("global_batch", global_batch)
    _check_positive("reference_batch", reference_batch)
    return learning_rate * global_batch / reference_batch


def serialize(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Return `{"class_name": ..., "config": ...}`, plain values that JSON can hold."""
    return {"class_name": type(schedule).__name__, "config": schedule.get_config()}


def deserialize(
    config: Mapping[str, Any],
    custom_objects: Mapping[str, type[LearningRateSchedule]] | None = None,
) -> LearningRateSchedule:
    """Make the schedule that `serialize` described.

    Args:
        config: what `serialize` returned.
        custom_objects: classes of your own by name; they come before those of this module.

    Raises:
        ValueError: `config` has other keys, or the class is not known.
    """
    if set(config) != {"class_name", "config"}:
        raise ValueError(
            f"a serialised schedule has the keys 'class_name' and 'config', got {sorted(config)}."
        )
    known: dict[str, type[LearningRateSchedule]] = {
        cls.__name__: cls
        for cls in (
            ExponentialDecay,
            InverseTimeDecay,
            PolynomialDecay,
            PiecewiseConstantDecay,
            CosineDecay,
            CosineDecayRestarts,
            LinearWarmup,
        )
    }
    known.update(custom_objects or {})
    name = config["class_name"]
    if name not in known:
        raise ValueError(
            f"unknown schedule {name!r}; known are {', '.join(sorted(known))}. "
            "Pass your own classes in custom_objects."
        )
    return known[name].from_config(config["config"])


def _progress(step: float, period: float, staircase: bool) -> float:
    progress = step / period
    if not staircase:
        return progress
    # `period` is often a rounded fraction (see decay_steps); without the margin, a boundary that
    # falls on a whole step would come one step late for some batch sizes.
    return math.floor(progress * (1.0 + 2.0**-50))


def _cosine(fraction: float, alpha: float, peak: float = 1.0) -> float:
    return (1.0 - alpha) * 0.5 * peak * (1.0 + math.cos(math.pi * fraction)) + alpha


def _check_rate(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value}.")


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}.")
