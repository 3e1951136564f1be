"""What optimizers with a rate for each layer share: norms, and rules whose scalars live on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distopt.backend import Array, namespace
from distopt.elementwise import Rule
from distopt.transforms import global_norm

__all__ = ["call", "norm", "scratch", "trust_ratio"]


def norm(values: Array) -> Any:
    """Return the Euclidean norm in float64: NumPy's scalar, or a GPU's array of rank 0.

    The order of summation is fixed and no BLAS is used, so that replicas get the same bits. The host
    doesn't wait for a GPU.
    """
    return global_norm([(values, None)])


def trust_ratio(numerator: Any, denominator: Any, *norms: Any) -> Any:
    """Return numerator / denominator where all norms are above 0, else 1; nothing is read on the host."""
    xp = namespace(numerator)
    usable = norms[0] > 0
    for other in norms[1:]:
        usable = usable & (other > 0)
    with np.errstate(invalid="ignore"):  # infinite over infinite is meant to be NaN
        return xp.where(usable, numerator / xp.where(usable, denominator, 1.0), 1.0)


def scratch(array: Array) -> Array:
    """Return memory of an array's shape and dtype on its device, not initialised."""
    return namespace(array).empty_like(array)


def call(
    rule: Rule,
    *arrays: Array | None,
    scalars: Mapping[str, float],
    per_layer: Mapping[str, Any],
    **options: Any,
) -> None:
    """Apply a rule, some of whose scalars were computed on the device and stay there.

    Args:
        rule: the formula.
        arrays: those of the rule.
        scalars: numbers of the host, for all the rule's scalars that aren't in `per_layer`.
        per_layer: numbers of the device, as `norm` gives them.
        options: those of the rule.
    """
    value = arrays[0]
    assert value is not None
    xp = namespace(value)
    control = xp.empty(len(rule.scalars), np.float64 if value.dtype == np.float64 else np.float32)
    with np.errstate(over="ignore"):  # a rate beyond float32 is infinite, as on a GPU
        for place, name in enumerate(rule.scalars):
            control[place : place + 1] = per_layer[name] if name in per_layer else scalars[name]
    rule(*arrays, control=control, **options)
