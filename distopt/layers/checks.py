"""Checks of sizes that several layers make."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["check_floating", "check_positive"]


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless a size is at least 1."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_floating(layer: str, dtype: Any) -> None:
    """Raise TypeError for an input of another kind than floating point: the weights take its dtype."""
    if np.dtype(dtype).kind not in "fV":  # "V" is what ml_dtypes' bfloat16 shows
        raise TypeError(f"{layer} needs floating-point input, got {dtype}; convert it, as by ops.cast")
