"""A codec of one bit per number: signs, with the mean absolute value of each block."""

from __future__ import annotations

import numpy as np

from distopt.aggregators.codecs.blocks import check_block, in_blocks
from distopt.aggregators.codecs.codec import Codec, join
from distopt.backend import Array, namespace

__all__ = ["Sign"]


class Sign(Codec):
    """Signs, times the mean absolute value of their block: the scale with the least squared error.

    Its squared error is at most (1 - 1/length) of the block's squares (Karimireddy and others, "Error
    Feedback Fixes SignSGD", 2019), so use it with `ErrorFeedback`; alone it need not converge. Zeros count
    as positive. A number that is not finite makes its whole block so.

    Args:
        block: how many numbers share a scale, which costs four bytes.
    """

    def __init__(self, block: int = 4096) -> None:
        check_block("sign", block)
        self.block = block

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        return "sign" if self.block == 4096 else f"sign:{self.block}"

    def encode(self, values: Array) -> Array:
        """See `Codec.encode`. The scales, float32, then the bits, the first number in the highest."""
        xp = namespace(values)
        blocks = in_blocks(values.size, self.block)
        rows = blocks.rows(values)
        with np.errstate(invalid="ignore"):
            # In float64: the sum of large numbers must not overflow, the mean doesn't.
            means = xp.abs(rows).sum(axis=1, dtype=np.float64) / xp.asarray(blocks.sizes())
            positive = values >= 0
        return join(means.astype(np.float32), xp.packbits(positive))

    def decode(self, payload: Array, n: int) -> Array:
        """See `Codec.decode`."""
        xp = namespace(payload)
        blocks = in_blocks(n, self.block)
        scales = payload[: 4 * blocks.count].view(np.float32)
        bits = xp.unpackbits(payload[4 * blocks.count :])[:n]
        rows = blocks.rows(bits.astype(np.float32))
        rows *= np.float32(2)
        rows -= np.float32(1)
        rows *= scales[:, None]
        return blocks.flat(rows)

    def wire_bytes(self, n: int) -> int:
        """See `Codec.wire_bytes`."""
        return 4 * in_blocks(n, self.block).count + -(-n // 8)
