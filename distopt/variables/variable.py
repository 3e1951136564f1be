"""Variable: a named value that training changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from distopt.backend import Array, Device, asnumpy, current_device
from distopt.variables.operand import Operand
from distopt.variables.slices import value_of

if TYPE_CHECKING:
    from distopt.variables.arena import Slab

__all__ = ["Variable", "numbers"]

numbers = itertools.count()
"""Numbers that grow with what is made in this process."""


class Variable(Operand):
    """A named value that training changes.

    Args:
        initial_value: number, array-like, or a callable without arguments that returns one. Python
            numbers and lists become float32 (int32 for integers); arrays keep their dtype.
        trainable: whether a tape watches it and a model's arena takes it in.
        name: for slots, checkpoints and messages; "Variable" when not given.
        dtype: NumPy dtype of the value; None keeps that of `initial_value`.
        constraint: callable array -> array of the same shape, applied after each update.
        device: where the value lives; the current device when not given.

    Attributes:
        value: the array, of shape `shape`: a view of the arena once the variable is in one.
        gradient: the view of the arena's gradients, or None outside an arena.
        version: grows when `assign...` or an optimizer changes the value, so that a tape notices.
        number: grows with each variable made in this process. Ranks that run the same program make their
            variables in the same order, so it orders variables alike on all of them.

    Raises:
        TypeError: the value is not numeric, or `constraint` is not callable.
    """

    __slots__ = (
        "__weakref__",
        "constraint",
        "device",
        "gradient",
        "name",
        "number",
        "slab",
        "start",
        "trainable",
        "value",
        "version",
    )

    def __init__(
        self,
        initial_value: Any,
        trainable: bool = True,
        name: str | None = None,
        dtype: Any = None,
        constraint: Callable[[Array], Any] | None = None,
        device: Device | None = None,
    ) -> None:
        if constraint is not None and not callable(constraint):
            raise TypeError(
                f"constraint of variable {name!r} must be callable (array -> array), got {constraint!r}"
            )
        if callable(initial_value) and not isinstance(initial_value, Operand):
            initial_value = initial_value()
        self.number = next(numbers)
        self.name = name or "Variable"
        self.trainable = trainable
        self.constraint = constraint
        self.device = device or current_device()
        self.value: Array = self.device.asarray(_initial_array(initial_value, dtype, self.name))
        self.gradient: Array | None = None
        self.slab: Slab | None = None
        self.start = 0
        self.version = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the value's axes."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the value's elements."""
        return self.value.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.value.size)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.value.ndim

    def numpy(self) -> Array:
        """Return a copy of the value as a NumPy array (waits for the GPU)."""
        return np.array(asnumpy(self.value))

    def assign(self, value: Any) -> Variable:
        """Replace the value.

        Raises:
            ValueError: its shape differs from the variable's.
        """
        array = value_of(value)
        if array is None:
            raise TypeError(f"the value to assign to variable {self.name!r} is None")
        given = np.shape(array)
        if given != self.shape:
            raise ValueError(
                f"variable {self.name!r} has shape {self.shape}, the value to assign has {given}"
            )
        self.value[...] = self.device.asarray(array, self.dtype)
        self.version += 1
        return self

    def assign_add(self, delta: Any) -> Variable:
        """Add `delta`, of the variable's shape or broadcast to it, to the value."""
        self.value += self.device.asarray(value_of(delta), self.dtype)
        self.version += 1
        return self

    def assign_sub(self, delta: Any) -> Variable:
        """Subtract `delta`, of the variable's shape or broadcast to it, from the value."""
        self.value -= self.device.asarray(value_of(delta), self.dtype)
        self.version += 1
        return self

    def __float__(self) -> float:
        return float(self.numpy())

    def __repr__(self) -> str:
        return f"<Variable {self.name!r} shape={self.shape} dtype={self.dtype} device={self.device}>"


def _initial_array(value: Any, dtype: Any, name: str) -> Array:
    value = value_of(value)
    keeps_dtype = hasattr(value, "dtype")
    array = asnumpy(value) if keeps_dtype else np.asarray(value)
    if dtype is None and not keeps_dtype:
        dtype = {"f": np.float32, "i": np.int32}.get(array.dtype.kind)
    # A copy in C's order: the variable owns its memory, and rules run over it flat.
    array = np.array(array, dtype=dtype, order="C")
    # Kind "V" is what ml_dtypes' bfloat16 shows.
    if array.dtype.kind not in "fiubcV":
        raise TypeError(
            f"initial value of variable {name!r} must be numeric, got {value!r} of dtype {array.dtype}"
        )
    return array
