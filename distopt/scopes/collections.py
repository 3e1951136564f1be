"""The collections of a graph: lists by name, and what of them a step leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from distopt.variables import Variable

__all__ = ["Collections"]


class Collections:
    """Lists by name. What a step adds lasts until the next one begins; variables last for good.

    Variables that a step adds again, because the code that adds them runs in every step, are not added
    twice.
    """

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}
        # Of the open step: how often it found each value in a list, and how often it added each.
        self._lasting: dict[str, Counter[int]] | None = None
        self._added: Counter[tuple[str, int]] = Counter()
        # What the step before added, to be dropped when the next one begins.
        self._passing: list[tuple[str, Any]] = []

    def add(self, name: str, value: Any, lasting: bool = False) -> None:
        """Append a value; `lasting` values stay after the step that adds them, as variables do."""
        values = self.reference(name)
        if self._lasting is not None and (lasting or isinstance(value, Variable)):
            self._added[name, id(value)] += 1
            if sum(other is value for other in values) >= self._added[name, id(value)]:
                return
            self._lasting.setdefault(name, Counter())[id(value)] += 1
        values.append(value)

    def values(self, name: str) -> list[Any]:
        """Return a copy of a list, empty if there is none of that name."""
        return list(self._lists.get(name, ()))

    def reference(self, name: str) -> list[Any]:
        """Return a list itself."""
        return self._lists.setdefault(name, [])

    def begin_step(self) -> None:
        """Drop what the last step added."""
        for name, value in self._passing:
            _remove_last(self._lists[name], value)
        self._passing = []
        self._added.clear()
        self._lasting = {name: Counter(map(id, values)) for name, values in self._lists.items()}

    def sizes(self) -> dict[str, int]:
        """Return the lengths of the lists, for `added_since`."""
        return {name: len(values) for name, values in self._lists.items()}

    def added_since(self, sizes: Mapping[str, int]) -> list[tuple[str, Any]]:
        """Return (name of the list, value) for what was appended since, but for what lasts."""
        lasting = self._lasting or {}
        return [
            (name, value)
            for name, values in self._lists.items()
            for value in values[sizes.get(name, 0) :]
            if not lasting.get(name, Counter[int]())[id(value)]
        ]

    def drop(self, added: Iterable[tuple[str, Any]]) -> None:
        """Take values out that the open step added; what it adds again is counted anew."""
        for name, value in added:
            _remove_last(self._lists[name], value)
        self._added.clear()

    def end_step(self) -> None:
        """Remember what the open step added."""
        before = self._lasting or {}
        self._lasting = None
        for name, values in self._lists.items():
            left = Counter(before.get(name, Counter[int]()))
            for value in values:
                if left[id(value)]:
                    left[id(value)] -= 1
                else:
                    self._passing.append((name, value))


def _remove_last(values: list[Any], value: Any) -> None:
    """Remove the last occurrence of an object, if it is still there."""
    for position in reversed(range(len(values))):
        if values[position] is value:
            del values[position]
            return
