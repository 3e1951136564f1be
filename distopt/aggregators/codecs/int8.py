"""A codec of one byte per number: 8-bit integers with a scale per block."""

from __future__ import annotations

import copy
import zlib
from typing import Self

import numpy as np

from distopt import counter_random
from distopt.aggregators.codecs.blocks import check_block, in_blocks
from distopt.aggregators.codecs.codec import Codec, Place, join
from distopt.backend import Array, namespace

__all__ = ["Int8"]

_STREAM = counter_random.stream("distopt.codecs.int8")
_LARGEST_SCALE = np.nextafter(np.float32(np.finfo(np.float32).max / 127), np.float32(0))


class Int8(Codec):
    """8-bit integers: each block's largest number is 127 times its scale.

    A number is off by at most half the scale, which is 1/254 of the largest in its block; with stochastic
    rounding by less than the whole scale, but by nothing in the mean (Alistarh and others, "QSGD", 2017).
    A number that is not finite makes NaN of its whole block.

    Args:
        block: how many numbers share a scale, which costs four bytes.
        stochastic: round up or down at random, with the chance that makes the mean right; else to
            nearest, ties to even. The random numbers depend on step, rank and variables, so a run can be
            repeated and resumed.
        seed: of the random numbers.
    """

    def __init__(self, block: int = 4096, stochastic: bool = False, seed: int = 0) -> None:
        check_block("int8", block)
        self.block, self.random, self.seed = block, stochastic, seed
        self._place = ""

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        size = "" if self.block == 4096 else f":{self.block}"
        return f"int8{size}{':stochastic' if self.random else ''}"

    def at(self, place: Place) -> Self:
        """See `Codec.at`."""
        if not self.random:
            return self
        there = copy.copy(self)
        there._place = str(place)
        return there

    def encode(self, values: Array) -> Array:
        """See `Codec.encode`. The scales, float32, then the integers."""
        xp = namespace(values)
        blocks = in_blocks(values.size, self.block)
        rows = blocks.rows(values)
        with np.errstate(invalid="ignore", divide="ignore"):
            # NaN and infinity go through max and min, and come out of inf - inf as NaN.
            largest = xp.maximum(rows.max(axis=1), -rows.min(axis=1))
            largest += largest - largest
            scales = xp.minimum(largest / np.float32(127), _LARGEST_SCALE)
            usable = scales > 0
            steps = rows / xp.where(usable, scales, np.float32(1))[:, None]
        steps[~usable] = 0  # NaN has no integer; its block decodes to NaN by the scale
        if self.random:
            self._round_at_random(steps)
        else:
            xp.rint(steps, out=steps)
        xp.clip(steps, -127, 127, out=steps)
        return join(scales, blocks.flat(steps).astype(np.int8))

    def decode(self, payload: Array, n: int) -> Array:
        """See `Codec.decode`."""
        blocks = in_blocks(n, self.block)
        scales = payload[: 4 * blocks.count].view(np.float32)
        rows = blocks.rows(payload[4 * blocks.count :].view(np.int8).astype(np.float32))
        rows *= scales[:, None]
        return blocks.flat(rows)

    def wire_bytes(self, n: int) -> int:
        """See `Codec.wire_bytes`."""
        return n + 4 * in_blocks(n, self.block).count

    def _round_at_random(self, steps: Array) -> None:
        xp = namespace(steps)
        where = xp.asarray(zlib.crc32(self._place.encode()), np.int64)
        chances = counter_random.uniform(self.seed, _STREAM, 0, where, steps.size).reshape(steps.shape)
        below = xp.floor(steps)
        above = chances < steps - below
        below += above
        steps[...] = below
