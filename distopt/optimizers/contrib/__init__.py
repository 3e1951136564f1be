"""Optimizers with the names and signatures of tf.contrib.opt and TensorFlow Addons.

Those named `...Optimizer` have the interface of TensorFlow 1, the others that of Keras. Numerics and rules
are those of `distopt.optimizers`.
"""

from distopt.optimizers.contrib.addons import SGDW, AdamW
from distopt.optimizers.contrib.extension import extend_with_decoupled_weight_decay
from distopt.optimizers.contrib.opt import (
    AdaMaxOptimizer,
    AdamWOptimizer,
    LARSOptimizer,
    LazyAdamOptimizer,
    MomentumWOptimizer,
    NadamOptimizer,
)
from distopt.optimizers.lamb import LAMB
from distopt.optimizers.lazy_adam import LazyAdam

__all__ = [
    "AdaMaxOptimizer",
    "AdamW",
    "AdamWOptimizer",
    "LAMB",
    "LARSOptimizer",
    "LazyAdam",
    "LazyAdamOptimizer",
    "MomentumWOptimizer",
    "NadamOptimizer",
    "SGDW",
    "extend_with_decoupled_weight_decay",
]
