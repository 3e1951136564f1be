"""What takes part in recorded arithmetic: the base of `Variable` and `Tensor`."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, asnumpy

__all__ = ["Operand", "differentiating", "operators"]

operators: dict[str, Callable[..., Any]] = {}
"""Name -> primitive for the Python operators; `distopt.ops` fills it (a lower level can't import it)."""


class _Differentiating(threading.local):
    primitive: str | None = None


differentiating = _Differentiating()
"""Whose gradient this thread is computing with Tensors, for second derivatives; set by the tape."""


class Operand:
    """What takes part in recorded arithmetic: `Variable` and `Tensor`. Operators give a `Tensor`.

    The operators and the methods `reshape`, `transpose`, `sum`, `astype` and `T` are NumPy's, so that a
    formula written with them alone serves arrays and operands alike.
    """

    # NumPy arrays on the left of an operator leave the operation to us.
    __array_ufunc__ = None
    __slots__ = ()
    value: Array

    def __add__(self, other: Any) -> Any:
        return operators["add"](self, other)

    def __radd__(self, other: Any) -> Any:
        return operators["add"](other, self)

    def __sub__(self, other: Any) -> Any:
        return operators["subtract"](self, other)

    def __rsub__(self, other: Any) -> Any:
        return operators["subtract"](other, self)

    def __mul__(self, other: Any) -> Any:
        return operators["multiply"](self, other)

    def __rmul__(self, other: Any) -> Any:
        return operators["multiply"](other, self)

    def __truediv__(self, other: Any) -> Any:
        return operators["divide"](self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return operators["divide"](other, self)

    def __pow__(self, other: Any) -> Any:
        return operators["power"](self, other)

    def __rpow__(self, other: Any) -> Any:
        return operators["power"](other, self)

    def __matmul__(self, other: Any) -> Any:
        return operators["matmul"](self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return operators["matmul"](other, self)

    def __neg__(self) -> Any:
        return operators["negative"](self)

    def __abs__(self) -> Any:
        return operators["absolute"](self)

    # What is asked of values, without a record: as NumPy's arrays answer.

    def __bool__(self) -> bool:
        return bool(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return operator.index(asnumpy(self.value)[()])

    def __format__(self, specification: str) -> str:
        return format(asnumpy(self.value)[()] if specification else str(self), specification)

    def __round__(self, digits: int = 0) -> float:
        return round(float(self.value), digits)

    def __lt__(self, other: Any) -> Any:
        return self.value < _plain(other)

    def __le__(self, other: Any) -> Any:
        return self.value <= _plain(other)

    def __gt__(self, other: Any) -> Any:
        return self.value > _plain(other)

    def __ge__(self, other: Any) -> Any:
        return self.value >= _plain(other)

    def __mod__(self, other: Any) -> Any:
        return _integers(self, "%") % _plain(other)

    def __floordiv__(self, other: Any) -> Any:
        return _integers(self, "//") // _plain(other)

    def __getitem__(self, key: Any) -> Any:
        return operators["slice_of"](self, key=key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if differentiating.primitive is not None:
            raise TypeError(
                f"the gradient of primitive {differentiating.primitive!r} makes a NumPy array of a "
                f"{type(self).__name__}, and would lose what an outer tape needs"
            )
        return np.array(asnumpy(self.value), dtype=dtype, copy=copy)

    @property
    def T(self) -> Any:  # noqa: N802 (NumPy's name)
        """The operand with its axes reversed, as a Tensor."""
        return operators["transpose"](self)

    def reshape(self, *shape: Any) -> Any:
        """Return a Tensor of another shape, given as one tuple or as several lengths."""
        lengths = shape[0] if len(shape) == 1 and not hasattr(shape[0], "__index__") else shape
        return operators["reshape"](self, shape=tuple(lengths))

    def transpose(self, axes: Sequence[int] | None = None) -> Any:
        """Return a Tensor with the axes in another order; reversed when `axes` is None."""
        return operators["transpose"](self, axes=axes)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Any:
        """Return the sum over some axes, or over all, as a Tensor."""
        return operators["reduce_sum"](self, axis=axis, keepdims=keepdims)

    def astype(self, dtype: Any) -> Any:
        """Return a Tensor with elements of another dtype."""
        return operators["cast"](self, dtype=dtype)


def _integers(operand: Operand, operation: str) -> Array:
    if operand.value.dtype.kind not in "iub":
        raise TypeError(
            f"{operation} is for integers, here {operand.value.dtype}: its gradient would be lost. Take "
            f"`value.numpy() {operation} ...` for a number"
        )
    return operand.value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Operand) else value
