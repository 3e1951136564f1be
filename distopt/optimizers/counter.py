"""A counter of updates: a host variable that reads like an integer."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from distopt.backend import Device
from distopt.variables import Operand, Variable

__all__ = ["StepCounter"]


@functools.total_ordering
class StepCounter(Variable):
    """An int64 variable without axes that counts updates; it compares and converts as an integer.

    It lives on the host whatever the device of the model: schedules are evaluated there.

    Args:
        value: where it starts.
        name: its name.

    Raises:
        ValueError: `value` is negative.
    """

    __slots__ = ()

    def __init__(self, value: int = 0, name: str = "iter") -> None:
        if value < 0:
            raise ValueError(f"a counter of updates must not start below 0, got {value}")
        super().__init__(np.int64(value), trainable=False, name=name, device=Device("cpu"))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Operand):
            return self is other
        return int(self) == other

    def __lt__(self, other: Any) -> bool:
        return int(self) < other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<StepCounter {self.name!r} {int(self)}>"

    def __format__(self, specification: str) -> str:
        return format(int(self), specification)

    def __str__(self) -> str:
        return str(int(self))
