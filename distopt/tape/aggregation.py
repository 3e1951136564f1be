"""How several contributions to one gradient are added up: `AggregationMethod`, and the sums it names."""

from __future__ import annotations

from typing import Any

import numpy as np

from distopt.variables import IndexedSlices, Operand, add_gradients, concatenated

__all__ = ["AggregationMethod", "Sums", "checked_method"]


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


class Sums:
    """Gradients by key, each the sum of its contributions. No contribution is changed: others may share it.

    Args:
        aggregation_method: how they are added; None is the default.

    Raises:
        ValueError: it is none of `AggregationMethod`.
    """

    __slots__ = ("_kind", "_parts")

    def __init__(self, aggregation_method: int | None = None) -> None:
        self._kind = _KINDS[checked_method(aggregation_method)]
        # The first contribution itself: most have no second.
        self._parts: dict[int, Any] = {}

    def __contains__(self, key: int) -> bool:
        return key in self._parts

    def add(self, key: int, contribution: Any) -> None:
        """Take in an array, a Tensor or IndexedSlices."""
        if key not in self._parts:
            self._parts[key] = contribution
            return
        total = self._parts[key]
        if type(total) is self._kind:
            total.add(contribution)
        else:
            self._parts[key] = self._kind(total, contribution)

    def pop(self, key: int) -> Any:
        """Return a sum, the only contribution itself where there was one, or None; and forget it."""
        total = self._parts.pop(key, None)
        return total.result() if type(total) is self._kind else total


class _AddN:
    """Adds when the last contribution is there."""

    __slots__ = ("_parts",)

    def __init__(self, first: Any, second: Any) -> None:
        self._parts = [first, second]

    def add(self, contribution: Any) -> None:
        self._parts.append(contribution)

    def result(self) -> Any:
        parts = self._parts
        slices = 0
        while slices < len(parts) and isinstance(parts[slices], IndexedSlices):
            slices += 1
        if slices > 1:
            parts = [concatenated(parts[:slices]), *parts[slices:]]
        if len(parts) == 1:
            return parts[0]
        total = _sum(parts[0], parts[1])
        for part in parts[2:]:
            total = _grown(total, part)
        return total


class _Accumulated:
    """Adds each contribution as it comes."""

    __slots__ = ("_total",)

    def __init__(self, first: Any, second: Any) -> None:
        self._total = _sum(first, second)

    def add(self, contribution: Any) -> None:
        self._total = _grown(self._total, contribution)

    def result(self) -> Any:
        return self._total


class _Tree:
    """Adds pairs of equal height, as a binary counter carries."""

    __slots__ = ("_heights", "_sums")

    def __init__(self, first: Any, second: Any) -> None:
        self._sums: list[Any] = [_sum(first, second)]
        self._heights = [1]

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


_KINDS: dict[int, type[_AddN | _Tree | _Accumulated]] = {
    AggregationMethod.ADD_N: _AddN,
    AggregationMethod.EXPERIMENTAL_TREE: _Tree,
    AggregationMethod.EXPERIMENTAL_ACCUMULATE_N: _Accumulated,
}


def checked_method(aggregation_method: int | None) -> int:
    """Return a method; None is the default one.

    Raises:
        ValueError: it is none of `AggregationMethod`.
    """
    method = AggregationMethod.DEFAULT if aggregation_method is None else aggregation_method
    if not isinstance(method, int) or isinstance(method, bool) or method not in _KINDS:
        raise ValueError(
            f"Invalid aggregation_method specified: {aggregation_method!r}. Give one of AggregationMethod's "
            "ADD_N (0), EXPERIMENTAL_TREE (1) and EXPERIMENTAL_ACCUMULATE_N (2), or None"
        )
    return method


def _sum(left: Any, right: Any) -> Any:
    """Return the sum in memory of its own."""
    if isinstance(left, IndexedSlices) or isinstance(right, IndexedSlices):
        return add_gradients(left, right)
    return left + right


def _grown(total: Any, part: Any) -> Any:
    """Return the sum, in the memory of `total` where it is an array."""
    if isinstance(total, IndexedSlices | Operand) or isinstance(part, IndexedSlices | Operand):
        return _sum(total, part)
    if np.shape(total):
        total += part
        return total
    return total + part
