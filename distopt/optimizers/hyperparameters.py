"""Hyperparameters: numbers, schedules or callables, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distopt import schedules
from distopt.schedules import LearningRateSchedule
from distopt.schedules.tf1 import DecayedLearningRate
from distopt.variables import Operand, number_now

__all__ = ["Hyperparameters", "check_arguments"]


class Hyperparameters:
    """The hyperparameters of one optimizer.

    A number is kept as a float. A schedule is called with the number of updates done, any other callable
    without arguments, both once in every update.

    Args:
        check: called with name and number, raises ValueError where the number is out of range.
    """

    def __init__(self, check: Callable[[str, float], None]) -> None:
        self._check = check
        self._given: dict[str, Any] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._given

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def set(self, name: str, value: Any) -> None:
        """Set a hyperparameter, whatever kind it had before.

        Args:
            name: its name.
            value: number, schedule, serialised schedule, variable or Tensor without axes (read at every
                step), or callable without arguments.

        Raises:
            ValueError: a number out of range.
            TypeError: it is none of these.
        """
        if isinstance(value, dict):
            value = schedules.deserialize(value)
        if isinstance(value, Operand) or not callable(value):
            convertible: Any = value
            try:
                number = float(convertible)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"hyperparameter {name} must be a number, a schedule, or a callable without arguments; "
                    f"got {value!r}"
                ) from error
            self._check(name, number)
            value = value if isinstance(value, Operand) else number
        self._given[name] = value

    def read(self, name: str) -> Any:
        """Return the number, the schedule or variable itself, or what the callable gives now."""
        given: Any = self._given[name]
        if isinstance(given, LearningRateSchedule) or not callable(given):
            return given
        return given()

    def value(self, name: str, step: int) -> float:
        """Return the number in force for the update that follows `step` updates.

        Raises:
            ValueError: what a schedule or callable gave is out of range.
        """
        given: Any = self._given[name]
        if isinstance(given, LearningRateSchedule):
            given = given(step)
        number = number_now(given)
        self._check(name, number)
        return number

    def config(self, name: str) -> Any:
        """Return a plain value: the number, the serialised schedule, or the callable's number now."""
        given: Any = self._given[name]
        if isinstance(given, LearningRateSchedule):
            return schedules.serialize(given)
        if isinstance(given, DecayedLearningRate):  # without its global step, which the optimizer has itself
            return schedules.serialize(given.schedule)
        return number_now(given)


def check_arguments(kwargs: Mapping[str, Any], known: set[str]) -> None:
    """Check what an optimizer's constructor got besides its own arguments.

    Args:
        kwargs: by keyword.
        known: which there may be.

    Raises:
        TypeError: another argument.
        ValueError: a negative number.
    """
    for key, value in kwargs.items():
        if key not in known:
            raise TypeError(
                f"Unexpected keyword argument passed to optimizer: {key}. Known besides those of the "
                f"optimizer itself are {', '.join(sorted(known))}, gradient_aggregator and "
                "gradient_transformers."
            )
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"Expected {key} >= 0, received: {value}")
    if kwargs.get("lr") is not None:
        warnings.warn("The `lr` argument is deprecated, use `learning_rate` instead.", stacklevel=4)
