"""Optimizers in the TensorFlow tradition: slots, one rule each, hyperparameters that can be schedules."""

from distopt.optimizers.adam import Adam
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.optimizers.gradient_descent import GradientDescent, Momentum
from distopt.optimizers.moving_averages import assign_moving_average, weighted_moving_average
from distopt.optimizers.optimizer import Optimizer

__all__ = [
    "Adam",
    "ExponentialMovingAverage",
    "GradientDescent",
    "Momentum",
    "Optimizer",
    "assign_moving_average",
    "weighted_moving_average",
]
