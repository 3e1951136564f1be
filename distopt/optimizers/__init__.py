"""Optimizers in the TensorFlow tradition: slots, one rule each, hyperparameters that can be schedules.

Keras' names and numerics are here, TensorFlow 1's in `distopt.optimizers.tf1`.
"""

from distopt.optimizers import tf1
from distopt.optimizers.adam import Adam
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.optimizers.gradient_descent import SGD
from distopt.optimizers.loss_scale import LossScaleOptimizer
from distopt.optimizers.optimize_loss import OPTIMIZER_CLS_NAMES, OPTIMIZER_SUMMARIES, optimize_loss
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.train_op import TrainOp

__all__ = [
    "OPTIMIZER_CLS_NAMES",
    "OPTIMIZER_SUMMARIES",
    "SGD",
    "Adam",
    "ExponentialMovingAverage",
    "LossScaleOptimizer",
    "Optimizer",
    "TrainOp",
    "optimize_loss",
    "tf1",
]
