"""A codec that sends the largest numbers with their places, and leaves the others out."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal, Self

import numpy as np

from distopt.aggregators.codecs.codec import Codec, Place, as_bytes, join
from distopt.backend import Array, namespace

__all__ = ["TopK"]


class TopK(Codec):
    """The k numbers of largest absolute value, of each group of variables that is exchanged together.

    What it leaves out has at most (1 - k/n) of the squares (Stich and others, "Sparsified SGD with Memory",
    2018), so use it with `ErrorFeedback`, or small gradients never arrive. NaN and infinity are the largest.

    Every rank gets every rank's numbers: what is received grows with the number of ranks.

    Args:
        amount: a fraction in (0, 1), rounded up to at least one number; or how many numbers, an integer.
        values: codec of the chosen numbers, which come in the order of their places; float32 when not
            given. `TopK(0.01, Half())` takes 6 bytes for each instead of 8.

    Raises:
        ValueError: an amount of nothing, or a codec of the values that is itself not one of slices.
    """

    exchange: ClassVar[Literal["slices", "gather"]] = "gather"

    def __init__(self, amount: float, values: Codec | None = None) -> None:
        given: Any = amount
        whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
        if not (given >= 1 if whole else 0 < given < 1):
            raise ValueError(
                f"top-k takes a fraction between 0 and 1, or how many numbers, at least 1; got {amount!r}"
            )
        inner: Any = values
        if inner is not None and not (isinstance(inner, Codec) and inner.exchange == "slices"):
            raise ValueError(
                f"the values of top-k are encoded by a codec such as fp16, bf16, int8 or sign; got {values!r}"
            )
        self.amount, self.values = amount, values
        self.random = values is not None and values.random

    @property
    def name(self) -> str:
        """See `Codec.name`."""
        return f"topk:{self.amount}" + ("" if self.values is None else f":{self.values.name}")

    def count(self, n: int) -> int:
        """Return how many of n numbers are sent."""
        wanted = math.ceil(self.amount * n) if self.amount < 1 else int(self.amount)
        return min(n, max(1, wanted))

    def at(self, place: Place) -> Self:
        """See `Codec.at`."""
        if self.values is None:
            return self
        there = copy.copy(self)
        there.values = self.values.at(place)
        return there

    def encode(self, values: Array) -> Array:
        """See `Codec.encode`. The places, uint32 and ascending, then the numbers.

        Raises:
            ValueError: more than 2**32 numbers.
        """
        xp = namespace(values)
        n, k = values.size, self.count(values.size)
        if n > 1 << 32:
            raise ValueError(f"top-k counts places in 32 bits, got {n} numbers; use smaller buckets")
        sizes = xp.abs(values)
        sizes[xp.isnan(sizes)] = np.inf
        chosen = xp.argpartition(sizes, n - k)[n - k :] if k < n else xp.arange(n)
        places = xp.sort(chosen)
        found = values[places]
        encoded = as_bytes(found) if self.values is None else self.values.encode(found)
        return join(places.astype(np.uint32), encoded)

    def decode(self, payload: Array, n: int) -> Array:
        """See `Codec.decode`."""
        values = namespace(payload).zeros(n, np.float32)
        places, found = self._split(payload, n)
        values[places] = found
        return values  # type: ignore[no-any-return]

    def add_decoded(self, payload: Array, total: Array) -> None:
        """See `Codec.add_decoded`."""
        places, found = self._split(payload, total.size)
        total[places] += found  # no place comes twice

    def wire_bytes(self, n: int) -> int:
        """See `Codec.wire_bytes`."""
        k = self.count(n)
        return 4 * k + (4 * k if self.values is None else self.values.wire_bytes(k))

    def _split(self, payload: Array, n: int) -> tuple[Array, Array]:
        k = self.count(n)
        places = payload[: 4 * k].view(np.uint32).astype(np.int64)
        rest = payload[4 * k :]
        return places, rest.view(np.float32) if self.values is None else self.values.decode(rest, k)
