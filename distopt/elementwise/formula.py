"""What a formula is once it has been read: a list of simple operations."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Formula", "Node", "Signature"]

_INEXACT = {"exp", "log", "power"}


@dataclass(frozen=True)
class Node:
    """One operation of a formula.

    Attributes:
        operation: "array", "scalar", "constant", or the name of a NumPy function.
        arguments: positions of its arguments in `Formula.nodes`; always smaller than its own.
        label: the name of an array or scalar, the digits of a constant.
        number: the value of a constant.
        varies: whether it differs from element to element.
        truth: whether it is true or false rather than a number.
    """

    operation: str
    arguments: tuple[int, ...] = ()
    label: str = ""
    number: float = 0.0
    varies: bool = False
    truth: bool = False


@dataclass(frozen=True)
class Signature:
    """The parameters of a rule: arrays by position, scalars and static options by keyword."""

    arrays: tuple[str, ...]
    scalars: tuple[str, ...]
    options: tuple[str, ...]
    defaults: Mapping[str, float | bool]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: it is a key of caches
class Formula:
    """One formula with its static options settled.

    Attributes:
        name: the rule's name.
        options: the setting of each static option.
        arrays: the arrays that are read or written here, in the order of the rule's parameters.
        scalars: all scalars of the rule.
        nodes: the operations, each after its arguments.
        results: the position of each written array's new value; arrays that would be given back as
            they came are not in it.
        returned: the names in the return statement.
    """

    name: str
    options: Mapping[str, bool]
    arrays: tuple[str, ...]
    scalars: tuple[str, ...]
    nodes: tuple[Node, ...]
    results: Mapping[str, int]
    returned: tuple[str, ...]

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        """The arrays whose values matter."""
        return tuple(node.label for node in self.nodes if node.operation == "array")

    @functools.cached_property
    def exact(self) -> bool:
        """Whether IEEE 754 fixes every bit of the result: no exp, log or general power."""
        return not any(node.operation in _INEXACT for node in self.nodes)
