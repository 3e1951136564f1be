"""Convolution as one matrix product over patches (im2col): any kernel, stride and padding."""

from __future__ import annotations

from collections.abc import Sequence

from distopt.backend import Array
from distopt.ops.kernels.activation import BiasRelu
from distopt.ops.kernels.geometry import Axis
from distopt.ops.kernels.stages import Context, Saved, Scratch, Sum

__all__ = ["Im2colKernel", "Patches"]


class Patches:
    """Cuts images into the patches that a window covers, and adds such patches up again.

    Args:
        context: shape, dtype, device and piece size of the images.
        rows: the window over the height.
        columns: the window over the width.
        scratch: where working memory comes from.
    """

    def __init__(self, context: Context, rows: Axis, columns: Axis, scratch: Scratch) -> None:
        self.rows, self.columns = rows, columns
        height, width, self._channels = context.shape
        self._scratch = scratch
        self._context = context
        self._xp = context.device.xp
        self._depth = rows.window * columns.window * self._channels
        # A 1x1 window at stride 1 covers the images themselves.
        self._is_identity = (rows.window, columns.window, rows.stride, columns.stride) == (
            1,
            1,
            1,
            1,
        )
        # The part of an image that windows cover, and where it stands among the padding.
        self._height = min(height, rows.covered - rows.before)
        self._width = min(width, columns.covered - columns.before)
        if not self._is_identity:
            self._inside, self._windows = self._padded_input()

    def gather(self, x: Array) -> Array:
        """Return [n * out rows * out columns, window rows * window columns * channels]."""
        n = len(x)
        if self._is_identity:
            return x.reshape(-1, self._channels)
        self._inside[:n] = x[:, : self._height, : self._width]
        out = self._scratch.take("patches", (n, *self._windows.shape[1:]))
        self._xp.copyto(out, self._windows[:n])
        return out.reshape(-1, self._depth)

    def empty(self, n: int) -> Array:
        """Return memory for the patches of n images; what `gather` gave last is lost."""
        shape = (n * self.rows.out * self.columns.out, self._depth)
        if self._is_identity:
            return self._context.device.empty(shape, self._context.dtype)
        return self._scratch.take("patches", shape)

    def fold(self, patches: Array, n: int) -> Array:
        """Return [n, H, W, C]: each input's sum over the patches that hold it."""
        rows, columns, channels = self.rows, self.columns, self._channels
        if self._is_identity:
            return patches.reshape(n, rows.out, columns.out, channels)
        patches = patches.reshape(n, rows.out, columns.out, rows.window, columns.window, channels)
        padded = self._scratch.take("folded", (n, rows.covered, columns.covered, channels))
        padded.fill(0)
        for i in range(rows.window):
            last_row = i + rows.stride * (rows.out - 1) + 1
            for j in range(columns.window):
                last_column = j + columns.stride * (columns.out - 1) + 1
                target = padded[:, i : last_row : rows.stride, j : last_column : columns.stride]
                target += patches[:, :, :, i, j]
        dx = self._context.device.empty((n, rows.size, columns.size, channels), padded.dtype)
        if self._height < rows.size or self._width < columns.size:
            dx.fill(0)  # inputs that no window covers
        dx[:, : self._height, : self._width] = padded[
            :,
            rows.before : rows.before + self._height,
            columns.before : columns.before + self._width,
        ]
        return dx

    def _padded_input(self) -> tuple[Array, Array]:
        """Return where images go among zeros, and the view of that as overlapping windows."""
        rows, columns, piece = self.rows, self.columns, self._context.piece
        padded = self._context.device.zeros(
            (piece, rows.covered, columns.covered, self._channels), self._context.dtype
        )
        image, row, column, value = padded.strides
        windows = self._xp.lib.stride_tricks.as_strided(
            padded,
            (piece, rows.out, columns.out, rows.window, columns.window * self._channels),
            (image, row * rows.stride, column * columns.stride, row, value),
        )
        top, left = rows.before, columns.before
        return padded[:, top : top + self._height, left : left + self._width], windows


class Im2colKernel:
    """y = relu(patches(x) @ w + b), with the gradients.

    Args:
        context: what it is bound to.
        rows: the window over the height.
        columns: the window over the width.
        parameters: w [kh, kw, C, K], and a bias [K] or nothing.
        relu: whether negative results become zero.
    """

    def __init__(
        self, context: Context, rows: Axis, columns: Axis, parameters: Sequence[Array], relu: bool
    ) -> None:
        self._context = context
        self._scratch = Scratch(context)
        self._patches = Patches(context, rows, columns, self._scratch)
        self._shape = parameters[0].shape
        self._weights = parameters[0].reshape(-1, self._shape[3])
        self._sum = Sum(context, self._weights.shape)
        self._tail = BiasRelu(context, parameters[1:], relu)

    def forward(self, x: Array, out: Array | None, keep: bool) -> tuple[Array, Saved]:
        """Compute one piece; see `Kernel.forward`."""
        outputs = self._shape[3]
        shape = (len(x), self._patches.rows.out, self._patches.columns.out, outputs)
        y = self._context.device.empty(shape, self._context.dtype) if out is None else out
        matmul = self._context.device.xp.matmul
        matmul(self._patches.gather(x), self._weights, out=y.reshape(-1, outputs))
        self._tail.forward(y)
        return y, (x, y) if keep else ()

    def backward(self, dy: Array, saved: Saved, input_gradient: bool) -> Array | None:
        """Go back through one piece; see `Kernel.backward`."""
        x, y = saved
        gradient = self._tail.backward(dy, y).reshape(-1, self._shape[3])
        self._sum.add_product(self._patches.gather(x).T, gradient)
        if not input_gradient:
            return None
        spread = self._patches.empty(len(x))
        self._context.device.xp.matmul(gradient, self._weights.T, out=spread)
        return self._patches.fold(spread, len(x))

    def parameter_gradients(self) -> list[Array]:
        """Return [dw] or [dw, db]; see `Kernel.parameter_gradients`."""
        return [self._sum.result().reshape(self._shape), *self._tail.gradients()]
