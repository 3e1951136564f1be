"""The stages of a chain, made of other primitives: what second derivatives go through.

The kernels of a chain are fast and can't be differentiated twice. Here each stage is the plain formula: a
window is one slice of the padded images for each of its places, a convolution is a matrix product over
them. It takes the window's size times the memory of the images, which only second derivatives pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import numpy as np

from distopt.backend import device_of, namespace
from distopt.ops.arithmetic import divide, matmul, maximum, power, square
from distopt.ops.dense import relu
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.geometry import Axis
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.pooling import AveragePool, MaxPool
from distopt.ops.shaping import concat, reshape
from distopt.variables import value_of

__all__ = ["composed_stage"]


@singledispatch
def composed_stage(stage: Any, x: Any, parameters: Sequence[Any]) -> Any:
    """Return what the stage computes of images `x` [N, H, W, C], as a Tensor made by primitives.

    Raises:
        TypeError: the stage is not one of distopt's, and `composed_stage.register` wasn't used for it.
    """
    raise TypeError(
        f"second derivatives through the stage {type(stage).__name__} need its composed form: register a "
        "function (stage, x, parameters) with distopt.ops.composed_stages.composed_stage.register"
    )


@composed_stage.register
def _(stage: Convolution, x: Any, parameters: Sequence[Any]) -> Any:
    filters = parameters[0]
    rows, columns = stage.axes(x.shape[1:], parameters)
    depth, outputs = rows.window * columns.window * x.shape[3], filters.shape[3]
    patches = reshape(concat(*_places(x, rows, columns), axis=3), shape=(-1, depth))
    y = matmul(patches, reshape(filters, shape=(depth, outputs)))
    y = reshape(y, shape=(x.shape[0], rows.out, columns.out, outputs))
    if len(parameters) > 1:
        y = y + parameters[1]
    return relu(y) if stage.relu else y


@composed_stage.register
def _(stage: MaxPool, x: Any, parameters: Sequence[Any]) -> Any:
    first, *others = _places(x, *stage.axes(x.shape[1:]), padding=-np.inf)
    for place in others:
        first = maximum(first, place)  # a tie's gradient goes to the earlier place
    return first


@composed_stage.register
def _(stage: AveragePool, x: Any, parameters: Sequence[Any]) -> Any:
    axes = stage.axes(x.shape[1:])
    value = value_of(x)
    inside = namespace(value).ones((1, *x.shape[1:3], 1), value.dtype)
    return _total(_places(x, *axes)) / value_of(_total(_places(inside, *axes)))


@composed_stage.register
def _(stage: LocalResponseNormalization, x: Any, parameters: Sequence[Any]) -> Any:
    channels = np.arange(x.shape[3])
    near = np.abs(channels[:, None] - channels) <= stage.depth_radius
    band = device_of(value_of(x)).asarray(stage.alpha * near, x.dtype)
    flat = reshape(x, shape=(-1, x.shape[3]))
    return reshape(divide(flat, power(matmul(square(flat), band) + stage.bias, stage.beta)), shape=x.shape)


def _places(x: Any, rows: Axis, columns: Axis, padding: float = 0.0) -> list[Any]:
    """Return what each place of the window sees, row by row: [N, rows out, columns out, C] each."""
    padded = _padded(_padded(x, 1, rows, padding), 2, columns, padding)
    return [
        padded[:, _reach(rows, i), _reach(columns, j)]
        for i in range(rows.window)
        for j in range(columns.window)
    ]


def _reach(line: Axis, place: int) -> slice:
    return slice(place, place + (line.out - 1) * line.stride + 1, line.stride)


def _padded(x: Any, axis: int, line: Axis, padding: float) -> Any:
    def filled(length: int) -> list[Any]:
        value = value_of(x)
        shape = (*value.shape[:axis], length, *value.shape[axis + 1 :])
        return [namespace(value).full(shape, padding, value.dtype)] if length else []

    parts = [*filled(line.before), x, *filled(line.after)]
    return concat(*parts, axis=axis) if len(parts) > 1 else x


def _total(places: list[Any]) -> Any:
    total = places[0]
    for place in places[1:]:
        total = total + place
    return total
