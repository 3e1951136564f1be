"""The base of all schedules, and the checks of their arguments."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self, SupportsFloat

__all__ = ["LearningRateSchedule", "check_positive", "check_rate"]


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
        config: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # A schedule within a schedule, in the form of `serialize`.
            if isinstance(value, LearningRateSchedule):
                value = {"class_name": type(value).__name__, "config": value.get_config()}
            config[field.name] = value
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the schedule that `get_config` described."""
        return cls(**config)


def check_rate(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number, 0 or more."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, 0 or more, got {value}.")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}.")
