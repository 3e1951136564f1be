"""Optimizers in the TensorFlow tradition: slots, one rule each, hyperparameters that can be schedules.

Keras' names and numerics are here, TensorFlow 1's in `distopt.optimizers.tf1`, the names and signatures of
tf.contrib.opt and TensorFlow Addons in `distopt.optimizers.contrib`.
"""

from distopt.optimizers import contrib, tf1
from distopt.optimizers.adam import Adam
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.optimizers.gradient_descent import SGD
from distopt.optimizers.lamb import LAMB
from distopt.optimizers.lars import LARS
from distopt.optimizers.lazy_adam import LazyAdam
from distopt.optimizers.lion import Lion
from distopt.optimizers.muon import Muon
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.weight_decay import SGDW, AdamW

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "SGDW",
    "Adam",
    "AdamW",
    "ExponentialMovingAverage",
    "LazyAdam",
    "Lion",
    "Muon",
    "Optimizer",
    "contrib",
    "tf1",
]
