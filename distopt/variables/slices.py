"""IndexedSlices: the gradient of a gather."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, adopted, device_of, namespace
from distopt.variables.operand import Operand, operators

__all__ = ["IndexedSlices", "concatenated", "summed_rows", "value_of"]


def value_of(value: Any) -> Any:
    """Return the array of a Variable or Tensor, and slices of Tensors as slices of arrays.

    Arrays of other libraries become arrays of NumPy or CuPy on the same memory (`backend.adopted`), sparse
    tensors of PyTorch IndexedSlices. All else stays as it is.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, IndexedSlices):
        if not isinstance(value.values, Operand):
            return value
        return IndexedSlices(value.values.value, value.indices, value.dense_shape)
    if isinstance(value, Operand):
        return value.value
    return _rows_of(value) if getattr(value, "is_sparse", False) is True else adopted(value)


def _rows_of(tensor: Any) -> IndexedSlices:
    """Return a sparse tensor of PyTorch, as its sparse embeddings have for gradients, as slices."""
    tensor = tensor.coalesce()
    indices, values = adopted(tensor.indices()), adopted(tensor.values())
    if len(indices) != 1:
        raise TypeError(
            f"a sparse tensor with {len(indices)} sparse axes is no set of rows; pass tensor.to_dense()"
        )
    return IndexedSlices(values, indices[0], tuple(tensor.shape))


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

    def deduplicated(self, by_appearance: bool = False) -> IndexedSlices:
        """Return slices with every index once, repeated rows summed in their order.

        Args:
            by_appearance: order rows by the first appearance of their index, not by the index.
        """
        if not len(self.indices):
            return self
        xp = namespace(self.values, self.indices)
        unique, first, position = xp.unique(self.indices, return_index=True, return_inverse=True)
        if len(unique) == len(self.indices) and not isinstance(self.values, Operand):
            # No row repeats: they only have to be put in order.
            return self if by_appearance else IndexedSlices(self.values[first], unique, self.dense_shape)
        if by_appearance:
            order = xp.argsort(first)
            unique, position = unique[order], xp.argsort(order)[position.reshape(-1)]
        if isinstance(self.values, Operand):
            rows = operators["scatter_rows"](self.values, indices=position.reshape(-1), rows=len(unique))
            return IndexedSlices(rows, unique, self.dense_shape)
        summed = summed_rows(self.values, position.reshape(-1), len(unique))
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
        return summed_rows(self.values, self.indices, self.dense_shape[0])

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


def summed_rows(values: Array, places: Array, rows: int) -> Array:
    """Return an array of `rows` rows, each the sum of the values that have its place; others are 0.

    Every call with the same rows gives the same bits. CuPy's `add.at` doesn't: it adds in whatever order its
    threads come, and replicas would drift apart. So on a GPU rows are sorted by place and summed by
    a scan of log2(n) steps, for which the host doesn't wait.
    """
    xp = namespace(values)
    result: Array = xp.zeros((rows, *values.shape[1:]), values.dtype)
    if not len(places):
        return result
    if xp is np:
        np.add.at(result, places, values)
        return result
    return _scan_sums(xp, values, places, result)


def _scan_sums(xp: Any, values: Array, places: Array, result: Array) -> Array:
    order = xp.argsort(places, kind="stable")
    ordered, sums = places[order], values[order]
    distance = 1
    while distance < len(ordered):
        same = (ordered[distance:] == ordered[:-distance]).reshape(-1, *(1,) * (sums.ndim - 1))
        sums[distance:] += xp.where(same, sums[:-distance], xp.zeros((), sums.dtype))
        distance *= 2
    # The last row of a place has its sum. All write there, so the others go to a row that is cut off.
    last = xp.concatenate([ordered[1:] != ordered[:-1], xp.ones(1, bool)])
    padded = xp.zeros((len(result) + 1, *result.shape[1:]), result.dtype)
    padded[xp.where(last, ordered, len(result))] = sums
    return padded[:-1]


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
