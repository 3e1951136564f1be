"""A chain of stages, computed for a few images at a time.

Between a convolution and the pooling after it lies the largest array of a network. A chain runs all
its stages on a few images before it goes on to the next ones, so that what lies between them stays
in the cache and is never written to memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from distopt.backend import Array, device_of
from distopt.ops.kernels.convpool import fused
from distopt.ops.kernels.stages import Context, Kernel, Saved, Scratch, Stage

__all__ = ["Chain", "Pass"]

_PIECE_BYTES = 4 << 20


class Chain:
    """Stages that are computed one after the other, piece by piece.

    Args:
        stages: what to compute; the output of each is the input of the next.

    Raises:
        ValueError: there is no stage.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("a chain needs at least one stage, got none.")
        self._stages = tuple(stages)

    def forward(self, x: Array, parameters: Sequence[Sequence[Array]] = (), keep: bool = True) -> Pass:
        """Compute the chain.

        Args:
            x: [N, H, W, C], float32 or float64; copied unless it is contiguous. Must not change
                until the backward pass.
            parameters: for each stage its parameters: (w,) or (w, b) for a convolution, () for
                others; stages at the end that have none may be left out. They must have the dtype
                of x and not change until the backward pass.
            keep: whether `Pass.backward` will be called. Without, less memory is used.

        Returns:
            The pass; its `output` is [N, H', W', C'].

        Raises:
            ValueError: shapes or dtypes do not fit.
        """
        return Pass(self._stages, x, parameters, keep)


class Pass:
    """One forward pass of a chain, with what its backward pass needs.

    Attributes:
        output: [N, H', W', C'], the last stage's result. Must not be changed before `backward`.
    """

    output: Array

    def __init__(
        self,
        stages: Sequence[Stage],
        x: Array,
        parameters: Sequence[Sequence[Array]],
        keep: bool,
    ) -> None:
        if x.ndim != 4:
            raise ValueError(f"images must be [N, H, W, C], got an array of shape {x.shape}.")
        if x.dtype.name not in ("float32", "float64"):
            raise ValueError(f"images must be float32 or float64, got {x.dtype.name}. Convert them.")
        if len(parameters) > len(stages):
            raise ValueError(f"got parameters for {len(parameters)} stages, there are {len(stages)}.")
        parameters = [*parameters, *[()] * (len(stages) - len(parameters))]
        self._device = device_of(x)
        self._saved: list[list[Saved]] | None = [] if keep else None
        self._bind(*fused(stages, parameters, x.shape[1:]), x)
        self.output = self._forward(self._device.xp.ascontiguousarray(x))

    def backward(
        self,
        dy: Array,
        input_gradient: bool = True,
        out: Sequence[Array | None] = (),
        keep: bool = False,
    ) -> tuple[Array | None, list[Array]]:
        """Return the gradients for one output gradient.

        Args:
            dy: the output's gradient, of its shape and dtype. Not modified.
            input_gradient: whether the gradient of x is wanted; the first stage is cheaper without.
            out: where parameter gradients are written (a gradient arena's views), in the order of
                the parameters; None or missing for a new array.
            keep: whether `backward` will be called again; without, memory goes back now.

        Returns:
            The gradient of x, or None, and those of all parameters, stage by stage.

        Raises:
            ValueError: `dy` has another shape, or there is nothing to go back through: the pass was
                made with keep=False, or was gone back through already.
        """
        if self._saved is None:
            raise ValueError(
                "this pass kept nothing (keep=False), or was gone back through before. "
                "Call forward or the first backward with keep=True."
            )
        if dy.shape != self.output.shape:
            raise ValueError(f"the output's gradient has shape {dy.shape}, the output {self.output.shape}.")
        saved = self._saved
        dx = self._backward(self._device.xp.ascontiguousarray(dy), saved, input_gradient)
        gradients = [g for kernel in self._kernels for g in kernel.parameter_gradients()]
        for position, (gradient, target) in enumerate(zip(gradients, out, strict=False)):
            if target is not None:
                target[...] = gradient
                gradients[position] = target
        if not keep:
            self._kernels, self._between, self._saved = [], [], None
        return dx, gradients

    def _bind(self, stages: Sequence[Stage], parameters: Sequence[Sequence[Array]], x: Array) -> None:
        shape = x.shape[1:]
        shapes = [shape]
        most = 1
        for stage, arrays in zip(stages, parameters, strict=True):
            for array in arrays:
                if array.dtype != x.dtype:
                    raise ValueError(
                        f"a parameter of shape {array.shape} is {array.dtype.name}, "
                        f"the images are {x.dtype.name}. They must agree."
                    )
            after = stage.output_shape(shapes[-1], arrays)
            most = max(most, stage.bytes_per_image(shapes[-1], arrays, x.dtype.itemsize))
            shapes.append(after)
        # A GPU wants all the work at once.
        fitting = len(x) if self._device.kind == "cuda" else _PIECE_BYTES // most
        self._piece = max(1, min(len(x), fitting))
        pieces = max(1, -(-len(x) // self._piece))
        contexts = [Context(before, x.dtype, self._device, self._piece, pieces) for before in shapes]
        self._kernels: list[Kernel] = [
            stage.bind(context, arrays)
            for stage, context, arrays in zip(stages, contexts, parameters, strict=False)
        ]
        # What lies between the stages: between number i - 1 and number i the i-th.
        self._between = [Scratch(context) for context in contexts]
        self._shapes = shapes

    def _forward(self, x: Array) -> Array:
        output = self._device.empty((len(x), *self._shapes[-1]), x.dtype)
        keep = self._saved is not None
        last = len(self._kernels)
        for start in range(0, len(x), self._piece):
            part = x[start : start + self._piece]
            saved: list[Saved] = []
            for number, kernel in enumerate(self._kernels, 1):
                if number == last:
                    y = output[start : start + self._piece]
                else:
                    scratch = self._between[number]
                    reserve = scratch.fresh if keep else scratch.take
                    y = reserve("values", (len(part), *self._shapes[number]))
                saved.append(kernel.forward(part, y, keep))
                part = y
            if self._saved is not None:
                self._saved.append(saved)
        return output

    def _backward(self, dy: Array, saved: list[list[Saved]], input_gradient: bool) -> Array | None:
        shape = (len(dy), *self._shapes[0])
        whole = self._device.empty(shape, dy.dtype) if input_gradient else None
        for piece, kept in enumerate(saved):
            inside = slice(piece * self._piece, (piece + 1) * self._piece)
            part = dy[inside]
            for number in reversed(range(len(self._kernels))):
                if number > 0:
                    shape = (len(part), *self._shapes[number])
                    dx = self._between[number].take("gradient", shape)
                else:
                    dx = whole if whole is None else whole[inside]
                self._kernels[number].backward(part, kept[number], dx)
                if dx is not None:
                    part = dx
        return whole
