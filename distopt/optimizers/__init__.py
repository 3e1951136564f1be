"""Optimizers in the TensorFlow tradition: slots, one rule each, hyperparameters that can be schedules.

Keras' names and numerics are here, TensorFlow 1's in `distopt.optimizers.tf1`.
"""

from distopt.optimizers import tf1
from distopt.optimizers.adam import Adam
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.optimizers.gradient_descent import SGD
from distopt.optimizers.optimizer import Optimizer

__all__ = ["SGD", "Adam", "ExponentialMovingAverage", "Optimizer", "tf1"]
