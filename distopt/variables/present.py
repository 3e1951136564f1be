"""The present number of what may be one, or say it when asked."""

from __future__ import annotations

from typing import Any

__all__ = ["number_now"]


def number_now(value: Any) -> float:
    """Return a number as a float.

    Args:
        value: number, Variable or Tensor without axes, or a callable without arguments that returns one.
    """
    given: Any = value() if callable(value) else value
    return float(given)
