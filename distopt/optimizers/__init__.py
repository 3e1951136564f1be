"""Optimizers in the TensorFlow tradition: slots, one rule each, hyperparameters that can be schedules.

Keras' names and numerics are here, TensorFlow 1's in `distopt.optimizers.tf1`, those of Keras 2.11 and
later in `distopt.optimizers.keras_new`.
"""

from distopt.optimizers import keras_new, tf1
from distopt.optimizers.adadelta import Adadelta
from distopt.optimizers.adagrad import Adagrad
from distopt.optimizers.adam import Adam
from distopt.optimizers.adamax import Adamax
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.optimizers.ftrl import Ftrl
from distopt.optimizers.gradient_descent import SGD
from distopt.optimizers.nadam import Nadam
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.rmsprop import RMSprop

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "Adamax",
    "ExponentialMovingAverage",
    "Ftrl",
    "Nadam",
    "Optimizer",
    "RMSprop",
    "keras_new",
    "tf1",
]
