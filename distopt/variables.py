"""Variable, IndexedSlices and Arena: the values that are trained, and the flat memory they live in.

An `Arena` lays all dense trainable values of a replica into one flat array per dtype, and their gradients
into another of the same layout. A `Variable` in an arena is a named, shaped view. Communication buckets,
the optimizer's formula, checksums and checkpoints then work on one array instead of on many.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distopt.backend import Array, Device, asnumpy, current_device, device_of, namespace

__all__ = [
    "Arena",
    "IndexedSlices",
    "Operand",
    "Slab",
    "Variable",
    "add_gradients",
    "concatenated",
    "dense_gradient",
    "differentiating",
    "value_of",
]

_ALIGNMENT_BYTES = 256

_numbers = itertools.count()

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
        self.number = next(_numbers)
        self.name = name or "Variable"
        self.trainable = trainable
        self.constraint = constraint
        self.device = device or current_device()
        self.value: Array = self.device.asarray(_initial_array(initial_value, dtype, self.name))
        self.gradient: Array | None = None
        self.slab: Slab | None = None
        self.start = 0

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

    def read_value(self) -> Array:
        """Return the value's array itself, not a copy."""
        return self.value

    def assign(self, value: Any) -> Variable:
        """Replace the value.

        Raises:
            ValueError: its shape differs from the variable's.
        """
        array = value.value if isinstance(value, Operand) else value
        given = np.shape(array)
        if given != self.shape:
            raise ValueError(
                f"variable {self.name!r} has shape {self.shape}, the value to assign has {given}"
            )
        self.value[...] = self.device.asarray(array, self.dtype)
        return self

    def assign_add(self, delta: Any) -> Variable:
        """Add `delta`, of the variable's shape or broadcast to it, to the value."""
        self.value += self.device.asarray(value_of(delta), self.dtype)
        return self

    def assign_sub(self, delta: Any) -> Variable:
        """Subtract `delta`, of the variable's shape or broadcast to it, from the value."""
        self.value -= self.device.asarray(value_of(delta), self.dtype)
        return self

    def __float__(self) -> float:
        return float(self.numpy())

    def __repr__(self) -> str:
        return f"<Variable {self.name!r} shape={self.shape} dtype={self.dtype} device={self.device}>"


def value_of(value: Any) -> Any:
    """Return the array of a Variable or Tensor, slices of Tensors as slices of arrays, all else as it is."""
    if isinstance(value, IndexedSlices):
        if not isinstance(value.values, Operand):
            return value
        return IndexedSlices(value.values.value, value.indices, value.dense_shape)
    return value.value if isinstance(value, Operand) else value


def _initial_array(value: Any, dtype: Any, name: str) -> Array:
    value = value_of(value)
    keeps_dtype = hasattr(value, "dtype")
    array = asnumpy(value) if keeps_dtype else np.asarray(value)
    if dtype is None and not keeps_dtype:
        dtype = {"f": np.float32, "i": np.int32}.get(array.dtype.kind)
    array = np.array(array, dtype=dtype)  # a copy: the variable owns its memory
    # Kind "V" is what ml_dtypes' bfloat16 shows.
    if array.dtype.kind not in "fiubcV":
        raise TypeError(
            f"initial value of variable {name!r} must be numeric, got {value!r} of dtype {array.dtype}"
        )
    return array


class IndexedSlices:
    """Rows of a larger dense array: the gradient of a gather. Rows may repeat; they add up.

    Args:
        values: array [n, ...]: the rows. A Tensor that a tape recorded stays one, for second derivatives;
            `value_of(slices)` has arrays in any case.
        indices: integer array [n]: which row of the dense array each is.
        dense_shape: shape of the dense array; None where it isn't known.

    Raises:
        ValueError: the shapes don't fit, or an index is out of range.
    """

    __slots__ = ("dense_shape", "indices", "values")

    def __init__(self, values: Any, indices: Any, dense_shape: Sequence[int] | None = None) -> None:
        self.values: Array = values if _is_recorded(values) else _as_array(values)
        self.indices: Array = _as_array(indices)
        self.dense_shape = None if dense_shape is None else tuple(int(n) for n in dense_shape)
        if self.indices.ndim != 1 or self.indices.dtype.kind not in "iu":
            raise ValueError(
                "indices of IndexedSlices must be a vector of integers, got "
                f"shape {self.indices.shape} of {self.indices.dtype}"
            )
        if self.values.ndim < 1 or len(self.values) != len(self.indices):
            raise ValueError(
                f"IndexedSlices has {len(self.indices)} indices, but values of shape "
                f"{self.values.shape}; the first axes must be equal"
            )
        if self.dense_shape is not None:
            if self.values.shape[1:] != self.dense_shape[1:]:
                raise ValueError(
                    f"rows of shape {self.values.shape[1:]} don't fit dense_shape {self.dense_shape}"
                )
            _check_range(self.indices, self.dense_shape[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values' elements."""
        return self.values.dtype

    def deduplicated(self) -> IndexedSlices:
        """Return slices with every index once, in increasing order, repeated rows summed."""
        xp = namespace(self.values, self.indices)
        unique, position = xp.unique(self.indices, return_inverse=True)
        if isinstance(self.values, Operand):
            rows = operators["scatter_rows"](self.values, indices=position.reshape(-1), rows=len(unique))
            return IndexedSlices(rows, unique, self.dense_shape)
        if len(unique) == len(self.indices):
            order = xp.argsort(self.indices)
            return IndexedSlices(self.values[order], unique, self.dense_shape)
        summed = xp.zeros((len(unique), *self.values.shape[1:]), self.values.dtype)
        xp.add.at(summed, position.reshape(-1), self.values)
        return IndexedSlices(summed, unique, self.dense_shape)

    def to_dense(self) -> Array:
        """Return the dense array, zeros in the rows not listed.

        Raises:
            ValueError: `dense_shape` is not known.
        """
        if self.dense_shape is None:
            raise ValueError("IndexedSlices without dense_shape can't become a dense array")
        if isinstance(self.values, Operand):
            return operators["scatter_rows"](self.values, indices=self.indices, rows=self.dense_shape[0])
        xp = namespace(self.values)
        dense: Array = xp.zeros(self.dense_shape, self.values.dtype)
        xp.add.at(dense, self.indices, self.values)
        return dense

    def __repr__(self) -> str:
        return (
            f"IndexedSlices(values of shape {self.values.shape} {self.values.dtype}, "
            f"{len(self.indices)} indices, dense_shape={self.dense_shape})"
        )


def _is_recorded(value: Any) -> bool:
    return getattr(value, "node", None) is not None


def _as_array(value: Any) -> Array:
    value = value_of(value)
    return value if hasattr(value, "dtype") else np.asarray(value)


def _check_range(indices: Array, rows: int) -> None:
    if device_of(indices).kind == "cuda" or not len(indices):
        return  # a look at device values would make the host wait
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= rows:
        raise ValueError(f"indices go from {low} to {high}, but there are rows 0 to {rows - 1} only")


def add_gradients(first: Any, second: Any) -> Any:
    """Return the sum of two gradients of one variable in new memory: dense, unless both are slices."""
    if isinstance(first, IndexedSlices) and isinstance(second, IndexedSlices):
        return concatenated([first, second])
    dense = [g.to_dense() if isinstance(g, IndexedSlices) else g for g in (first, second)]
    return dense[0] + dense[1]


def concatenated(slices: Sequence[IndexedSlices]) -> IndexedSlices:
    """Return the sum of slices of one dense array: all their rows, one after the other."""
    values: list[Any] = [part.values for part in slices]
    indices = [part.indices for part in slices]
    xp = namespace(*values, *indices)
    if any(isinstance(rows, Operand) for rows in values):
        joined = operators["concat"](*values)
    else:
        joined = xp.concatenate(values)
    return IndexedSlices(joined, xp.concatenate(indices), slices[0].dense_shape)


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
        raise TypeError(
            "Gradient must be convertible to an array or IndexedSlices, or None; "
            f"for variable {variable.name!r} got {type(gradient).__name__}"
        ) from error
    if array.shape != (variable.shape if shape is None else shape):
        raise ValueError(
            f"the gradient of variable {variable.name!r} has shape {array.shape}, "
            f"the variable has {variable.shape}"
        )
    return array


@dataclass(eq=False)
class Slab:
    """The part of an arena that holds one dtype.

    Attributes:
        values: flat array of all values, padding between segments zero.
        gradients: flat array of the same layout.
        variables: in the order of their segments.
        number: grows with each slab made in this process, so it orders slabs alike on all ranks.
    """

    values: Array
    gradients: Array
    variables: list[Variable]
    number: int = field(default_factory=_numbers.__next__)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.values.dtype

    def end(self, variable: Variable) -> int:
        """Where the segment of `variable` ends, its padding included."""
        return variable.start + _padded(variable.size, self.dtype)


class Arena:
    """Flat memory for the values and the gradients of variables, one `Slab` per dtype.

    Segments stand in reverse order of creation: backward makes the last layer's gradients first, so the
    finished part of `gradients` is a prefix that grows. Each starts at a multiple of 256 bytes.
    The order of `variables` alone decides the layout, so ranks that build the same model have the same.

    Args:
        variables: in the order of their creation; their values move into the arena.
        device: where the arena lives; that of the first variable when not given.

    Raises:
        ValueError: no variables, two of one name, one that is in another arena already.
    """

    def __init__(self, variables: Iterable[Variable], device: Device | None = None) -> None:
        created = list(variables)
        if not created:
            raise ValueError("an arena needs at least one variable; got none")
        _check_members(created)
        self.device = device or created[0].device
        self.variables: list[Variable] = created[::-1]
        by_dtype: dict[np.dtype[Any], list[Variable]] = {}
        for variable in self.variables:
            by_dtype.setdefault(variable.dtype, []).append(variable)
        self.slabs = [self._lay_out(members) for members in by_dtype.values()]

    def _lay_out(self, members: list[Variable]) -> Slab:
        dtype = members[0].dtype
        total = sum(_padded(variable.size, dtype) for variable in members)
        slab = Slab(self.device.zeros(total, dtype), self.device.zeros(total, dtype), members)
        start = 0
        for variable in members:
            stop = start + variable.size
            view = slab.values[start:stop].reshape(variable.shape)
            view[...] = self.device.asarray(variable.value)
            variable.value = view
            variable.gradient = slab.gradients[start:stop].reshape(variable.shape)
            variable.slab, variable.start, variable.device = slab, start, self.device
            start = slab.end(variable)
        return slab

    @property
    def size(self) -> int:
        """Number of elements of all variables, padding not counted."""
        return sum(variable.size for variable in self.variables)

    def schema(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Return (name, shape, dtype) of each variable in the arena's order, to compare ranks by."""
        return [(v.name, v.shape, str(v.dtype)) for v in self.variables]


def _padded(size: int, dtype: np.dtype[Any]) -> int:
    per_line = _ALIGNMENT_BYTES // dtype.itemsize
    return -(-size // per_line) * per_line


def _check_members(variables: list[Variable]) -> None:
    seen: set[str] = set()
    for variable in variables:
        if variable.slab is not None:
            raise ValueError(f"variable {variable.name!r} is in another arena already")
        if variable.name in seen:
            raise ValueError(
                f"two variables are named {variable.name!r}; slots and checkpoints go by name, "
                "so give each its own"
            )
        seen.add(variable.name)
