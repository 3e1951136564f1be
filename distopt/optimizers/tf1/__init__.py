"""The optimizers of TensorFlow 1 (`tf.train.*Optimizer`), with their names, signatures and numerics."""

from distopt.optimizers.tf1.adadelta import AdadeltaOptimizer
from distopt.optimizers.tf1.adagrad import AdagradDAOptimizer, AdagradOptimizer
from distopt.optimizers.tf1.adam import AdamOptimizer
from distopt.optimizers.tf1.ftrl import FtrlOptimizer
from distopt.optimizers.tf1.gradient_descent import GradientDescentOptimizer, MomentumOptimizer
from distopt.optimizers.tf1.optimizer import Optimizer
from distopt.optimizers.tf1.proximal import ProximalAdagradOptimizer, ProximalGradientDescentOptimizer
from distopt.optimizers.tf1.rmsprop import RMSPropOptimizer

__all__ = [
    "AdadeltaOptimizer",
    "AdagradDAOptimizer",
    "AdagradOptimizer",
    "AdamOptimizer",
    "FtrlOptimizer",
    "GradientDescentOptimizer",
    "MomentumOptimizer",
    "Optimizer",
    "ProximalAdagradOptimizer",
    "ProximalGradientDescentOptimizer",
    "RMSPropOptimizer",
]
