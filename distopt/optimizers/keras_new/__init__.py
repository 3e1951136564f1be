"""The optimizers of Keras 2.11 to 2.15, where they differ from the older ones in `distopt.optimizers`.

Sparse gradients update all rows, as dense ones with zeros would; epsilon is taken as it is given; and all
have `weight_decay` and averages of the weights. The rules are those of the older ones.
"""

from distopt.optimizers.keras_new.decoupled import AdamW, Lion
from distopt.optimizers.keras_new.forms import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Nadam, RMSprop
from distopt.optimizers.keras_new.optimizer import Optimizer

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lion",
    "Nadam",
    "Optimizer",
    "RMSprop",
]
