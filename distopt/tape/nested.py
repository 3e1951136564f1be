"""Nested lists, tuples and dicts of operands: their leaves, and the same nest around other leaves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

__all__ = ["as_list", "leaves", "rebuilt"]


def leaves(nested: Any) -> Iterator[Any]:
    """Yield what is nested, in order; None is a leaf."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        for item in nested:
            yield from leaves(item)
    else:
        yield nested


def rebuilt(nested: Any, values: Iterator[Any]) -> Any:
    """Return the same nest with its leaves replaced; named tuples and kinds of dict stay what they are."""
    if isinstance(nested, dict):
        result: Any = copy.copy(nested)
        for key, item in nested.items():
            result[key] = rebuilt(item, values)
        return result
    if isinstance(nested, list | tuple):
        items = [rebuilt(item, values) for item in nested]
        return type(nested)(*items) if hasattr(nested, "_fields") else type(nested)(items)
    return next(values)


def as_list(value: Any) -> list[Any]:
    """Return a list of what may be given alone, in a list or tuple, or not at all."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
