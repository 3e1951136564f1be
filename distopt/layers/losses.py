"""The collections of losses: this step's losses, and what regularizers add to them.

Losses are Tensors, so they belong to a step: within `Graph.step` the collection LOSSES begins empty.
Regularizers given to variables are there in every step; their penalties are computed when asked for, at
the variables' values of that moment, and recorded on the open tapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distopt import ops
from distopt.backend import current_device, device_of
from distopt.regularizers import Regularizer, no_regularizer
from distopt.scopes import GraphKeys, RegularizationLoss, add_to_collections, get_collection
from distopt.tape import Tensor
from distopt.variables import Operand

__all__ = [
    "add_loss",
    "apply_regularization",
    "get_losses",
    "get_regularization_loss",
    "get_total_loss",
    "regularization_tensors",
]


def add_loss(loss: Tensor, loss_collection: str | None = GraphKeys.LOSSES) -> None:
    """Add a loss to a collection; None for the collection adds it nowhere."""
    if loss_collection is not None:
        add_to_collections(loss_collection, loss)


def get_losses(scope: str | None = None, loss_collection: str = GraphKeys.LOSSES) -> list[Tensor]:
    """Return the losses of this step.

    Args:
        scope: only those whose names begin with a match of this regular expression.
        loss_collection: name of the collection.
    """
    return get_collection(loss_collection, scope)


def regularization_tensors(scope: str | None = None) -> list[Tensor]:
    """Return the regularisation losses at the present values: one per regularized variable, and those added.

    Args:
        scope: only those whose names begin with a match of this regular expression.
    """
    return [
        ops.regularization_loss(loss.variable, regularizer=loss.regularizer)
        if isinstance(loss, RegularizationLoss)
        else loss
        for loss in get_collection(GraphKeys.REGULARIZATION_LOSSES, scope)
    ]


def get_regularization_loss(scope: str | None = None, name: str = "total_regularization_loss") -> Tensor:
    """Return the sum of the regularisation losses at the present values; 0 if there are none.

    It doesn't depend on examples. Where gradients are sums over examples that are divided by the size of
    the global batch, multiply it by this replica's number of examples, as the Trainer does; where each of
    N replicas adds it whole, divide it by N.

    Args:
        scope: only those whose names begin with a match of this regular expression.
        name: of the result.
    """
    losses = regularization_tensors(scope)
    return ops.add_n(losses, name=name) if losses else ops.identity(current_device().zeros(()), name=name)


def get_total_loss(
    add_regularization_losses: bool = True, name: str = "total_loss", scope: str | None = None
) -> Tensor:
    """Return the sum of this step's losses.

    Args:
        add_regularization_losses: add the regularisation losses too.
        name: of the result.
        scope: only losses whose names begin with a match of this regular expression.

    Raises:
        ValueError: there are no losses, or their shapes differ.
    """
    losses = get_losses(scope)
    if add_regularization_losses:
        losses = losses + regularization_tensors(scope)
    if not losses:
        raise ValueError(
            "inputs must be a list of at least one Tensor: there are no losses"
            + ("" if scope is None else f" in scope {scope!r}")
            + " in this step. Add them with add_loss, or to the collection LOSSES."
        )
    return ops.add_n(losses, name=name)


def apply_regularization(
    regularizer: Regularizer | Callable[[Any], Any], weights_list: Sequence[Any] | None = None
) -> Tensor:
    """Return the summed penalty on weights, and add it to REGULARIZATION_LOSSES for this step.

    Args:
        regularizer: a `Regularizer`, or a function that makes a scalar of a variable by `ops`; None from
            it counts as 0.
        weights_list: variables or Tensors; the collection WEIGHTS when None or empty.

    Raises:
        ValueError: there are no weights, or the regularizer doesn't return scalars.
    """
    weights = list(weights_list or get_collection(GraphKeys.WEIGHTS))
    if not weights:
        raise ValueError("No weights to regularize: weights_list is empty, and so is the collection WEIGHTS.")
    penalties = [_penalty(regularizer, weight) for weight in weights]
    total = ops.add_n(penalties, name="apply_regularization")
    add_to_collections(GraphKeys.REGULARIZATION_LOSSES, total)
    return total


def _penalty(regularizer: Any, weight: Any) -> Tensor:
    if isinstance(regularizer, Regularizer):
        if regularizer is no_regularizer:
            return _constant(0.0, weight)
        return ops.regularization_loss(weight, regularizer=regularizer)
    found = regularizer(weight)
    penalty = found if isinstance(found, Tensor) else _constant(0.0 if found is None else found, weight)
    if penalty.ndim != 0:
        raise ValueError(
            f"regularizer must return a scalar Tensor instead of a Tensor with rank {penalty.ndim}."
        )
    return penalty


def _constant(value: Any, weight: Operand) -> Tensor:
    """Return a number as a Tensor of the weight's dtype, where the weight is."""
    return ops.identity(device_of(weight.value).asarray(value, weight.value.dtype))
