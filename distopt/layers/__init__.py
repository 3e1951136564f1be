"""Layers, as functions and as objects.

A function makes its variables in the current variable scope, by the rules of `get_variable`, and can have
default arguments from an `arg_scope`; an object makes its own on the first call and keeps them:

    x = layers.conv2d(images, 64, 5, activation="relu", name="conv1")

    conv1 = layers.Conv2D(64, 5, activation="relu", name="conv1")
    x = conv1(images)

`layer` says what a layer is, `fused` has chains of image layers as one primitive, `sequential` makes a
model of objects, `losses` collects losses; the others are the layers, by family.
"""

from distopt.layers.activations import ACTIVATIONS
from distopt.layers.convolutional import Conv2D, conv2d
from distopt.layers.dense import Dense, dense, fully_connected
from distopt.layers.dropout import Dropout, dropout
from distopt.layers.embedding import Embedding, embedding
from distopt.layers.fused import (
    AveragePool,
    Convolution,
    LocalResponseNormalization,
    MaxPool,
    sequence,
)
from distopt.layers.layer import Layer
from distopt.layers.losses import (
    add_loss,
    apply_regularization,
    get_losses,
    get_regularization_loss,
    get_total_loss,
    regularization_tensors,
)
from distopt.layers.normalization import BatchNormalization, batch_norm, batch_normalization
from distopt.layers.pooling import (
    AveragePool2D,
    GlobalAveragePool,
    LocalResponseNorm,
    MaxPool2D,
    average_pool2d,
    global_average_pool,
    local_response_normalization,
    max_pool2d,
)
from distopt.layers.sequential import Sequential
from distopt.layers.shaping import Flatten, flatten

__all__ = [
    "ACTIVATIONS",
    "AveragePool",
    "AveragePool2D",
    "BatchNormalization",
    "Conv2D",
    "Convolution",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "GlobalAveragePool",
    "Layer",
    "LocalResponseNorm",
    "LocalResponseNormalization",
    "MaxPool",
    "MaxPool2D",
    "Sequential",
    "add_loss",
    "apply_regularization",
    "average_pool2d",
    "batch_norm",
    "batch_normalization",
    "conv2d",
    "dense",
    "dropout",
    "embedding",
    "flatten",
    "fully_connected",
    "get_losses",
    "get_regularization_loss",
    "get_total_loss",
    "global_average_pool",
    "local_response_normalization",
    "max_pool2d",
    "regularization_tensors",
    "sequence",
]
