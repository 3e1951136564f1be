"""Check arguments that count something."""

from __future__ import annotations

import operator
from typing import Any

__all__ = ["whole_number"]


def whole_number(value: Any, name: str, least: int) -> int:
    """Return a count as an int.

    Args:
        value: an int or an integer of NumPy.
        name: of the argument, with that of the class, as in "Accumulate's steps".
        least: the smallest that is allowed.

    Raises:
        TypeError: it is no whole number; True and False are none.
        ValueError: it is below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a whole number, at least {least}, got {value!r:.60}, a {type(value).__name__}"
        ) from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
