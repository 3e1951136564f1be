"""The numbers of one step that a rule takes, computed once for each dtype and group of variables."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from distopt.optimizers.updates import Updates

__all__ = ["Scalars"]


class Scalars:
    """The rule's scalars in one step, by dtype and group.

    Args:
        optimizer: whose rule it is.
        values: every hyperparameter's value in this step.
    """

    def __init__(self, optimizer: Updates, values: Mapping[str, float]) -> None:
        self._optimizer = optimizer
        self._values = values
        self._found: dict[tuple[Any, Hashable], dict[str, float]] = {}

    def of(self, dtype: np.dtype[Any], group: Hashable) -> dict[str, float]:
        """Return the scalars for variables of a dtype and group."""
        key = dtype, group
        if key not in self._found:
            optimizer = self._optimizer
            rounded = dict(self._values)
            if dtype != np.float64:
                rounded = {name: float(np.float32(value)) for name, value in rounded.items()}
            scalars = optimizer.scalars(rounded, optimizer.step)
            self._found[key] = optimizer.grouped(scalars, group)
        return self._found[key]
