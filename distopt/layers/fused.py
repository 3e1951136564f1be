"""Image layers computed one after the other as one primitive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distopt import initializers, ops, scopes
from distopt.layers.checks import check_positive
from distopt.layers.layer import MODEL_COLLECTIONS, Initializer
from distopt.ops.kernels import convolution
from distopt.ops.kernels.geometry import Padding
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.pooling import AveragePool, MaxPool
from distopt.ops.kernels.stages import Stage
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = [
    "AveragePool",
    "Convolution",
    "LocalResponseNormalization",
    "MaxPool",
    "sequence",
]


@dataclass(frozen=True)
class Convolution:
    """A convolution in a `sequence`, with its variables "name/weights" and "name/biases".

    Attributes:
        filters: number of output channels.
        kernel_size: rows and columns of the filter; a number stands for both.
        strides: distance of neighbouring windows.
        padding: "SAME" or "VALID".
        relu: whether negative results become zero.
        use_bias: whether there are biases.
        kernel_initializer: of the weights [rows, columns, channels, filters].
        bias_initializer: of the biases [filters].
        kernel_regularizer: penalty on the weights, added to the regularisation losses.
        kernel_constraint: applied to the weights after each update.
        name: the variable scope.

    Raises:
        ValueError: a size below 1, or no name.
    """

    filters: int
    kernel_size: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    relu: bool = False
    use_bias: bool = True
    kernel_initializer: Initializer | None = None
    bias_initializer: Initializer | None = None
    kernel_regularizer: Any = None
    kernel_constraint: Any = None
    name: str = "conv2d"

    def __post_init__(self) -> None:
        check_positive("filters", self.filters)
        for size in self._window():
            check_positive("kernel_size", size)

    def _window(self) -> tuple[int, int]:
        size = self.kernel_size
        return (size, size) if isinstance(size, int) else size

    def stage(self) -> Stage:
        """Return what it computes."""
        return convolution.Convolution(self.strides, self.padding, self.relu)

    def variables(self, channels: int, dtype: Any) -> list[Variable]:
        """Create, or get again, its variables for images of so many channels."""
        with scopes.variable_scope(self.name):
            found = [
                scopes.get_variable(
                    "weights",
                    (*self._window(), channels, self.filters),
                    dtype=dtype,
                    initializer=self.kernel_initializer,
                    regularizer=self.kernel_regularizer,
                    collections=MODEL_COLLECTIONS,
                    constraint=self.kernel_constraint,
                )
            ]
            if self.use_bias:
                found.append(
                    scopes.get_variable(
                        "biases",
                        (self.filters,),
                        dtype=dtype,
                        initializer=self.bias_initializer or initializers.Zeros(),
                        collections=MODEL_COLLECTIONS,
                    )
                )
        return found


def sequence(x: Any, layers: Sequence[Convolution | Stage]) -> Tensor:
    """Return the result of layers computed one after the other, a few images at a time.

    One sequence is one primitive: what lies between its layers stays in the cache. Put a convolution and
    the pooling and normalization after it into one.

    Args:
        x: images [N, H, W, C].
        layers: `Convolution`, `MaxPool`, `AveragePool`, `LocalResponseNormalization`.
    """
    stages: list[Stage] = []
    counts: list[int] = []
    parameters: list[Variable] = []
    channels, dtype = x.shape[3], x.dtype
    for layer in layers:
        own: list[Variable] = []
        if isinstance(layer, Convolution):
            own = layer.variables(channels, dtype)
            channels = layer.filters
            layer = layer.stage()
        stages.append(layer)
        counts.append(len(own))
        parameters.extend(own)
    return ops.chain(x, *parameters, stages=tuple(stages), counts=tuple(counts))
