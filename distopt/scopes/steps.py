"""What a graph knows of the step that is open."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Part", "PartStart", "Step"]


class Part(NamedTuple):
    """Whose code runs in a step, such as one training step's among several.

    Attributes:
        code: the function that is run; parts of equal functions are one.
        name: how to call it in messages.
    """

    code: Any
    name: str


class PartStart(NamedTuple):
    """What a step looked like when a part of it first began.

    Attributes:
        names: how often each name was used.
        openings: how often each variable scope was opened.
        variables: see `Step`.
        collections: what the part added to collections, to be dropped where it begins again.
    """

    names: Mapping[str, int]
    openings: Mapping[str, int]
    variables: frozenset[str]
    collections: list[tuple[str, Any]]


@dataclass(eq=False)
class Step:
    """One run of a model's code; see `Graph.step`.

    Attributes:
        number: the step's number, which random numbers depend on.
        first_example: index, in the global batch, of the first example that this replica computes.
        variables: names of the variables that were made or asked for in it.
        done: the update operations that ran in it, by identity.
        draws: how often random numbers were drawn in it, by the name of what drew them.
        part: whose code runs; None where that was not said.
        begun: the parts that have begun in it, with what it looked like then.
    """

    number: int = 0
    first_example: int = 0
    variables: set[str] = field(default_factory=set[str])
    done: dict[int, Any] = field(default_factory=dict[int, Any])
    draws: Counter[str] = field(default_factory=Counter[str])
    part: Part | None = None
    begun: list[tuple[Part, PartStart]] = field(default_factory=list[tuple[Part, PartStart]])
