"""Sums and means, with their gradients; and the loss of a regularizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.backend import namespace
from distopt.ops.arithmetic import absolute
from distopt.ops.shaping import broadcast_to
from distopt.regularizers import ElasticNet, RegularizerSum
from distopt.tape import Context, Tensor, primitive
from distopt.variables import operators

__all__ = ["add_n", "l2_loss", "reduce_mean", "reduce_sum", "regularization_loss"]


@primitive
def reduce_sum(
    context: Context, x: Any, *, axis: int | Sequence[int] | None = None, keepdims: bool = False
) -> Any:
    """Return the sum of `x` over some axes, or over all."""
    return x.sum(axis=_axes(axis), keepdims=keepdims)


@reduce_sum.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (_spread(context, upstream),)


@primitive
def reduce_mean(
    context: Context, x: Any, *, axis: int | Sequence[int] | None = None, keepdims: bool = False
) -> Any:
    """Return the mean of `x` over some axes, or over all.

    For losses use a sum: what is averaged over a rank's own examples is wrong as soon as ranks have
    different numbers of them.
    """
    return x.mean(axis=_axes(axis), keepdims=keepdims)


@reduce_mean.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    count = context.inputs[0].size / max(1, np.size(upstream))
    return (_spread(context, upstream / count),)


@primitive
def add_n(context: Context, *terms: Any) -> Any:
    """Return the sum of terms of one shape."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@add_n.gradient
def _(context: Context, upstream: Any) -> tuple[Any, ...]:
    return (upstream,) * len(context.inputs)


@primitive
def l2_loss(context: Context, x: Any) -> Any:
    """Return half the sum of the squares of `x`, without a square root, as TensorFlow's `l2_loss`."""
    flat = x.reshape(-1)
    return flat @ flat * flat.dtype.type(0.5)


@l2_loss.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    x, out = context.inputs[0], context.destination(0)
    return (x * upstream if out is None else namespace(x).multiply(x, upstream, out=out),)


@primitive
def regularization_loss(context: Context, x: Any, *, regularizer: Any) -> Any:
    """Return the penalty of a regularizer on a variable's value, a scalar."""
    return regularizer.loss(x)


@regularization_loss.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    gradient = context.options["regularizer"].gradient(context.inputs[0], out=context.destination(0))
    gradient *= upstream
    return (gradient,)


@regularization_loss.composed
def _(x: Any, *, regularizer: Any) -> Tensor:
    if isinstance(regularizer, RegularizerSum):
        return add_n(*(regularization_loss(x, regularizer=part) for part in regularizer.parts))
    if not isinstance(regularizer, ElasticNet):
        raise TypeError(
            f"second derivatives are known for the regularizers of distopt.regularizers, not for "
            f"{type(regularizer).__name__}; write its penalty with distopt.ops"
        )
    return regularizer.l1 * reduce_sum(absolute(x)) + regularizer.l2 * l2_loss(x)


def _axes(axis: int | Sequence[int] | None) -> Any:
    return axis if axis is None or isinstance(axis, int) else tuple(axis)


def _spread(context: Context, upstream: Any) -> Any:
    """Repeat a reduced gradient over the axes that were summed."""
    x = context.inputs[0]
    axis = _axes(context.options.get("axis"))
    if axis is not None and not context.options.get("keepdims", False):
        summed = {number % x.ndim for number in ((axis,) if isinstance(axis, int) else axis)}
        upstream = upstream.reshape([1 if i in summed else length for i, length in enumerate(x.shape)])
    return broadcast_to.alike(upstream, shape=x.shape)


operators.update(reduce_sum=reduce_sum)


for _adds in (reduce_sum, reduce_mean, add_n):
    _adds.linear = True
