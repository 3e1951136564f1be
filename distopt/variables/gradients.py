"""Gradients of variables, dense or sparse: sums, and conversion to the variable's kind of array."""

from __future__ import annotations

from typing import Any

from distopt.backend import Array
from distopt.variables.operand import Operand
from distopt.variables.slices import IndexedSlices, concatenated, value_of
from distopt.variables.variable import Variable

__all__ = ["add_gradients", "adopted_gradient", "dense_gradient"]


_REFUSAL = "Gradient must be convertible to an array or IndexedSlices, or None; for variable"


def adopted_gradient(gradient: Any, variable: Any) -> Any:
    """Return a gradient of another library as an array or slices, see `value_of`; Tensors stay Tensors.

    Raises:
        TypeError: its memory can't be read; the message names the variable.
    """
    if isinstance(gradient, Operand):
        return gradient
    try:
        return value_of(gradient)
    except TypeError as error:
        raise TypeError(f"{_REFUSAL} {getattr(variable, 'name', variable)!r}: {error}") from error


def add_gradients(first: Any, second: Any) -> Any:
    """Return the sum of two gradients of one variable in new memory: dense, unless both are slices."""
    if isinstance(first, IndexedSlices) and isinstance(second, IndexedSlices):
        return concatenated([first, second])
    dense = [g.to_dense() if isinstance(g, IndexedSlices) else g for g in (first, second)]
    return dense[0] + dense[1]


def dense_gradient(gradient: Any, variable: Variable, shape: tuple[int, ...] | None = None) -> Array:
    """Return a gradient as an array of its variable's shape, dtype and device; copies only if needed.

    Args:
        gradient: array, number, IndexedSlices, or a list of numbers.
        variable: whose gradient it is.
        shape: expected; None is the variable's.

    Raises:
        TypeError: it is no array, number or IndexedSlices, or complex.
        ValueError: its shape differs from the variable's.
    """
    given = value_of(gradient)
    given = given.to_dense() if isinstance(given, IndexedSlices) else given
    try:
        if getattr(given, "dtype", variable.dtype).kind == "c":
            raise TypeError("half of a complex gradient would be lost")
        array = variable.device.asarray(given, variable.dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{_REFUSAL} {variable.name!r} got {type(gradient).__name__}") from error
    if array.shape != (variable.shape if shape is None else shape):
        raise ValueError(
            f"the gradient of variable {variable.name!r} has shape {array.shape}, "
            f"the variable has {variable.shape}"
        )
    return array
