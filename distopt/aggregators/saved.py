"""Gradients as named arrays in a checkpoint, for aggregators that hold some between steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Pair
from distopt.backend import Array, asnumpy
from distopt.variables import IndexedSlices, Variable

__all__ = ["gradients_from_arrays", "gradients_to_arrays"]


def gradients_to_arrays(pairs: Iterable[Pair]) -> dict[str, Array]:
    """Return NumPy copies of gradients, as "gradient/w", "rows/w" with "places/w", or "none/w"."""
    found: dict[str, Array] = {}
    for gradient, variable in pairs:
        if isinstance(gradient, IndexedSlices):
            found[f"rows/{variable.name}"] = np.array(asnumpy(gradient.values))
            found[f"places/{variable.name}"] = np.array(asnumpy(gradient.indices))
        elif gradient is not None:
            found[f"gradient/{variable.name}"] = np.array(asnumpy(gradient))
        else:
            found[f"none/{variable.name}"] = np.array(0, np.int64)
    return found


def gradients_from_arrays(arrays: Mapping[str, Array], variables: Sequence[Variable]) -> list[Pair]:
    """Return the pairs that `gradients_to_arrays` was given; dense ones lie in the arena of variables in one.

    Args:
        arrays: what it gave, nothing else.
        variables: among which those of the pairs are.

    Raises:
        ValueError: a variable is missing or has another shape.
    """
    left = dict(arrays)
    found = [
        (_gradient(variable, left), variable)
        for variable in variables
        if any(f"{kind}/{variable.name}" in left for kind in ("gradient", "rows", "none"))
    ]
    if left:
        raise ValueError(
            f"the saved state of the aggregator has {', '.join(sorted(left)[:3])}, but this model has no "
            "such variable; use the model and the aggregator that the checkpoint was written with"
        )
    return found


def _gradient(variable: Variable, left: dict[str, Array]) -> Any:
    if left.pop(f"none/{variable.name}", None) is not None:
        return None
    device = variable.device
    if f"rows/{variable.name}" in left:
        rows, places = left.pop(f"rows/{variable.name}"), left.pop(f"places/{variable.name}")
        return IndexedSlices(device.asarray(rows, variable.dtype), device.asarray(places), variable.shape)
    given = left.pop(f"gradient/{variable.name}")
    if given.shape != variable.shape:
        raise ValueError(
            f"the saved gradient of {variable.name!r} has shape {given.shape}, the variable has "
            f"{variable.shape}; use the model that the checkpoint was written with"
        )
    if variable.gradient is None:
        return device.asarray(given, variable.dtype)
    variable.gradient[...] = device.asarray(given, variable.dtype)
    return variable.gradient
