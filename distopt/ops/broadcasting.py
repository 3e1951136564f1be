"""Undo NumPy's broadcasting in a gradient; the one place where that is done."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["unbroadcast"]


def unbroadcast(gradient: Any, operand: Any) -> Any:
    """Sum `gradient` over the axes along which `operand` was repeated; returns the operand's shape."""
    shape = np.shape(operand)
    if np.shape(gradient) == shape:
        return gradient
    added = gradient.ndim - len(shape)
    repeated = tuple(added + axis for axis, length in enumerate(shape) if length == 1)
    summed = gradient.sum(axis=tuple(range(added)) + repeated, keepdims=True)
    return summed.reshape(shape)
