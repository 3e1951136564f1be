"""What large batches ask for: warm-up, the linear scaling rule, and steps counted in examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, SupportsFloat

from distopt.schedules.schedule import LearningRateSchedule, check_positive, check_rate
from distopt.schedules.serialization import deserialize, is_serialized, serializable

__all__ = ["LinearScaling", "LinearWarmup", "decay_steps", "gradual_warmup", "scale_learning_rate"]


@serializable
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
        _check_schedule(self.schedule)
        check_rate("warmup_steps", self.warmup_steps)
        check_rate("initial_learning_rate", self.initial_learning_rate)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        target = _rate(self.schedule, step)
        now = float(step)
        if now >= self.warmup_steps:
            return target
        start = self.initial_learning_rate
        return start + (target - start) * now / self.warmup_steps

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the schedule that `get_config` described."""
        return cls(**_with_schedule(config))


@serializable
@dataclass(frozen=True)
class LinearScaling(LearningRateSchedule):
    """Multiply another schedule's rates: the linear scaling rule, `factor` times the global batch.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.1,
    https://arxiv.org/abs/1706.02677. Not in TensorFlow. Only the rates are scaled: where more ranks
    mean fewer steps in an epoch, compute the inner schedule's steps with `decay_steps`.

    Args:
        schedule: what is scaled, or a number for a constant rate.
        factor: for instance the number of ranks.
        name: for the configuration only.

    Raises:
        ValueError: a rate is negative, or `factor` is not positive.
    """

    schedule: LearningRateSchedule | float
    factor: float
    name: str | None = None

    def __post_init__(self) -> None:
        _check_schedule(self.schedule)
        check_positive("factor", self.factor)

    def __call__(self, step: SupportsFloat) -> float:
        """Return the learning rate at `step`."""
        return self.factor * _rate(self.schedule, step)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the schedule that `get_config` described."""
        return cls(**_with_schedule(config))


def gradual_warmup(
    schedule: LearningRateSchedule | float, ranks: int, warmup_steps: float
) -> LearningRateSchedule:
    """Return `ranks` times a schedule, reached from the unscaled rate in `warmup_steps` steps.

    The recipe of Goyal et al., section 2.2, for plain data parallelism where each further rank adds
    its batch to the global one: start at the rate of one rank, go up by a straight line, over 5
    epochs in the paper.

        >>> rate = gradual_warmup(0.1, ranks=8, warmup_steps=7)
        >>> [round(rate(step), 3) for step in (0, 1, 7, 100)]
        [0.1, 0.2, 0.8, 0.8]

    Args:
        schedule: the schedule for one rank, or a number for a constant rate.
        ranks: how many times larger the global batch is.
        warmup_steps: length of the warm-up; 0 for none.

    Raises:
        ValueError: a rate or `warmup_steps` is negative, or `ranks` is not positive.
    """
    _check_schedule(schedule)
    return LinearWarmup(LinearScaling(schedule, ranks), warmup_steps, _rate(schedule, 0))


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
    check_positive("num_examples", num_examples)
    check_positive("epochs", epochs)
    check_positive("global_batch", global_batch)
    return num_examples * epochs / global_batch


def scale_learning_rate(learning_rate: float, global_batch: int, reference_batch: int = 256) -> float:
    """Return the rate for another global batch: `learning_rate * global_batch / reference_batch`.

    The linear scaling rule of Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 2.1;
    use it with a `LinearWarmup`.

    Raises:
        ValueError: the rate is negative, or a batch is not positive.
    """
    check_rate("learning_rate", learning_rate)
    check_positive("global_batch", global_batch)
    check_positive("reference_batch", reference_batch)
    return learning_rate * global_batch / reference_batch


def _check_schedule(schedule: LearningRateSchedule | float) -> None:
    if not isinstance(schedule, LearningRateSchedule):
        check_rate("schedule", schedule)


def _rate(schedule: LearningRateSchedule | float, step: SupportsFloat) -> float:
    return schedule(step) if isinstance(schedule, LearningRateSchedule) else float(schedule)


def _with_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return constructor arguments, the inner schedule made of its serialised form."""
    arguments = dict(config)
    if is_serialized(arguments["schedule"]):
        arguments["schedule"] = deserialize(arguments["schedule"])
    return arguments
