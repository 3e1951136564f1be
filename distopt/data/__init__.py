"""Data sets, the order of examples, their augmentation, and batches made ahead of time.

The data sets themselves are modules: `distopt.data.cifar10` and `distopt.data.digits`, each with
`load`.
"""

from distopt.data.augment import DIGITS, TUTORIAL, Augmentation
from distopt.data.dataset import Dataset, require_finite
from distopt.data.prefetch import Prefetcher
from distopt.data.sampler import Sampler, evaluation_batches, shard

__all__ = [
    "DIGITS",
    "TUTORIAL",
    "Augmentation",
    "Dataset",
    "Prefetcher",
    "Sampler",
    "evaluation_batches",
    "require_finite",
    "shard",
]
