"""How several contributions to one gradient are added up: `AggregationMethod`, and the sums it names."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from distopt.variables import IndexedSlices, Operand, add_gradients, concatenated

__all__ = ["AggregationMethod", "Total", "total_kind"]


class AggregationMethod:
    """How the contributions of several paths to one gradient are added, as in TensorFlow.

    The sum is the same one but for rounding, and for memory:

    - `ADD_N` (the default) keeps them all and adds them when the last is there: dense ones from left to
      right (first + second, + third ...), slices in one concatenation.
    - `EXPERIMENTAL_TREE` adds in pairs, then pairs of pairs, keeping at most log2(n) + 1 at a time.
      The rounding error grows with log2(n) in the place of n.
    - `EXPERIMENTAL_ACCUMULATE_N` adds each one as it comes, and keeps one sum. For dense gradients its
      order is that of `ADD_N`, and so are its bits.
    """

    ADD_N = 0
    DEFAULT = ADD_N
    EXPERIMENTAL_TREE = 1
    EXPERIMENTAL_ACCUMULATE_N = 2


class Total(Protocol):
    """The contributions to one gradient so far. None of them is changed: others may share them."""

    def add(self, contribution: Any) -> None:
        """Take in an array, a Tensor or IndexedSlices."""
        ...

    def result(self) -> Any:
        """Return the sum; the only contribution itself where there was one. Called once, at the end."""
        ...


class _AddN:
    """Adds when the last contribution is there."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        self._parts: list[Any] = []

    def add(self, contribution: Any) -> None:
        self._parts.append(contribution)

    def result(self) -> Any:
        parts = self._parts
        if len(parts) == 1:
            return parts[0]
        leading = 0
        while leading < len(parts) and isinstance(parts[leading], IndexedSlices):
            leading += 1
        total = _Accumulated()
        total.add(concatenated(parts[:leading]) if leading > 1 else parts[0])
        for part in parts[max(1, leading) :]:
            total.add(part)
        return total.result()


class _Accumulated:
    """Adds each contribution as it comes; from the second on the sum has memory of its own."""

    __slots__ = ("_owned", "_value")

    def __init__(self) -> None:
        self._value: Any = None
        self._owned = False

    def add(self, contribution: Any) -> None:
        if self._value is None:
            self._value = contribution
            return
        if self._owned and _adds_in_place(self._value, contribution):
            self._value += contribution
            return
        self._value = _sum(self._value, contribution)
        self._owned = True

    def result(self) -> Any:
        return self._value


class _Tree:
    """Adds pairs of equal height, as a binary counter carries."""

    __slots__ = ("_heights", "_sums")

    def __init__(self) -> None:
        self._sums: list[Any] = []
        self._heights: list[int] = []

    def add(self, contribution: Any) -> None:
        self._sums.append(contribution)
        self._heights.append(0)
        while len(self._heights) > 1 and self._heights[-1] == self._heights[-2]:
            self._join()

    def result(self) -> Any:
        while len(self._sums) > 1:
            self._join()
        return self._sums[0]

    def _join(self) -> None:
        right, left = self._sums.pop(), self._sums.pop()
        self._sums.append(_sum(left, right))
        self._heights[-2:] = [self._heights[-2] + 1]


_KINDS: dict[int, type[Total]] = {
    AggregationMethod.ADD_N: _AddN,
    AggregationMethod.EXPERIMENTAL_TREE: _Tree,
    AggregationMethod.EXPERIMENTAL_ACCUMULATE_N: _Accumulated,
}


def total_kind(aggregation_method: int | None) -> type[Total]:
    """Return what adds by a method; None is the default one.

    Raises:
        ValueError: it is none of `AggregationMethod`.
    """
    method = AggregationMethod.DEFAULT if aggregation_method is None else aggregation_method
    if not isinstance(method, int) or isinstance(method, bool) or method not in _KINDS:
        raise ValueError(
            f"Invalid aggregation_method specified: {aggregation_method!r}. Give one of AggregationMethod's "
            "ADD_N (0), EXPERIMENTAL_TREE (1) and EXPERIMENTAL_ACCUMULATE_N (2), or None"
        )
    return _KINDS[method]


def _sum(left: Any, right: Any) -> Any:
    if isinstance(left, IndexedSlices) or isinstance(right, IndexedSlices):
        return add_gradients(left, right)
    return left + right


def _adds_in_place(total: Any, contribution: Any) -> bool:
    arrays = not isinstance(total, IndexedSlices | Operand)
    return arrays and not isinstance(contribution, IndexedSlices | Operand) and bool(np.shape(total))
