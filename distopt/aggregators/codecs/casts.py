"""Codecs of two bytes per number: half precision with a scale per block, and bfloat16."""

from __future__ import annotations

import numpy as np

from distopt.aggregators.codecs.blocks import check_block, in_blocks
from distopt.aggregators.codecs.codec import Codec, as_bytes, join
from distopt.backend import Array, namespace

__all__ = ["BFloat16", "Half"]

_TOP = 15
"""Blocks are scaled to below 2**15: half precision ends at 65504, and nothing may be rounded up to inf."""

_LOWEST = -110
"""Exponent of the smallest scale: float32's last denormal, 2**-149, becomes half's, 2**-24."""


class Half(Codec):
    """IEEE half precision, scaled by a power of two per block, so that nothing overflows or vanishes.

    A number is off by at most 2**-11 of itself, or by 2**-39 of the largest in its block where that is
    more. Infinite numbers and NaN stay what they are; beyond 3.4019e38 it rounds to infinity.

    Args:
        block: how many numbers share a scale, which costs one byte.
    """

    def __init__(self, block: int = 4096) -> None:
        check_block("fp16", block)
        self.block = block

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        return "fp16" if self.block == 4096 else f"fp16:{self.block}"

    def encode(self, values: Array) -> Array:
        """See `Codec.encode`. The halves, then the blocks' exponents, int8."""
        xp = namespace(values)
        blocks = in_blocks(values.size, self.block)
        rows = blocks.rows(values)
        largest = xp.abs(rows)
        largest[~xp.isfinite(largest)] = 0
        _, exponents = xp.frexp(largest.max(axis=1))
        shifts = xp.maximum(exponents, _LOWEST) - _TOP  # from -125 to 113: powers that float32 has
        scaled = rows * _power(-shifts)[:, None]
        return join(blocks.flat(scaled).astype(np.float16), shifts.astype(np.int8))

    def decode(self, payload: Array, n: int) -> Array:
        """See `Codec.decode`."""
        blocks = in_blocks(n, self.block)
        values = payload[: 2 * n].view(np.float16).astype(np.float32)
        rows = blocks.rows(values)
        shifts = payload[2 * n :].view(np.int8).astype(np.int32)
        with np.errstate(over="ignore"):
            rows *= _power(shifts)[:, None]
        return blocks.flat(rows)

    def wire_bytes(self, n: int) -> int:
        """See `Codec.wire_bytes`."""
        return 2 * n + in_blocks(n, self.block).count


class BFloat16(Codec):
    """bfloat16: float32's range with 8 bits of precision, rounded to nearest, ties to even.

    A number is off by at most 2**-8 of itself (denormal ones by 2**-134). Beyond 3.3895e38 it rounds to
    infinity, as IEEE 754 has it.
    """

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        return "bf16"

    def encode(self, values: Array) -> Array:
        """See `Codec.encode`. By integers: CuPy has no bfloat16."""
        xp = namespace(values)
        bits = values.view(np.uint32)
        rounded = bits >> np.uint32(16)
        rounded &= np.uint32(1)
        rounded += np.uint32(0x7FFF)
        rounded += bits
        rounded >>= np.uint32(16)
        # Rounding may carry a NaN's last bits out of it.
        rounded[xp.isnan(values)] = 0x7FC0
        return as_bytes(rounded.astype(np.uint16))

    def decode(self, payload: Array, n: int) -> Array:
        """See `Codec.decode`."""
        bits = payload.view(np.uint16)[:n].astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)

    def wire_bytes(self, n: int) -> int:
        """See `Codec.wire_bytes`."""
        return 2 * n


def _power(exponents: Array) -> Array:
    """Return 2**exponent in float32, exactly, for exponents from -126 to 127."""
    return ((exponents + 127).astype(np.uint32) << np.uint32(23)).view(np.float32)
