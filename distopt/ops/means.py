"""Is this loss already a mean over examples? Then averaging it again over ranks is the mean of means."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from distopt.tape import Tensor
from distopt.variables import Operand

__all__ = ["is_mean", "warn_of_mean_of_means"]

_ALL_INPUTS = ("add", "add_n", "subtract")
"""A mean plus anything, the penalties for instance, still has the mean in it."""

_FIRST_INPUT = ("cast", "identity", "negative", "reduce_sum", "reshape", "slice_of")
"""What keeps the first input's divisor."""


def is_mean(loss: Any, through_factors: bool = True) -> bool:
    """Tell whether a loss was averaged over its examples, by looking at how it was made.

    It was if its record leads over sums, differences, products, quotients, casts and reshapes to a
    `reduce_mean` over the first axis, or to the sum of an array divided by the number of its elements. A
    mean over other axes (over the features of each example) is none.

    Such a loss must not be given to an aggregator that divides by the number of examples, and with one
    that sums it makes gradients as many times too large as there are ranks; with unequal parts of the
    batch no factor helps. This is a help for warnings and not a proof: a mean computed outside the tape
    goes unnoticed, and a penalty that is a mean over weights, or a mean that was multiplied by this
    rank's share of the batch, counts as one.

    Args:
        loss: Tensor that a tape recorded, before its gradients are taken. For anything else the answer
            is False.
        through_factors: whether a mean that was multiplied or divided by something still counts. It may
            have been made right by that: `reduce_mean(x) * len(x)` is a sum.
    """
    waiting, seen = [loss], set[int]()
    while waiting:
        tensor = waiting.pop()
        if not isinstance(tensor, Tensor) or tensor.node is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        node = tensor.node
        name = node.primitive.name
        if node.context is None:  # the gradients were taken
            continue
        if name == "reduce_mean" and _covers_examples(node.inputs[0], node.context.options.get("axis")):
            return True
        if name == "divide" and _is_sum_over(node.inputs[0], node.inputs[1]):
            return True
        if name in _ALL_INPUTS:
            waiting.extend(node.inputs)
        elif name in ("multiply", "divide"):
            if through_factors:  # of a product either may be the constant
                waiting.extend(node.inputs if name == "multiply" else node.inputs[:1])
        elif name in _FIRST_INPUT:
            waiting.append(node.inputs[0])
    return False


def warn_of_mean_of_means(loss: Any, aggregator: Any) -> bool:
    """Warn if a loss is a mean already, and the aggregator makes a mean of such means or a sum of them.

    Asks `is_mean` without looking through factors, so that a loss which was scaled by hand gives no warning.

    Args:
        loss: Tensor that a tape recorded, before its gradients are taken.
        aggregator: with `reduction` "mean" (divides by the examples of the global batch), or "sum" and a
            `communicator` of several ranks; with anything else, None for instance, nothing is done.

    Returns:
        Whether it warned.
    """
    reduction = getattr(aggregator, "reduction", None)
    ranks = getattr(getattr(aggregator, "communicator", None), "size", 1)
    if reduction not in ("mean", "sum") or (reduction == "sum" and ranks == 1):
        return False
    if is_mean(loss, through_factors=False):
        remedy = (
            "give it the sum over this rank's examples"
            if reduction == "mean"
            else "give it losses.compute_average_loss(per_example_loss, global_batch_size=...)"
        )
        effect = "divides it by the examples again" if reduction == "mean" else f"adds {ranks} of them up"
        warnings.warn(
            f"the loss is a mean over this rank's examples, and the aggregator (reduction={reduction!r}) "
            f"{effect}: {remedy}.",
            stacklevel=3,
        )
        return True
    return False


def _covers_examples(reduced: Any, axis: Any) -> bool:
    """Tell whether a reduction over `axis` runs over more than one example."""
    shape = np.shape(_plain(reduced))
    if not shape or shape[0] == 1:
        return False
    axes = range(len(shape)) if axis is None else np.atleast_1d(axis).tolist()
    return any(one % len(shape) == 0 for one in axes)


def _is_sum_over(dividend: Any, divisor: Any) -> bool:
    """Tell whether this is the sum of all of an array, divided by its number of elements."""
    node = dividend.node if isinstance(dividend, Tensor) else None
    if node is None or node.primitive.name != "reduce_sum" or np.shape(dividend.value):
        return False
    if not isinstance(divisor, int | float | np.integer | np.floating):
        return False  # a value on a device would make the host wait
    count = math.prod(np.shape(_plain(node.inputs[0])))
    return count > 1 and float(divisor) == count


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Operand) else value
