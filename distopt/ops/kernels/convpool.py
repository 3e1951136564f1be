"""A convolution of few channels and the max pooling after it, as one stage.

With few input channels a convolution is bound by copying patches, and the pooling after it by
walking through the largest array of the network in short strides. Both shrink when one patch serves
all outputs that a pooling stride apart from each other share: for stride 2 a patch of 6x6 instead
of four of 5x5, and one matrix product for each of the four phases of the output, which lands where
pooling reads it in long runs. The products grow by (k + s - 1)^2 / k^2, 1.44 for 5x5 and stride 2,
and run at the machine's peak; copying shrinks threefold. Bias and relu come after pooling, on a
quarter of the values: both are monotonic, so this changes no bit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.backend import Array
from distopt.ops.kernels.activation import BiasRelu
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.geometry import Axis, pair
from distopt.ops.kernels.im2col import Patches
from distopt.ops.kernels.pooling import MaxPool, Phase, Planes, Taps
from distopt.ops.kernels.stages import Context, Kernel, Saved, Scratch, Shape, Stage, Sum

__all__ = ["ConvolutionMaxPool", "fused"]

_MOST_EXTRA_PRODUCTS = 2.0


class _ConvolutionMaxPoolKernel:
    def __init__(
        self,
        context: Context,
        axes: tuple[Axis, Axis],
        pool_axes: tuple[Axis, Axis],
        parameters: Sequence[Array],
        relu: bool,
    ) -> None:
        self._context = context
        self._xp = context.device.xp
        self._scratch = Scratch(context)
        self._pool_axes = pool_axes
        blocks = [_blocks(line, pool.stride) for line, pool in zip(axes, pool_axes, strict=True)]
        self._blocks = (blocks[0].out, blocks[1].out)
        self._patches = Patches(context, blocks[0], blocks[1], self._scratch)
        self._taps = Taps(*pool_axes, self._scratch, self._xp)
        weights = parameters[0]
        self._shape = weights.shape
        # Where the filter stands in a patch, for each phase of the output.
        self._places = [
            (i, j, (slice(i, i + axes[0].window), slice(j, j + axes[1].window)))
            for i in range(pool_axes[0].stride)
            for j in range(pool_axes[1].stride)
        ]
        shape = (len(self._places), blocks[0].window, blocks[1].window, *weights.shape[2:])
        spread = context.device.zeros(shape, context.dtype)
        for number, (_, _, place) in enumerate(self._places):
            spread[number][place] = weights
        self._patch_shape = shape
        self._weights = spread.reshape(len(spread), -1, weights.shape[3])
        self._sum = Sum(context, self._weights.shape)
        self._tail = BiasRelu(context, parameters[1:], relu)

    def forward(self, x: Array, y: Array, keep: bool) -> Saved:
        phases, planes = self._phases(len(x))
        self._xp.matmul(self._patches.gather(x)[None], self._weights, out=phases)
        codes = self._scratch.fresh("codes", y.shape, self._taps.code_dtype) if keep else None
        self._taps.maximum(planes, y, codes)
        self._tail.forward(y)
        return () if codes is None else (x, y, codes)

    def backward(self, dy: Array, saved: Saved, dx: Array | None) -> None:
        x, y, codes = saved
        phases, planes = self._phases(len(x))
        self._taps.to_maximum(self._tail.backward(dy, y), codes, planes)
        self._sum.add_product(self._patches.gather(x).T[None], phases)
        if dx is None:
            return
        spread = self._patches.empty(len(x))
        part = self._scratch.take("part", spread.shape)
        self._xp.matmul(phases[0], self._weights[0].T, out=spread)
        for phase, weights in zip(phases[1:], self._weights[1:], strict=True):
            self._xp.matmul(phase, weights.T, out=part)
            spread += part
        self._patches.fold(spread, dx)

    def parameter_gradients(self) -> list[Array]:
        sums = self._sum.result().reshape(self._patch_shape)
        dw = self._context.device.zeros(self._shape, self._context.dtype)
        for total, (_, _, place) in zip(sums, self._places, strict=True):
            dw += total[place]
        return [dw, *self._tail.gradients()]

    def _phases(self, n: int) -> tuple[Array, Planes]:
        """Return memory for n images' outputs, phase by phase, and its parts inside the images."""
        outputs = self._shape[3]
        shape = (len(self._places), n, *self._blocks, outputs)
        phases = self._scratch.take("phases", shape)
        rows, columns = self._pool_axes
        starts: dict[Phase, int] = {}
        views: dict[Phase, Array] = {}
        for number, (i, j, _) in enumerate(self._places):
            starts[i, j] = number * phases[0].size
            parts = (slice(rows.length_of_phase(i)), slice(columns.length_of_phase(j)))
            views[i, j] = phases[number][:, *parts]
        return phases.reshape(len(phases), -1, outputs), Planes(phases, starts, views)


def _blocks(line: Axis, stride: int) -> Axis:
    """Return the windows that hold `stride` neighbouring windows each."""
    return Axis(
        size=line.size,
        window=line.window + stride - 1,
        stride=stride,
        before=line.before,
        after=line.after,
        out=-(-line.out // stride),
    )


@dataclass(frozen=True)
class ConvolutionMaxPool:
    """`pool` of `convolution`, which must have stride 1. Its parameters are the convolution's.

    Attributes:
        convolution: the first stage.
        pool: the second stage.
    """

    convolution: Convolution
    pool: MaxPool

    def __post_init__(self) -> None:
        if pair(self.convolution.strides) != (1, 1):
            raise ValueError(
                f"the convolution must have stride 1, got {self.convolution.strides}. "
                "Put Convolution and MaxPool into the chain one by one."
            )

    def output_shape(self, shape: Shape, parameters: Sequence[Array]) -> Shape:
        """Return the shape that one image becomes."""
        return self.pool.output_shape(self.convolution.output_shape(shape, parameters), ())

    def bytes_per_image(self, shape: Shape, parameters: Sequence[Array], itemsize: int) -> int:
        """Return the size of one image's patches and of the convolution's result."""
        height, width, outputs = self.convolution.output_shape(shape, parameters)
        strides = pair(self.pool.strides)
        patch = shape[2]
        for window, stride in zip(parameters[0].shape[:2], strides, strict=True):
            patch *= window + stride - 1
        return height * width * (patch // (strides[0] * strides[1]) + outputs) * itemsize

    def bind(self, context: Context, parameters: Sequence[Array]) -> Kernel:
        """Return a kernel for this shape and dtype and these parameter values."""
        return _ConvolutionMaxPoolKernel(
            context,
            self.convolution.axes(context.shape, parameters),
            self.pool.axes(self.convolution.output_shape(context.shape, parameters)),
            parameters,
            self.convolution.relu,
        )


def fused(
    stages: Sequence[Stage], parameters: Sequence[Sequence[Array]], shape: Shape
) -> tuple[list[Stage], list[Sequence[Array]]]:
    """Return the chain with `ConvolutionMaxPool` for every pair of stages where that pays.

    It pays for convolutions of stride 1 that go through im2col, if larger patches don't make more than
    twice the products. `shape` is that of the images that the chain is given.
    """
    result: list[Stage] = []
    arrays: list[Sequence[Array]] = []
    shapes: list[Shape] = []
    for stage, own in zip(stages, parameters, strict=True):
        before = result[-1] if result else None
        if (
            isinstance(stage, MaxPool)
            and isinstance(before, Convolution)
            and _pays(before, stage, shapes[-1], arrays[-1])
        ):
            result[-1] = ConvolutionMaxPool(before, stage)
        else:
            result.append(stage)
            arrays.append(own)
            shapes.append(shape)
        shape = stage.output_shape(shape, own)
    return result, arrays


def _pays(convolution: Convolution, pool: MaxPool, shape: Shape, parameters: Sequence[Array]) -> bool:
    if pair(convolution.strides) != (1, 1) or convolution.is_winograd(shape, parameters):
        return False
    extra = 1.0
    for window, stride in zip(parameters[0].shape[:2], pair(pool.strides), strict=True):
        extra *= (window + stride - 1) / window
    return extra <= _MOST_EXTRA_PRODUCTS
