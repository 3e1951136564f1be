"""Keras' loss functions: one loss per example, or reduced where that is asked for.

All take (y_true, y_pred) in Keras' order. `y_pred` is what gradients go to; `y_true` is constant.

`y_true` and `y_pred` have one shape; as in Keras a last axis of length one may be missing in either. They
are not broadcast any further, which in Keras makes errors in shapes go unnoticed. A vector is one number
per example (Keras averages it, as if it were one example with many features).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distopt import ops
from distopt.backend import namespace
from distopt.communicators import Communicator
from distopt.losses.reduction import Reduction, compute_weighted_loss
from distopt.tape import Tensor
from distopt.variables import Operand, value_of

__all__ = [
    "binary_crossentropy",
    "categorical_crossentropy",
    "mean_absolute_error",
    "mean_squared_error",
    "sparse_categorical_crossentropy",
]

_EPSILON = 1e-7
"""Keras' backend.epsilon(): probabilities are kept this far from 0 and 1."""


def mean_squared_error(
    y_true: Any,
    y_pred: Any,
    *,
    sample_weight: Any = None,
    reduction: str = Reduction.NONE,
    communicator: Communicator | None = None,
) -> Tensor:
    """Return the squared errors, averaged over the last axis.

    Args:
        y_true: wanted values, [examples, ...].
        y_pred: predictions of the same shape.
        sample_weight: see `compute_weighted_loss`, as for the two that follow.
        reduction: see `compute_weighted_loss`.
        communicator: see `compute_weighted_loss`.

    Raises:
        ValueError: shapes that differ, and what `compute_weighted_loss` refuses.
    """
    target, predicted = _same_shape(y_true, y_pred)
    losses = _over_features(ops.square(ops.subtract(predicted, target)))
    return compute_weighted_loss(losses, sample_weight, reduction, communicator)


def mean_absolute_error(
    y_true: Any,
    y_pred: Any,
    *,
    sample_weight: Any = None,
    reduction: str = Reduction.NONE,
    communicator: Communicator | None = None,
) -> Tensor:
    """Return the absolute errors, averaged over the last axis.

    Arguments and errors are those of `mean_squared_error`.
    """
    target, predicted = _same_shape(y_true, y_pred)
    losses = _over_features(ops.absolute(ops.subtract(predicted, target)))
    return compute_weighted_loss(losses, sample_weight, reduction, communicator)


def binary_crossentropy(
    y_true: Any,
    y_pred: Any,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    *,
    sample_weight: Any = None,
    reduction: str = Reduction.NONE,
    communicator: Communicator | None = None,
) -> Tensor:
    """Return the cross-entropy of yes/no labels, averaged over the last axis.

    Args:
        y_true: 0 and 1 or probabilities, [examples, ...].
        y_pred: predicted probabilities of the same shape, or logits.
        from_logits: whether `y_pred` are logits: more exact and cheaper.
        label_smoothing: in [0, 1]; draws the labels so far towards one half.
        sample_weight: see `mean_squared_error`.
        reduction: see `mean_squared_error`.
        communicator: see `mean_squared_error`.

    Raises:
        ValueError: shapes that differ, a `label_smoothing` out of range, and what
            `compute_weighted_loss` refuses.
    """
    _check_smoothing(label_smoothing)
    target, predicted = _same_shape(y_true, y_pred)
    target = target * (1.0 - label_smoothing) + 0.5 * label_smoothing
    if from_logits:
        losses = ops.sigmoid_cross_entropy(predicted, labels=target)
    else:
        chance = _inside(predicted)
        yes = ops.multiply(ops.log(ops.add(chance, _EPSILON)), target)
        no = ops.multiply(ops.log(ops.add(ops.subtract(1.0, chance), _EPSILON)), 1.0 - target)
        losses = ops.negative(ops.add(yes, no))
    return compute_weighted_loss(_over_features(losses), sample_weight, reduction, communicator)


def categorical_crossentropy(
    y_true: Any,
    y_pred: Any,
    from_logits: bool = False,
    label_smoothing: float = 0.0,
    *,
    sample_weight: Any = None,
    reduction: str = Reduction.NONE,
    communicator: Communicator | None = None,
) -> Tensor:
    """Return the cross-entropy between distributions over classes.

    Args:
        y_true: one-hot labels or probabilities, [examples, ..., classes].
        y_pred: predicted probabilities of the same shape (scaled to a sum of 1), or logits.
        from_logits: whether `y_pred` are logits: more exact and cheaper.
        label_smoothing: in [0, 1]; how much of the labels is spread over all classes.
        sample_weight: see `mean_squared_error`.
        reduction: see `mean_squared_error`.
        communicator: see `mean_squared_error`.

    Raises:
        ValueError: shapes that differ or have no axis of classes, a `label_smoothing` out of range, and
            what `compute_weighted_loss` refuses.
    """
    _check_smoothing(label_smoothing)
    target, predicted = _same_shape(y_true, y_pred)
    shape = predicted.value.shape
    if len(shape) < 2:
        raise ValueError(f"y_pred must be [examples, ..., classes], got shape {shape}")
    target = target * (1.0 - label_smoothing) + label_smoothing / shape[-1]
    if from_logits:
        rows = ops.reshape(predicted, shape=(_rows(shape), shape[-1]))
        flat = ops.softmax_cross_entropy(rows, labels=target.reshape(rows.shape), reduction="none")
        losses = ops.reshape(flat, shape=shape[:-1])
    else:
        chance = ops.divide(predicted, ops.reduce_sum(predicted, axis=-1, keepdims=True))
        terms = ops.multiply(ops.log(_inside(chance)), target)
        losses = ops.negative(ops.reduce_sum(terms, axis=-1))
    return compute_weighted_loss(losses, sample_weight, reduction, communicator)


def sparse_categorical_crossentropy(
    y_true: Any,
    y_pred: Any,
    from_logits: bool = False,
    *,
    sample_weight: Any = None,
    reduction: str = Reduction.NONE,
    communicator: Communicator | None = None,
) -> Tensor:
    """Return the cross-entropy of class numbers.

    Args:
        y_true: class numbers, [examples, ...] or with a last axis of length one.
        y_pred: predicted probabilities [examples, ..., classes] (scaled to a sum of 1), or logits.
        from_logits: whether `y_pred` are logits: more exact and cheaper.
        sample_weight: see `mean_squared_error`.
        reduction: see `mean_squared_error`.
        communicator: see `mean_squared_error`.

    Raises:
        ValueError: shapes that don't fit, a class out of range, and what `compute_weighted_loss` refuses.
    """
    predicted = y_pred if isinstance(y_pred, Operand) else Tensor(_floats(y_pred))
    shape = predicted.value.shape
    labels = namespace(predicted.value).asarray(value_of(y_true))
    if labels.ndim == len(shape) and labels.shape[-1] == 1:
        labels = labels.reshape(labels.shape[:-1])
    if len(shape) < 2 or labels.shape != shape[:-1]:
        raise ValueError(
            f"y_pred must be [examples, ..., classes] and y_true [examples, ...], "
            f"got {shape} and {labels.shape}"
        )
    labels = labels.astype(np.int64).reshape(-1)
    rows = ops.reshape(predicted, shape=(_rows(shape), shape[-1]))
    logits = rows if from_logits else ops.log(_inside(rows))
    flat = ops.sparse_softmax_cross_entropy(logits, labels=labels, reduction="none")
    losses = ops.reshape(flat, shape=shape[:-1])
    return compute_weighted_loss(losses, sample_weight, reduction, communicator)


def _same_shape(y_true: Any, y_pred: Any) -> tuple[Any, Operand]:
    """Return the labels as an array of the predictions' type, and the predictions, in one shape."""
    predicted = y_pred if isinstance(y_pred, Operand) else Tensor(_floats(y_pred))
    value = predicted.value
    target = namespace(value).asarray(value_of(y_true), dtype=value.dtype)
    if target.ndim == value.ndim + 1 and target.shape[-1] == 1:
        target = target.reshape(target.shape[:-1])
    elif value.ndim == target.ndim + 1 and value.shape[-1] == 1:
        target = target.reshape((*target.shape, 1))
    if target.shape != value.shape:
        raise ValueError(f"y_true has shape {target.shape}, y_pred {value.shape}; they must be equal")
    return target, predicted


def _floats(value: Any) -> Any:
    value = value_of(value)
    return value if hasattr(value, "dtype") else np.asarray(value, np.float32)


def _over_features(losses: Tensor) -> Tensor:
    """Average over the last axis; a vector has no features."""
    return ops.reduce_mean(losses, axis=-1) if losses.ndim > 1 else losses


def _inside(chance: Any) -> Tensor:
    return ops.minimum(ops.maximum(chance, _EPSILON), 1.0 - _EPSILON)


def _rows(shape: tuple[int, ...]) -> int:
    # Not -1, which is ambiguous for an empty batch.
    return int(np.prod(shape[:-1]))


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}. 0.1 is usual.")
