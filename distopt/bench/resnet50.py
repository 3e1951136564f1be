"""The gradient tensors of ResNet-50, by construction: what is reduced in one step of a usual network."""

from __future__ import annotations

__all__ = ["shapes"]

_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))  # (blocks, width); a block gives 4 times its width
_CLASSES = 1000


def shapes() -> list[tuple[int, ...]]:
    """Return the shapes of its 161 trainable variables, in the order of their creation.

    53 convolutions without biases, each followed by a batch normalization's gamma and beta, and a dense layer
    with biases: 25,557,032 numbers. (He et al. 2015, "Deep Residual Learning for Image Recognition", table
    1.)
    """
    found: list[tuple[int, ...]] = []

    def convolution(side: int, inputs: int, outputs: int) -> None:
        found.extend([(side, side, inputs, outputs), (outputs,), (outputs,)])

    convolution(7, 3, 64)
    inputs = 64
    for blocks, width in _STAGES:
        for block in range(blocks):
            convolution(1, inputs, width)
            convolution(3, width, width)
            convolution(1, width, 4 * width)
            if block == 0:
                convolution(1, inputs, 4 * width)  # the shortcut, where the number of channels changes
            inputs = 4 * width
    return [*found, (inputs, _CLASSES), (_CLASSES,)]
