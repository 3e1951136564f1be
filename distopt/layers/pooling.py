"""Pooling, and local response normalization: layers without variables, over windows of images or channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt import ops
from distopt.layers.layer import Call, GetVariable, Layer
from distopt.ops.kernels.geometry import Padding
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.pooling import AveragePool, MaxPool
from distopt.ops.kernels.stages import Stage
from distopt.scopes import add_arg_scope
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = [
    "AveragePool2D",
    "GlobalAveragePool",
    "LocalResponseNorm",
    "MaxPool2D",
    "average_pool2d",
    "global_average_pool",
    "local_response_normalization",
    "max_pool2d",
]


class _Staged(Layer):
    """A layer that is one stage of a chain, without variables."""

    def __init__(self, stage: Stage, name: str | None) -> None:
        super().__init__(name)
        self._stage = stage

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return nothing: there are none."""
        return {}

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the result for images [N, H, W, C]."""
        return ops.chain(x, stages=(self._stage,))

    def stage(self) -> Stage | None:
        """Return it as a stage."""
        return self._stage


class MaxPool2D(_Staged):
    """The largest value of each window of images [N, H, W, C].

    Args:
        pool_size: rows and columns of the window; a number stands for both.
        strides: distance of neighbouring windows, likewise; None for `pool_size`.
        padding: "VALID" or "SAME".
        name: of the layer.

    Raises:
        ValueError: a size below 1, or an unknown padding.
    """

    default_name = "max_pool2d"

    def __init__(
        self,
        pool_size: int | tuple[int, int] = 2,
        strides: int | tuple[int, int] | None = None,
        padding: Padding = "VALID",
        name: str | None = None,
    ) -> None:
        super().__init__(MaxPool(pool_size, pool_size if strides is None else strides, padding), name)


class AveragePool2D(_Staged):
    """The mean of each window of images, padding not counted; arguments and errors as of `MaxPool2D`."""

    default_name = "average_pool2d"

    def __init__(
        self,
        pool_size: int | tuple[int, int] = 2,
        strides: int | tuple[int, int] | None = None,
        padding: Padding = "VALID",
        name: str | None = None,
    ) -> None:
        super().__init__(AveragePool(pool_size, pool_size if strides is None else strides, padding), name)


class LocalResponseNorm(_Staged):
    """`x / (bias + alpha * sum of squares of 2 * depth_radius + 1 channels) ** beta`.

    Args:
        depth_radius: channels to each side that count.
        bias: the offset, above 0.
        alpha: the factor of the sum of squares.
        beta: the exponent.
        name: of the layer.

    Raises:
        ValueError: a negative radius, or a bias that is not above 0.
    """

    default_name = "local_response_normalization"

    def __init__(
        self,
        depth_radius: int = 5,
        bias: float = 1.0,
        alpha: float = 1.0,
        beta: float = 0.5,
        name: str | None = None,
    ) -> None:
        super().__init__(LocalResponseNormalization(depth_radius, bias, alpha, beta), name)


class GlobalAveragePool(Layer):
    """`global_average_pool` as an object."""

    default_name = "global_average_pool"

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return nothing: there are none."""
        return {}

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the means."""
        return global_average_pool(x)


@add_arg_scope
def max_pool2d(
    x: Any,
    pool_size: int | tuple[int, int] = 2,
    strides: int | tuple[int, int] | None = None,
    padding: Padding = "VALID",
) -> Tensor:
    """Return the largest value of each window of images; arguments are those of `MaxPool2D`."""
    return ops.max_pool(x, pool_size, pool_size if strides is None else strides, padding)


@add_arg_scope
def average_pool2d(
    x: Any,
    pool_size: int | tuple[int, int] = 2,
    strides: int | tuple[int, int] | None = None,
    padding: Padding = "VALID",
) -> Tensor:
    """Return the mean of each window of images, padding not counted; arguments are those of `MaxPool2D`."""
    return ops.average_pool(x, pool_size, pool_size if strides is None else strides, padding)


@add_arg_scope
def local_response_normalization(
    x: Any, depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Return `x / (bias + alpha * sum of squares of 2 * depth_radius + 1 channels) ** beta`."""
    return ops.local_response_normalization(x, depth_radius, bias, alpha, beta)


def global_average_pool(x: Any) -> Tensor:
    """Return the mean [N, C] of each channel of images [N, H, W, C].

    Raises:
        ValueError: `x` are no images.
    """
    if len(x.shape) != 4:
        raise ValueError(f"global_average_pool needs images [N, H, W, C], got shape {tuple(x.shape)}")
    return ops.reduce_mean(x, axis=(1, 2))
