"""What is asked of the arrays, indices and scalars of a rule's call, each with its message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distopt.backend import Array, namespace
from distopt.elementwise.formula import Formula

__all__ = ["DTYPES", "check_arrays", "check_indices", "dtype_name", "kind_of", "number"]

DTYPES = ("float16", "float32", "float64")
"""The types of arrays that rules take; float16 is computed in float32."""


def check_arrays(rule: str, used: Mapping[str, Array], formula: Formula) -> None:
    """Check that arrays are of one kind, dtype and device, and can be updated in place."""
    first_name, first = next(iter(used.items()))
    xp = namespace(first)
    for name, array in used.items():
        if not (isinstance(array, np.ndarray) if xp is np else namespace(array) is xp):
            if kind_of(array) == "other":
                raise TypeError(
                    f"{rule}: {name} must be a NumPy or CuPy array, got {type(array).__name__}: "
                    f"{array!r:.60}."
                )
            raise TypeError(
                f"{rule}: {name} is a {kind_of(array)} array, but {first_name} is a "
                f"{kind_of(first)} array. Keep all on one device."
            )
        if array.dtype != first.dtype:
            raise ValueError(
                f"{rule}: {name} is {array.dtype}, but {first_name} is {first.dtype}. Cast one of them."
            )
        if xp is not np and array.device != first.device:
            raise ValueError(f"{rule}: {name} is on {array.device}, but {first_name} is on {first.device}.")
        if name in formula.results:
            if not array.flags.c_contiguous:
                raise ValueError(
                    f"{rule}: {name} is updated in place and must be C-contiguous; it has shape "
                    f"{array.shape} and strides {array.strides}."
                )
            if xp is np and not array.flags.writeable:
                raise ValueError(f"{rule}: {name} is updated in place, but it is read-only.")
    dtype_name(rule, first.dtype)
    names = list(used)
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            written = name in formula.results or other in formula.results
            if written and xp.may_share_memory(used[name], used[other]):
                raise ValueError(
                    f"{rule}: {name} and {other} share memory, and one of them is updated. Copy one."
                )


def check_indices(rule: str, rows: Array, height: int) -> None:
    """Check that indices (there is at least one) are inside the tables and all different."""
    ordered = np.sort(rows)
    if ordered[0] < 0 or ordered[-1] >= height:
        wrong = ordered[0] if ordered[0] < 0 else ordered[-1]
        raise IndexError(f"{rule}.rows: index {wrong} is outside tables of {height} rows.")
    same = ordered[1:] == ordered[:-1]
    if same.any():
        raise ValueError(
            f"{rule}.rows: row {ordered[1:][same][0]} is named twice. Sum the gradients of equal "
            "indices first; an update of the same row twice would lose one of the two."
        )


def dtype_name(rule: str, dtype: np.dtype[Any]) -> str:
    """Return a dtype's name if rules work on it."""
    for name in DTYPES:
        if dtype == np.dtype(name):
            return name
    raise ValueError(f"{rule}: arrays must be {', '.join(DTYPES)}, got {dtype}.")


def kind_of(array: Any) -> str:
    """Return "NumPy", "CuPy" or "other", for messages."""
    if namespace(array) is not np:
        return "CuPy"
    return "NumPy" if isinstance(array, np.ndarray) else "other"


def number(rule: str, name: str, value: Any) -> float:
    """Return a scalar as a Python float."""
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        return float(value)
    raise TypeError(
        f"{rule}: the scalar {name} must be a number, got {type(value).__name__}: {value!r:.60}. "
        "Values that live on a GPU go into `control`."
    )
