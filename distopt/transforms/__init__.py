"""Transforms: callables from (gradient, variable) pairs to pairs, between reduction and update.

They see global gradients, the same bits on every rank, so clipping is that of the whole batch, and the
noise of all ranks is the same.

    >>> import numpy as np
    >>> pairs = [(np.array([3.0, 4.0]), None), (None, None)]
    >>> clip_by_norm(pairs, 1.0)
    [(array([0.6, 0.8]), None), (None, None)]

A gradient is an array, `IndexedSlices`, or None, which passes through. Repeated rows of slices are
not summed first: as in TensorFlow [3, 4] at the rows [0, 0] has the norm 5.

A gradient that lies in its variable's arena is changed in place, so that what stands in the arena
is what the optimizer applies. Any other array belongs to whoever made it and is not modified.

**Order.** An optimizer's own clips come first, in the order clipvalue, clipnorm, global_clipnorm, then its
`gradient_transformers` in the order of the list. (Keras forbids to combine them.) `optimize_loss` has
noise, then multipliers, then the clip: for another order make a `Chain`, in which the clips can stand
anywhere as `ClipValue`, `ClipNorm` and `GlobalClipNorm`.

Transforms with a memory (`GradientNoise`, `AdaptiveClipping`, a `Chain` of them) give it by
`variables()`, so that it can be saved.
"""

from distopt.transforms.adaptive import AdaptiveClipping, adaptive_clipping_fn
from distopt.transforms.chain import Chain
from distopt.transforms.clipping import (
    ClipNorm,
    ClipValue,
    GlobalClipNorm,
    clip_by_global_norm,
    clip_by_norm,
    clip_by_value,
    clips,
)
from distopt.transforms.multipliers import GradientMultipliers
from distopt.transforms.noise import GradientNoise
from distopt.transforms.norms import global_norm
from distopt.transforms.pairs import Gradient, Pair, Transform

__all__ = [
    "AdaptiveClipping",
    "Chain",
    "ClipNorm",
    "ClipValue",
    "GlobalClipNorm",
    "Gradient",
    "GradientMultipliers",
    "GradientNoise",
    "Pair",
    "Transform",
    "adaptive_clipping_fn",
    "clip_by_global_norm",
    "clip_by_norm",
    "clip_by_value",
    "clips",
    "global_norm",
]
