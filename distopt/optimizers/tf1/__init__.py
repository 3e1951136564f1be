"""The optimizers of TensorFlow 1 (`tf.train.*Optimizer`), with their names, signatures and numerics."""

from distopt.optimizers.tf1.adam import AdamOptimizer
from distopt.optimizers.tf1.gradient_descent import GradientDescentOptimizer, MomentumOptimizer
from distopt.optimizers.tf1.optimizer import Optimizer

__all__ = ["AdamOptimizer", "GradientDescentOptimizer", "MomentumOptimizer", "Optimizer"]
