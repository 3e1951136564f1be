"""Error feedback: what a codec left out of one step is added to the next."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from distopt.aggregators.codecs.codec import Codec
from distopt.aggregators.codecs.powersgd import PowerSGD
from distopt.backend import Array

__all__ = ["Compression", "ErrorFeedback", "split_again"]


class ErrorFeedback:
    """Remembers what a codec leaves out, and adds it before encoding the next step.

    Seide and others, "1-Bit Stochastic Gradient Descent", 2014; for the sum of all ranks too: Tang and
    others, "DoubleSqueeze", 2019. Then what arrives over many steps is what was sent, but for what is left
    out of the last one: sum of decoded + residual = sum of gradients.

    An aggregator (`aggregators.Compressed`) keeps the residuals, in float32: each rank's of its own
    gradients, in the same unit as these, sums over examples; and where the sum is encoded again, that of
    the rank that does it, in the unit of the result. So with "mean", what was left out of a step of N
    examples counts N/M of its due when the next step has M. They don't change with a step that is
    left out: of no examples, or not finite. A loss scale that changes is not known here: what is left
    from before is then off by that factor, once.

    Args:
        codec: what encodes.

    Raises:
        TypeError: it is no codec, or has error feedback already.
    """

    def __init__(self, codec: Codec | PowerSGD) -> None:
        given: Any = codec
        if not isinstance(given, Codec | PowerSGD):
            raise TypeError(f"ErrorFeedback takes a codec without error feedback, got {given!r}")
        self.codec = codec

    @property
    def name(self) -> str:
        """Short name with its arguments, as on the command line."""
        return f"ef-{self.codec.name}"

    def __repr__(self) -> str:
        return f"<codec {self.name}>"


Compression: TypeAlias = "Codec | PowerSGD | ErrorFeedback"
"""What `aggregators.Compressed` takes."""


def split_again(residuals: Array, ranks: int) -> Array:
    """Divide residuals among another number of ranks, so that their sum over ranks stays what it is.

    Args:
        residuals: float32 [old ranks, n].
        ranks: new number.

    Returns:
        float32 [ranks, n]; the same bits where the number of ranks has not changed.
    """
    if len(residuals) == ranks:
        return residuals
    total = residuals.astype(np.float64).sum(axis=0)
    parts = np.empty((ranks, residuals.shape[1]), np.float32)
    parts[1:] = total / ranks
    parts[0] = total - (ranks - 1) * parts[-1].astype(np.float64) if ranks > 1 else total
    return parts
