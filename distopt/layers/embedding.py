"""Tables of vectors, looked up by integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distopt import initializers, ops
from distopt.layers.checks import check_positive
from distopt.layers.layer import MODEL_COLLECTIONS, Call, GetVariable, Initializer, Layer, apply_in_scope
from distopt.scopes import VariableScope, add_arg_scope
from distopt.tape import Tensor
from distopt.variables import Operand, Variable

__all__ = ["Embedding", "embedding"]


class Embedding(Layer):
    """Rows of a table, by their numbers; the gradient by the table is an `IndexedSlices`.

    Its variable is "name/embeddings" [rows, units].

    Args:
        rows: how many vectors there are.
        units: their length.
        embeddings_initializer: of the table; None for uniform over +-0.05 (Keras').
        embeddings_regularizer: penalty on the whole table, which makes its gradient dense.
        trainable: whether the table is trained.
        dtype: of the table.
        name: of the layer.

    Raises:
        ValueError: a size below 1.
    """

    default_name = "embedding"

    def __init__(
        self,
        rows: int,
        units: int,
        *,
        embeddings_initializer: Initializer | None = None,
        embeddings_regularizer: Any = None,
        trainable: bool = True,
        dtype: Any = np.float32,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_positive("rows", rows)
        check_positive("units", units)
        self.rows, self.units = rows, units
        self._dtype = dtype
        self._table = {
            "initializer": embeddings_initializer or initializers.RandomUniform(-0.05, 0.05),
            "regularizer": embeddings_regularizer,
            "trainable": trainable,
        }

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return the table."""
        size = (self.rows, self.units)
        return {
            "embeddings": get("embeddings", size, self._dtype, collections=MODEL_COLLECTIONS, **self._table)
        }

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the rows [..., units] of integers [...].

        Raises:
            ValueError: a number is no row's, or no integer.
        """
        return ops.gather(variables["embeddings"], indices=x.value if isinstance(x, Operand) else x)


@add_arg_scope
def embedding(
    indices: Any,
    rows: int,
    units: int,
    *,
    embeddings_initializer: Initializer | None = None,
    embeddings_regularizer: Any = None,
    trainable: bool = True,
    dtype: Any = np.float32,
    name: str | VariableScope | None = None,
    reuse: Any = None,
) -> Tensor:
    """Return rows of a table, by their numbers.

    Arguments are those of `Embedding`, and: `indices` are integers [...], 0 to rows - 1; `name` is that of
    the variable scope (or the scope), "embedding", made unique, when None; `reuse` is the variable scope's.
    """
    layer = Embedding(
        rows,
        units,
        embeddings_initializer=embeddings_initializer,
        embeddings_regularizer=embeddings_regularizer,
        trainable=trainable,
        dtype=dtype,
    )
    return apply_in_scope(layer, np.asarray(indices) if isinstance(indices, list) else indices, name, reuse)
