"""The step that benchmarks measure: the CIFAR-10 tutorial's network in the real Trainer, on random images."""

from __future__ import annotations

import dataclasses

import numpy as np

from distopt.backend import Device
from distopt.communicators import Communicator
from distopt.data.dataset import Dataset
from distopt.models import cifar10
from distopt.replica import Batch
from distopt.trainer import Settings, Trainer

__all__ = ["LEARNING_RATE", "WEIGHT_DECAY", "make_trainer", "prepared_batch"]

LEARNING_RATE = 0.1
WEIGHT_DECAY = 0.004
"""Of the tutorial's two hidden dense layers: 0.004 / 2 times the sum of squares."""

_EXAMPLES = 2048  # 6 MiB of pixels: larger than a core's cache, as a real data set is
_NEVER = 10**9


def make_trainer(
    communicator: Communicator,
    device: Device,
    global_batch: int,
    steps: int,
    normalize: bool = True,
    canonical: int | None = None,
) -> Trainer:
    """Return a trainer as `distopt train cifar10` makes it, on random images of CIFAR-10's shape.

    Args:
        communicator: of all ranks.
        device: of this rank's only replica.
        global_batch: examples in a step, over all ranks.
        steps: how many `Trainer.run` will do.
        normalize: with the two local response normalizations, or without.
        canonical: number of canonical shards, if any.
    """
    model = cifar10.network if normalize else cifar10.network_without_normalization
    settings = Settings(
        global_batch, steps, learning_rate=LEARNING_RATE, log_every=_NEVER, canonical=canonical
    )
    task = dataclasses.replace(cifar10.TASK, model=model)
    return Trainer(task, _random_data(max(_EXAMPLES, global_batch)), communicator, [device], settings)


def prepared_batch(examples: int) -> Batch:
    """Return an augmented batch of random images, to be used again and again where input is not measured."""
    data, chosen = _random_data(examples), np.arange(examples)
    images = cifar10.TASK.augmentation.train(data.images, np.zeros_like(chosen), chosen, seed=0)
    return Batch(images, data.labels)


def _random_data(examples: int) -> Dataset:
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, examples)
    images = random.integers(0, 256, (examples, 32, 32, 3), np.uint8)
    return Dataset(images, labels, tuple("0123456789"), "random images")
