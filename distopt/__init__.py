"""distopt: exact data-parallel training for NumPy and CuPy over MPI.

Every replica computes the gradients of its part of the global batch, an aggregator sums them over all
ranks, and an optimizer in the TensorFlow tradition applies them. See `docs/design.md`.
"""

from distopt import (
    aggregators,
    backend,
    constraints,
    data,
    errors,
    initializers,
    layers,
    losses,
    ops,
    optimizers,
    regularizers,
    schedules,
    scopes,
    summaries,
    transforms,
)
from distopt.aggregators import AllReduce, Ticket, broadcast_variables
from distopt.backend import Device
from distopt.communicators import connect
from distopt.optimizers import SGD, Adam, ExponentialMovingAverage, Optimizer
from distopt.scopes import get_variable, variable_scope
from distopt.tape import (
    AggregationMethod,
    GradientTape,
    Tensor,
    UnconnectedGradients,
    gradients,
    primitive,
)
from distopt.variables import Arena, IndexedSlices, Variable

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AggregationMethod",
    "AllReduce",
    "Arena",
    "Device",
    "ExponentialMovingAverage",
    "GradientTape",
    "IndexedSlices",
    "Optimizer",
    "SGD",
    "Tensor",
    "Ticket",
    "UnconnectedGradients",
    "Variable",
    "aggregators",
    "backend",
    "broadcast_variables",
    "connect",
    "constraints",
    "data",
    "errors",
    "get_variable",
    "gradients",
    "initializers",
    "layers",
    "losses",
    "ops",
    "optimizers",
    "primitive",
    "regularizers",
    "schedules",
    "scopes",
    "summaries",
    "transforms",
    "variable_scope",
]
