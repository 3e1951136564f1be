"""Checks of sizes that several layers make."""

from __future__ import annotations

__all__ = ["check_positive"]


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless a size is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
