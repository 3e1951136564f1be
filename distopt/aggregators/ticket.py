"""The ticket: a small record that is summed over ranks with every step, so that all decide alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np

from distopt.backend import Array

__all__ = ["Ticket"]


@dataclass
class Ticket:
    """What a rank knows about its part of a step; after reduction, what all know about the whole step.

    Attributes:
        examples: number of examples, or the sum of their weights.
        loss: sum of the examples' losses.
        correct: number of examples classified right.
        not_finite: 1 on a rank whose loss or input is NaN or infinite; then the number of such ranks.
        stop: 1 on a rank that was asked to stop; then the number of such ranks.
        preempt: 1 on a rank that is about to lose its machine; then the number of such ranks.
        error: 1 on a rank that can't do this step; then the number of such ranks. An aggregator raises
            `CommunicatorError` on all of them, with the reasons.
        step: number of the step, the same on every rank; None: the aggregator counts. Not summed.
        reason: why, where `error` is 1. Not summed; sent only then.
        where: what is not finite, where `not_finite` is 1; then what all such ranks say, with their names.
            Not summed; sent only then.

    Raises:
        ValueError: `examples` is negative, NaN or infinite: no divisor for a batch could be made of it.
    """

    examples: float = 0.0
    loss: float = 0.0
    correct: float = 0.0
    not_finite: float = 0.0
    stop: float = 0.0
    preempt: float = 0.0
    error: float = 0.0
    step: int | None = None
    reason: str = ""
    where: str = ""

    def __post_init__(self) -> None:
        self._check()

    def to_array(self) -> Array:
        """Return the summed fields as float64 [7], which sums counts exactly up to 2**53."""
        self._check()  # fields may have been set since
        return np.array([getattr(self, name) for name in _SUMMED], np.float64)

    def __add__(self, other: Ticket) -> Ticket:
        total = Ticket.from_array(self.to_array() + other.to_array())
        total.step = self.step if other.step is None else other.step
        total.reason = "; ".join(filter(None, (self.reason, other.reason)))
        total.where = "; ".join(filter(None, (self.where, other.where)))
        return total

    def _check(self) -> None:
        if not 0 <= self.examples < math.inf:
            raise ValueError(
                f"examples must be 0 or more and finite, got {self.examples}: give the number of this rank's "
                "examples, or the sum of their weights, and 0 where it has none"
            )

    @classmethod
    def from_array(cls, array: Array) -> Ticket:
        """Return the record that `to_array` gave."""
        examples, loss, correct, not_finite, stop, preempt, error = (float(value) for value in array)
        return cls(examples, loss, correct, not_finite, stop, preempt, error)


_SUMMED = [field.name for field in fields(Ticket)][:7]
