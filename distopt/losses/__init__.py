"""Losses and their reductions under Keras' names, and what several ranks have to divide by.

    >>> import numpy as np
    >>> errors = mean_squared_error(np.array([[0.0], [1.0]]), np.array([[2.0], [4.0]]))
    >>> errors.numpy().tolist()
    [4.0, 9.0]
    >>> float(compute_average_loss(errors, num_replicas=2))
    3.25

Gradients are summed over ranks. The gradient of the mean over the global batch is therefore the sum of the
gradients of per-rank *sums* over its size: with `compute_average_loss(per_example_loss,
global_batch_size=...)` and an aggregator with `reduction="sum"`, or with `Reduction.SUM` and one with
`reduction="mean"`, which counts the examples itself. For x = [1, 2, 3, 4] on two ranks and the loss w * x
this gives 2.5; the sum of the ranks' means gives 5. `is_mean` finds losses that are means already.
"""

from distopt.losses.classes import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    Loss,
    MeanAbsoluteError,
    MeanSquaredError,
    SparseCategoricalCrossentropy,
)
from distopt.losses.functions import (
    binary_crossentropy,
    categorical_crossentropy,
    mean_absolute_error,
    mean_squared_error,
    sparse_categorical_crossentropy,
)
from distopt.losses.reduction import (
    Reduction,
    compute_average_loss,
    compute_weighted_loss,
    scale_regularization_loss,
)
from distopt.ops import is_mean

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "Loss",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Reduction",
    "SparseCategoricalCrossentropy",
    "binary_crossentropy",
    "categorical_crossentropy",
    "compute_average_loss",
    "compute_weighted_loss",
    "is_mean",
    "mean_absolute_error",
    "mean_squared_error",
    "scale_regularization_loss",
    "sparse_categorical_crossentropy",
]
