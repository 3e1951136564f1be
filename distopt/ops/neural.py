"""Convolution, pooling, local response normalization: chains of stages as one primitive.

The work is done in `distopt.ops.kernels`, a few images at a time, so that what lies between the stages of
a chain never leaves the cache. Arrays are NHWC, filters HWIO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distopt.ops.composed_stages import composed_stage
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.geometry import Padding
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.piecewise import Chain
from distopt.ops.kernels.pooling import AveragePool, MaxPool
from distopt.ops.kernels.stages import Stage
from distopt.tape import Context, Tensor, primitive

__all__ = ["average_pool", "chain", "conv2d", "local_response_normalization", "max_pool"]


@primitive
def chain(
    context: Context, x: Any, *parameters: Any, stages: Sequence[Stage], counts: Sequence[int] = ()
) -> Any:
    """Return the result of stages computed one after the other.

    Args:
        context: of the tape.
        x: [N, H, W, C].
        parameters: of all stages, in order.
        stages: what to compute, for instance (Convolution(relu=True), MaxPool(3, 2, "SAME")).
        counts: how many of the parameters belong to each stage; zeros at the end may be left out.

    Raises:
        ValueError: shapes or dtypes that don't fit, or counts that don't add up.
    """
    if sum(counts) != len(parameters) or len(counts) > len(stages):
        raise ValueError(
            f"counts {tuple(counts)} must tell how {len(parameters)} parameters go to {len(stages)} stages"
        )
    done = Chain(stages).forward(x, _grouped(parameters, counts), keep=context.recording)
    if context.recording:
        context.saved = done
    return done.output


@chain.gradient
def _(context: Context, upstream: Any) -> tuple[Any, ...]:
    out = [context.destination(position) for position in range(1, len(context.inputs))]
    by_x, by_parameters = context.saved.backward(
        upstream, input_gradient=context.needs[0], out=out, keep=not context.is_last
    )
    return by_x, *by_parameters


@chain.composed
def _(x: Any, *parameters: Any, stages: Sequence[Stage], counts: Sequence[int] = ()) -> Any:
    groups = _grouped(parameters, (*counts, *(0,) * (len(stages) - len(counts))))
    for stage, group in zip(stages, groups, strict=True):
        x = composed_stage(stage, x, group)
    return x


def _grouped(parameters: Sequence[Any], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    """Return the parameters of each stage."""
    groups: list[tuple[Any, ...]] = []
    start = 0
    for count in counts:
        groups.append(tuple(parameters[start : start + count]))
        start += count
    return groups


def conv2d(
    x: Any,
    filters: Any,
    biases: Any = None,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    relu: bool = False,
) -> Tensor:
    """Return the convolution of images with filters, plus biases, rectified when `relu`.

    Args:
        x: [N, H, W, C].
        filters: [rows, columns, C, K].
        biases: [K], or None.
        strides: distance of neighbouring windows; a number stands for both axes.
        padding: "SAME" (TensorFlow's: the odd pixel after) or "VALID".
        relu: whether negative results become zero.
    """
    parameters = (filters,) if biases is None else (filters, biases)
    stage = Convolution(strides, padding, relu)
    return chain(x, *parameters, stages=(stage,), counts=(len(parameters),))


def max_pool(
    x: Any,
    window: int | tuple[int, int] = 2,
    strides: int | tuple[int, int] = 2,
    padding: Padding = "VALID",
) -> Tensor:
    """Return the largest value of each window of images [N, H, W, C]."""
    return chain(x, stages=(MaxPool(window, strides, padding),))


def average_pool(
    x: Any,
    window: int | tuple[int, int] = 2,
    strides: int | tuple[int, int] = 2,
    padding: Padding = "VALID",
) -> Tensor:
    """Return the mean of each window of images [N, H, W, C], padding not counted."""
    return chain(x, stages=(AveragePool(window, strides, padding),))


def local_response_normalization(
    x: Any, depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Return `x / (bias + alpha * sum of squares of 2 * depth_radius + 1 channels) ** beta`."""
    return chain(x, stages=(LocalResponseNormalization(depth_radius, bias, alpha, beta),))
