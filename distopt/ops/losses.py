"""Losses, as sums over examples or per example: a rank does not know the global batch to divide by."""

from __future__ import annotations

from typing import Any

import numpy as np

from distopt.backend import namespace
from distopt.ops.arithmetic import exp, log, square
from distopt.ops.reductions import reduce_sum
from distopt.tape import Context, Tensor, primitive
from distopt.variables import value_of

__all__ = [
    "mean_squared_error",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "sparse_softmax_cross_entropy",
]


@primitive
def sparse_softmax_cross_entropy(
    context: Context, logits: Any, *, labels: Any, reduction: str = "sum"
) -> Any:
    """Return the cross-entropy between labels and the softmax of logits.

    Args:
        context: of the tape.
        logits: [examples, classes].
        labels: integers [examples], 0 to classes - 1.
        reduction: "sum" over the examples (a scalar), or "none" (a vector [examples]). There is no mean:
            the mean over a rank's examples is not the mean over the global batch.

    Raises:
        ValueError: shapes that don't fit, a label out of range, or an unknown reduction.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(
            f"reduction must be 'sum' or 'none', got {reduction!r}; to average, give the aggregator "
            "reduction='mean' and the number of examples"
        )
    xp = namespace(logits)
    if logits.ndim != 2 or np.shape(labels) != logits.shape[:1]:
        raise ValueError(
            f"logits must be [examples, classes] and labels [examples], got {logits.shape} "
            f"and {np.shape(labels)}"
        )
    if xp is np and len(labels) and not 0 <= np.min(labels) <= np.max(labels) < logits.shape[1]:
        raise ValueError(
            f"labels go from {np.min(labels)} to {np.max(labels)}, but there are {logits.shape[1]} classes"
        )
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = xp.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    rows = xp.arange(len(logits))
    losses = xp.log(totals[:, 0]) - shifted[rows, labels]
    if context.recording:
        exponentials /= totals
        context.saved = exponentials, rows
    return losses.sum() if reduction == "sum" else losses


@sparse_softmax_cross_entropy.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    probabilities, rows = context.saved
    gradient = probabilities.copy()
    gradient[rows, context.options["labels"]] -= 1
    if context.options.get("reduction", "sum") == "none":
        upstream = upstream[:, None]
    gradient *= upstream
    return (gradient,)


@sparse_softmax_cross_entropy.composed
def _(logits: Any, *, labels: Any, reduction: str = "sum") -> Tensor:
    value = value_of(logits)
    xp = namespace(value)
    of_label = xp.arange(value.shape[1]) == xp.asarray(labels)[:, None]
    # The largest logit only keeps exp from overflowing: as a constant it changes no derivative.
    shifted = logits - value.max(axis=1, keepdims=True)
    losses = log(reduce_sum(exp(shifted), axis=1)) - reduce_sum(shifted * of_label, axis=1)
    return reduce_sum(losses) if reduction == "sum" else losses


@primitive
def softmax_cross_entropy(context: Context, logits: Any, *, labels: Any, reduction: str = "sum") -> Any:
    """Return the cross-entropy between distributions over the classes and the softmax of logits.

    Args:
        context: of the tape.
        logits: [examples, classes].
        labels: the wanted probabilities, [examples, classes]; constants.
        reduction: "sum" over the examples (a scalar), or "none" (a vector [examples]).

    Raises:
        ValueError: shapes that don't fit, or an unknown reduction.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}")
    if logits.ndim != 2 or np.shape(labels) != logits.shape:
        raise ValueError(
            f"logits and labels must both be [examples, classes], got {logits.shape} and {np.shape(labels)}"
        )
    xp = namespace(logits)
    labels = xp.asarray(labels, logits.dtype)
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = xp.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    losses = (labels * (xp.log(totals) - shifted)).sum(axis=1)
    if context.recording:
        exponentials /= totals
        context.saved = exponentials, labels
    return losses.sum() if reduction == "sum" else losses


@softmax_cross_entropy.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    probabilities, labels = context.saved
    # The labels of an example need not add up to 1.
    gradient = probabilities * labels.sum(axis=1, keepdims=True) - labels
    if context.options.get("reduction", "sum") == "none":
        upstream = upstream[:, None]
    gradient *= upstream
    return (gradient,)


@softmax_cross_entropy.composed
def _(logits: Any, *, labels: Any, reduction: str = "sum") -> Tensor:
    value = value_of(logits)
    labels = namespace(value).asarray(labels, value.dtype)
    shifted = logits - value.max(axis=1, keepdims=True)  # a constant, as above
    losses = log(reduce_sum(exp(shifted), axis=1)) * labels.sum(axis=1) - reduce_sum(shifted * labels, axis=1)
    return reduce_sum(losses) if reduction == "sum" else losses


@primitive
def sigmoid_cross_entropy(context: Context, logits: Any, *, labels: Any) -> Any:
    """Return the cross-entropy between labels and the sigmoid of logits, of each element.

    `max(x, 0) - x * z + log(1 + exp(-|x|))`, which neither overflows nor loses digits.

    Args:
        context: of the tape.
        logits: array of any shape.
        labels: the wanted probabilities, of the same shape; constants.

    Raises:
        ValueError: shapes that differ.
    """
    if np.shape(labels) != logits.shape:
        raise ValueError(f"logits have shape {logits.shape}, labels {np.shape(labels)}")
    xp = namespace(logits)
    labels = xp.asarray(labels, logits.dtype)
    context.saved = labels
    return xp.maximum(logits, 0) - logits * labels + xp.log1p(xp.exp(-xp.abs(logits)))


@sigmoid_cross_entropy.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    logits, labels = context.inputs[0], context.saved
    xp = namespace(logits)
    return (((1 + xp.tanh(logits * 0.5)) * 0.5 - labels) * upstream,)


@sigmoid_cross_entropy.composed
def _(logits: Any, *, labels: Any) -> Tensor:
    value = value_of(logits)
    # log(1 + exp(x)), x as a constant taken out where it is positive, so that exp doesn't overflow.
    largest = namespace(value).maximum(value, 0)
    softplus = log(exp(-largest) + exp(logits - largest)) + largest
    return softplus - logits * namespace(value).asarray(labels, value.dtype)


@primitive
def mean_squared_error(context: Context, predictions: Any, *, targets: Any, reduction: str = "sum") -> Any:
    """Return the squared error, averaged over the features of an example.

    Args:
        context: of the tape.
        predictions: [examples, ...].
        targets: array of the same shape.
        reduction: "sum" over the examples (a scalar), or "none" (a vector [examples]).

    Raises:
        ValueError: shapes that differ, or an unknown reduction.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}")
    if np.shape(targets) != predictions.shape:
        raise ValueError(f"predictions have shape {predictions.shape}, targets {np.shape(targets)}")
    context.saved = difference = predictions - targets
    features = difference.reshape(len(difference), -1)
    losses = (features * features).sum(axis=1) / max(1, features.shape[1])
    return losses.sum() if reduction == "sum" else losses


@mean_squared_error.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    difference = context.saved
    features = max(1, difference.size // max(1, len(difference)))
    if context.options.get("reduction", "sum") == "none":
        upstream = upstream.reshape(-1, *(1,) * (difference.ndim - 1))
    return (difference * (upstream * difference.dtype.type(2 / features)),)


@mean_squared_error.composed
def _(predictions: Any, *, targets: Any, reduction: str = "sum") -> Tensor:
    difference = predictions - targets
    features = max(1, difference.size // max(1, len(difference)))
    axes = None if reduction == "sum" else tuple(range(1, difference.ndim))
    return reduce_sum(square(difference), axis=axes) / features
