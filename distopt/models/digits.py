"""A small convolutional network for the handwritten digits that come with the package."""

from __future__ import annotations

from typing import Any

from distopt import initializers, layers
from distopt.data import digits
from distopt.data.augment import DIGITS
from distopt.data.dataset import Dataset, Split
from distopt.models.task import Task
from distopt.optimizers import Adam, Optimizer
from distopt.schedules import CosineDecay
from distopt.tape import Tensor

__all__ = ["TASK", "network"]

_STEPS = 600


def network(images: Any) -> Tensor:
    """Return the logits [N, 10] of images [N, 8, 8, 1]: two 3x3 convolutions, a pool, two dense layers."""
    convolutions = [
        layers.Convolution(
            filters, 3, relu=True, kernel_initializer=initializers.HeNormal(), name=f"conv{number}"
        )
        for number, filters in ((1, 16), (2, 32))
    ]
    x = layers.sequence(images, [*convolutions, layers.MaxPool(window=2, strides=2, padding="SAME")])
    x = layers.flatten(x)
    x = layers.dense(x, 64, relu=True, kernel_initializer=initializers.HeNormal(), name="dense")
    return layers.dense(x, 10, name="logits")


def _load(split: Split, *, data_dir: str | None, communicator: Any) -> Dataset:
    del data_dir, communicator  # every installation has the data
    return digits.load(split)


def _optimizer(
    learning_rate: float | None, num_examples: int, global_batch: int, **options: Any
) -> Optimizer:
    del num_examples, global_batch
    # Down to 5 % over the default length, so that a longer run still moves.
    rate = CosineDecay(0.003 if learning_rate is None else learning_rate, _STEPS, alpha=0.05)
    return Adam(rate, **options)


TASK = Task(
    name="digits",
    model=network,
    load=_load,
    augmentation=DIGITS,
    optimizer=_optimizer,
    global_batch=64,
    steps=_STEPS,
    average_decay=0.99,
)
"""The quick start's training."""
