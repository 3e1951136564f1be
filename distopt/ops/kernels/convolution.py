"""2-D convolution: the choice between Winograd and im2col."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.backend import Array
from distopt.ops.kernels.geometry import Axis, Padding, axis, pair
from distopt.ops.kernels.im2col import Im2colKernel
from distopt.ops.kernels.stages import Context, Kernel, Shape
from distopt.ops.kernels.winograd import TILE, WinogradKernel

__all__ = ["Convolution"]

# Measured in docs/results/cpu_kernels.md: below these the transforms cost more than they save.
_WINOGRAD_FROM_CHANNELS = 8
_WINOGRAD_FROM_GAIN = 2.5


@dataclass(frozen=True)
class Convolution:
    """y = relu(conv(x, w) + b), a correlation as in TensorFlow's `conv2d`.

    Its parameters are w [kh, kw, C, K] and, if there is one, the bias [K]. Kernels of 3x3 and 5x5
    at stride 1 go through Winograd's transforms if there are 8 input and output channels or more and the
    tiles fit so well that they save 2.5 times the products (in the inside of an image they save 4 and
    6.25 times); all others go through im2col.

    Attributes:
        strides: distance of neighbouring windows; a number stands for both axes.
        padding: "SAME" or "VALID".
        relu: whether negative results become zero.
    """

    strides: int | tuple[int, int] = 1
    padding: Padding = "SAME"
    relu: bool = False

    def axes(self, shape: Shape, parameters: Sequence[Array]) -> tuple[Axis, Axis]:
        """Return the geometry over height and width."""
        strides = pair(self.strides)
        rows, columns = parameters[0].shape[:2]
        return (
            axis(shape[0], rows, strides[0], self.padding),
            axis(shape[1], columns, strides[1], self.padding),
        )

    def output_shape(self, shape: Shape, parameters: Sequence[Array]) -> Shape:
        """Return the shape that one image becomes.

        Raises:
            ValueError: the filter is not [kh, kw, C, K] with the image's C, or the bias is not [K].
        """
        if not 1 <= len(parameters) <= 2:
            raise ValueError(
                f"a convolution takes a filter and perhaps a bias, got {len(parameters)} arrays."
            )
        weights = parameters[0]
        if weights.ndim != 4 or weights.shape[2] != shape[2]:
            raise ValueError(
                f"the filter has shape {weights.shape}, the images have {shape[2]} channels. "
                "A filter is [height, width, input channels, output channels]."
            )
        for bias in parameters[1:]:
            if bias.shape != weights.shape[3:]:
                raise ValueError(
                    f"the bias has shape {bias.shape}, the filter {weights.shape[3]} channels."
                    " They must agree."
                )
        rows, columns = self.axes(shape, parameters)
        return rows.out, columns.out, weights.shape[3]

    def bytes_per_image(self, shape: Shape, parameters: Sequence[Array], itemsize: int) -> int:
        """Return the size of one image's patches or tiles, and of its result."""
        rows, columns = self.axes(shape, parameters)
        _, _, depth, outputs = parameters[0].shape
        if self.is_winograd(shape, parameters):
            tiles = -(-rows.out // TILE) * -(-columns.out // TILE)
            return tiles * (TILE + rows.window - 1) ** 2 * 2 * (depth + outputs) * itemsize
        patch = rows.window * columns.window * depth
        return rows.out * columns.out * (patch + outputs) * itemsize

    def bind(self, context: Context, parameters: Sequence[Array]) -> Kernel:
        """Return a kernel for this shape and dtype and these parameter values."""
        rows, columns = self.axes(context.shape, parameters)
        kind = WinogradKernel if self.is_winograd(context.shape, parameters) else Im2colKernel
        return kind(context, rows, columns, parameters, self.relu)

    def is_winograd(self, shape: Shape, parameters: Sequence[Array]) -> bool:
        """Return whether images of `shape` go through Winograd's transforms."""
        rows, columns = self.axes(shape, parameters)
        _, _, depth, outputs = parameters[0].shape
        if (
            (rows.stride, columns.stride) != (1, 1)
            or rows.window != columns.window
            or rows.window not in (3, 5)
            or min(depth, outputs) < _WINOGRAD_FROM_CHANNELS
        ):
            return False
        tiles = -(-rows.out // TILE) * -(-columns.out // TILE)
        products = tiles * (TILE + rows.window - 1) ** 2
        return rows.out * columns.out * rows.window**2 >= _WINOGRAD_FROM_GAIN * products
