"""TensorFlow 1's decay functions: a rate bound to a global step, to be called without arguments.

In TensorFlow 1 these return a tensor that reads `global_step` whenever it is evaluated, in eager mode
a callable without arguments. Here they return such a callable, a `DecayedLearningRate`: an optimizer
takes it as its learning rate and calls it at every update.

    >>> step = [0]
    >>> rate = exponential_decay(0.1, lambda: step[0], decay_steps=10, decay_rate=0.5)
    >>> rate()
    0.1
    >>> step[0] = 20
    >>> rate()
    0.025

`global_step` is a `Variable`, a number, or a callable without arguments; so may be the learning rate
and every other number. All are read at each call and the arithmetic is float64. A Variable on a GPU
makes the host wait, so keep the global step on the host. The formulas are those of the classes of this
package, and so are the checks of the numbers' ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.schedules.cosine import (
    CosineDecay,
    CosineDecayRestarts,
    LinearCosineDecay,
    NoisyLinearCosineDecay,
)
from distopt.schedules.decay import (
    ExponentialDecay,
    InverseTimeDecay,
    NaturalExpDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)
from distopt.schedules.schedule import LearningRateSchedule

__all__ = [
    "DecayedLearningRate",
    "cosine_decay",
    "cosine_decay_restarts",
    "exponential_decay",
    "inverse_time_decay",
    "linear_cosine_decay",
    "natural_exp_decay",
    "noisy_linear_cosine_decay",
    "piecewise_constant",
    "piecewise_constant_decay",
    "polynomial_decay",
]


class DecayedLearningRate:
    """A schedule bound to a global step: a callable without arguments that gives the present rate.

    Args:
        schedule_class: the schedule.
        global_step: what it is evaluated at: number, Variable or callable, read at each call.
        arguments: of the schedule. Numbers may be Variables or callables, read at each call too.

    Attributes:
        global_step: as given.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, schedule_class: type[LearningRateSchedule], global_step: Any, **arguments: Any
    ) -> None:
        self.global_step = global_step
        self._class = schedule_class
        self._arguments = arguments
        self._fixed: LearningRateSchedule | None = None
        schedule = self.schedule
        if not any(_changes(value) for value in arguments.values()):
            self._fixed = schedule

    @property
    def schedule(self) -> LearningRateSchedule:
        """The schedule, a function of the step, with the present values of its arguments."""
        if self._fixed is not None:
            return self._fixed
        return self._class(**{name: _now(value) for name, value in self._arguments.items()})

    def __call__(self) -> float:
        """Return the learning rate at the present global step."""
        return self.schedule(_now(self.global_step))

    def __float__(self) -> float:
        return self()

    def get_config(self) -> dict[str, Any]:
        """Return the schedule's configuration; `serialize(rate.schedule)` adds the name of its class."""
        return self.schedule.get_config()

    def __repr__(self) -> str:
        return f"<{self.schedule!r} of {self.global_step!r}>"


def exponential_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: Any,
    decay_rate: Any,
    staircase: bool = False,
    name: str | None = None,
) -> DecayedLearningRate:
    """`learning_rate * decay_rate ** (global_step / decay_steps)`; see `ExponentialDecay`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "global_step is required for exponential_decay.")
    return DecayedLearningRate(
        ExponentialDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        decay_rate=decay_rate,
        staircase=staircase,
        name=name,
    )


def natural_exp_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: Any,
    decay_rate: Any,
    staircase: bool = False,
    name: str | None = None,
) -> DecayedLearningRate:
    """`learning_rate * exp(-decay_rate * global_step / decay_steps)`; see `NaturalExpDecay`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "global_step is required for natural_exp_decay.")
    return DecayedLearningRate(
        NaturalExpDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        decay_rate=decay_rate,
        staircase=staircase,
        name=name,
    )


def inverse_time_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: Any,
    decay_rate: Any,
    staircase: bool = False,
    name: str | None = None,
) -> DecayedLearningRate:
    """`learning_rate / (1 + decay_rate * global_step / decay_steps)`; see `InverseTimeDecay`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "global_step is required for inverse_time_decay.")
    return DecayedLearningRate(
        InverseTimeDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        decay_rate=decay_rate,
        staircase=staircase,
        name=name,
    )


def polynomial_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: Any,
    end_learning_rate: Any = 0.0001,
    power: Any = 1.0,
    cycle: bool = False,
    name: str | None = None,
) -> DecayedLearningRate:
    """From the learning rate to the end rate along a power of the steps left; see `PolynomialDecay`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "global_step is required for polynomial_decay.")
    return DecayedLearningRate(
        PolynomialDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        end_learning_rate=end_learning_rate,
        power=power,
        cycle=cycle,
        name=name,
    )


def cosine_decay(
    learning_rate: Any, global_step: Any, decay_steps: Any, alpha: Any = 0.0, name: str | None = None
) -> DecayedLearningRate:
    """Half a cosine wave; see `CosineDecay`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "cosine decay requires global_step")
    return DecayedLearningRate(
        CosineDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        alpha=alpha,
        name=name,
    )


def cosine_decay_restarts(
    learning_rate: Any,
    global_step: Any,
    first_decay_steps: Any,
    t_mul: Any = 2.0,
    m_mul: Any = 1.0,
    alpha: Any = 0.0,
    name: str | None = None,
) -> DecayedLearningRate:
    """Half a cosine wave again and again; see `CosineDecayRestarts`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "cosine decay restarts requires global_step")
    return DecayedLearningRate(
        CosineDecayRestarts,
        global_step,
        initial_learning_rate=learning_rate,
        first_decay_steps=first_decay_steps,
        t_mul=t_mul,
        m_mul=m_mul,
        alpha=alpha,
        name=name,
    )


def linear_cosine_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: Any,
    num_periods: Any = 0.5,
    alpha: Any = 0.0,
    beta: Any = 0.001,
    name: str | None = None,
) -> DecayedLearningRate:
    """A straight line times a cosine wave; see `LinearCosineDecay`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "linear cosine decay requires global_step")
    return DecayedLearningRate(
        LinearCosineDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        num_periods=num_periods,
        alpha=alpha,
        beta=beta,
        name=name,
    )


def noisy_linear_cosine_decay(
    learning_rate: Any,
    global_step: Any,
    decay_steps: Any,
    initial_variance: Any = 1.0,
    variance_decay: Any = 0.55,
    num_periods: Any = 0.5,
    alpha: Any = 0.0,
    beta: Any = 0.001,
    name: str | None = None,
    seed: int = 0,
) -> DecayedLearningRate:
    """A noisy straight line times a cosine wave; see `NoisyLinearCosineDecay`, also for `seed`.

    Raises:
        ValueError: `global_step` is None, or an argument is out of its range.
    """
    _check_step(global_step, "noisy linear cosine decay requires global_step")
    return DecayedLearningRate(
        NoisyLinearCosineDecay,
        global_step,
        initial_learning_rate=learning_rate,
        decay_steps=decay_steps,
        initial_variance=initial_variance,
        variance_decay=variance_decay,
        num_periods=num_periods,
        alpha=alpha,
        beta=beta,
        name=name,
        seed=seed,
    )


def piecewise_constant(
    x: Any, boundaries: Sequence[Any], values: Sequence[Any], name: str | None = None
) -> DecayedLearningRate:
    """A constant rate between boundaries; see `PiecewiseConstantDecay`.

    As in TensorFlow the types must fit: boundaries of an integer type for an integer step (of any
    width), of the same floating type for a floating one, and values of one type. Python's int and
    float count as int32 and float32.

    Args:
        x: the global step: number, Variable or callable.
        boundaries: steps, strictly increasing.
        values: rates, one more than there are boundaries.
        name: for the configuration only.

    Raises:
        ValueError: `x` is None; the types don't fit (for a callable `x`, at the first call); or what
            `PiecewiseConstantDecay` refuses.
        IndexError: there are no boundaries.
    """
    _check_step(x, "global_step is required for piecewise_constant.")
    for value in values[1:]:
        if _dtype(value) != _dtype(values[0]):
            raise ValueError(
                "Values must have elements all with the same dtype "
                f"({_dtype(values[0])} vs {_dtype(value)}). Write them all with a decimal point."
            )
    boundary_types = [_dtype(boundary) for boundary in boundaries]

    def checked_step() -> Any:
        step = x() if callable(x) else x
        _check_boundary_types(boundary_types, _dtype(step))
        return step

    if not callable(x):
        checked_step()
    return DecayedLearningRate(
        PiecewiseConstantDecay,
        checked_step if callable(x) else x,
        boundaries=[_item(boundary) for boundary in boundaries],
        values=[float(value) for value in values],
        name=name,
    )


piecewise_constant_decay = piecewise_constant
"""TensorFlow's other name of `piecewise_constant`."""


def _check_step(global_step: Any, message: str) -> None:
    if global_step is None:
        raise ValueError(f"{message} Pass the Variable that counts the steps, or a callable that gives it.")


def _check_boundary_types(boundary_types: list[np.dtype[Any]], step_type: np.dtype[Any]) -> None:
    for boundary_type in boundary_types:
        both_integers = boundary_type.kind in "iu" and step_type.kind in "iu"
        if boundary_type != step_type and not both_integers:
            raise ValueError(
                f"Boundaries ({boundary_type}) must have the same dtype as x ({step_type}). "
                "Write boundaries as integers for a step that is one."
            )


def _changes(value: Any) -> bool:
    return callable(value) or hasattr(value, "assign")


def _now(value: Any) -> Any:
    """Return the present value of a callable, Variable or array of rank 0; other values as they are."""
    value = value() if callable(value) else value
    return _item(value) if hasattr(value, "dtype") else value


def _item(value: Any) -> Any:
    return value.numpy().item() if hasattr(value, "numpy") else getattr(value, "item", lambda: value)()


def _dtype(value: Any) -> np.dtype[Any]:
    """Return the type that TensorFlow gives a value."""
    if hasattr(value, "dtype"):
        return np.dtype(value.dtype)
    return np.dtype(np.int32 if isinstance(value, int) else np.float32)
