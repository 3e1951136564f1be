"""What a graph knows of the step that is open."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Step"]


@dataclass(eq=False)
class Step:
    """One run of a model's code; see `Graph.step`.

    Attributes:
        number: the step's number, which random numbers depend on.
        first_example: index, in the global batch, of the first example that this replica computes.
        variables: names of the variables that were made or asked for in it.
        done: the update operations that ran in it, by identity.
        draws: how often random numbers were drawn in it, by the name of what drew them.
    """

    number: int = 0
    first_example: int = 0
    variables: set[str] = field(default_factory=set[str])
    done: dict[int, Any] = field(default_factory=dict[int, Any])
    draws: Counter[str] = field(default_factory=Counter[str])
