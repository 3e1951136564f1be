"""Fully connected layers and activations: matrix product, bias and relu as one primitive."""

from __future__ import annotations

from typing import Any

from distopt.backend import device_of, namespace
from distopt.ops.arithmetic import matmul
from distopt.tape import Context, Tensor, primitive
from distopt.variables import value_of

__all__ = ["dense", "relu", "sigmoid"]


@primitive
def relu(context: Context, x: Any) -> Any:
    """Return the larger of `x` and 0; its gradient at 0 is 0."""
    return namespace(x).maximum(x, 0)


@relu.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream * (value_of(context.output) > 0),)


@primitive
def dense(context: Context, x: Any, weights: Any, biases: Any, *, relu: bool = False) -> Any:
    """Return `x @ weights + biases`, and the larger of that and 0 when `relu`.

    Args:
        context: of the tape.
        x: [examples, inputs].
        weights: [inputs, outputs].
        biases: [outputs].
        relu: apply the rectifier too.

    Raises:
        ValueError: shapes that don't fit.
    """
    if (
        x.ndim != 2
        or weights.ndim != 2
        or x.shape[1] != weights.shape[0]
        or biases.shape != weights.shape[1:]
    ):
        raise ValueError(
            "dense needs x [examples, inputs], weights [inputs, outputs], biases [outputs]; "
            f"got {x.shape}, {weights.shape}, {biases.shape}"
        )
    xp = namespace(x)
    output = device_of(x).empty((x.shape[0], weights.shape[1]), weights.dtype)
    xp.matmul(x, weights, out=output)
    output += biases
    if relu:
        xp.maximum(output, 0, out=output)
    return output


@dense.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any, Any]:
    x, weights, _ = context.inputs
    xp = namespace(upstream)
    if context.options.get("relu", False):
        upstream = upstream * (context.output > 0)
    by_x = by_weights = by_biases = None
    if context.needs[1]:
        by_weights = xp.matmul(x.T, upstream, out=context.destination(1))
    if context.needs[2]:
        by_biases = upstream.sum(axis=0, out=context.destination(2))
    if context.needs[0]:
        by_x = device_of(x).empty(x.shape, x.dtype)
        xp.matmul(upstream, weights.T, out=by_x)
    return by_x, by_weights, by_biases


@dense.composed
def _(x: Any, weights: Any, biases: Any, **options: bool) -> Tensor:
    output = matmul(x, weights) + biases
    return relu(output) if options.get("relu", False) else output


@primitive
def sigmoid(context: Context, x: Any) -> Any:
    """Return `1 / (1 + exp(-x))`, computed so that it doesn't overflow."""
    xp = namespace(x)
    return xp.asarray((1 + xp.tanh(x * 0.5)) * 0.5)


@sigmoid.gradient
def _(context: Context, upstream: Any) -> tuple[Any]:
    return (upstream * context.output * (1 - context.output),)
