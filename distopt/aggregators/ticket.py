"""The ticket: a small record that is summed over ranks with every step, so that all decide alike."""

from __future__ import annotations

from dataclasses import astuple, dataclass

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
    """

    examples: float = 0.0
    loss: float = 0.0
    correct: float = 0.0
    not_finite: float = 0.0
    stop: float = 0.0

    def to_array(self) -> Array:
        """Return the record as float64 [5], which sums counts exactly up to 2**53."""
        return np.array(astuple(self), np.float64)

    def __add__(self, other: Ticket) -> Ticket:
        return Ticket.from_array(self.to_array() + other.to_array())

    @classmethod
    def from_array(cls, array: Array) -> Ticket:
        """Return the record that `to_array` gave."""
        return cls(*(float(value) for value in array))
