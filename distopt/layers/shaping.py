"""Layers that change the shape alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt import ops
from distopt.layers.layer import Call, GetVariable, Layer
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["Flatten", "flatten"]


def flatten(x: Any) -> Tensor:
    """Return `x` [N, ...] as a matrix [N, features]."""
    features = 1
    for length in x.shape[1:]:
        features *= length
    return ops.reshape(x, shape=(x.shape[0], features))


class Flatten(Layer):
    """`flatten` as an object."""

    default_name = "flatten"

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return nothing: there are none."""
        return {}

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the matrix."""
        return flatten(x)
