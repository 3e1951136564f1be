"""Optimizers in the TensorFlow tradition: slots, one rule each, hyperparameters that can be schedules.

Keras' names and numerics (OptimizerV2, TensorFlow 2.4 to 2.10) and the optimizers for large batches are
here; TensorFlow 1's are in `tf1`, those of tf.contrib.opt and TensorFlow Addons in `contrib`, those of
Keras 2.11 and later, where they differ, in `keras_new`.
"""

from distopt.optimizers import contrib, keras_new, tf1
from distopt.optimizers.adadelta import Adadelta
from distopt.optimizers.adagrad import Adagrad
from distopt.optimizers.adam import Adam
from distopt.optimizers.adamax import Adamax
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.optimizers.ftrl import Ftrl
from distopt.optimizers.gradient_descent import SGD
from distopt.optimizers.lamb import LAMB
from distopt.optimizers.lars import LARS
from distopt.optimizers.lazy_adam import LazyAdam
from distopt.optimizers.lion import Lion
from distopt.optimizers.loss_scale import LossScaleOptimizer
from distopt.optimizers.moving_averages import assign_moving_average, weighted_moving_average
from distopt.optimizers.muon import Muon
from distopt.optimizers.nadam import Nadam
from distopt.optimizers.optimize_loss import OPTIMIZER_CLS_NAMES, OPTIMIZER_SUMMARIES, optimize_loss
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.registry import deserialize, get, serialize
from distopt.optimizers.rmsprop import RMSprop
from distopt.optimizers.train_op import TrainOp
from distopt.optimizers.weight_decay import SGDW, AdamW

__all__ = [
    "LAMB",
    "LARS",
    "OPTIMIZER_CLS_NAMES",
    "OPTIMIZER_SUMMARIES",
    "SGD",
    "SGDW",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "ExponentialMovingAverage",
    "Ftrl",
    "LazyAdam",
    "Lion",
    "LossScaleOptimizer",
    "Muon",
    "Nadam",
    "Optimizer",
    "RMSprop",
    "TrainOp",
    "assign_moving_average",
    "contrib",
    "deserialize",
    "get",
    "keras_new",
    "optimize_loss",
    "serialize",
    "tf1",
    "weighted_moving_average",
]
