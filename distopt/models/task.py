"""A task: everything that `distopt train NAME` needs to know about a model and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from distopt.data.augment import Augmentation
from distopt.data.dataset import Dataset, Split
from distopt.optimizers import Optimizer
from distopt.tape import Tensor

__all__ = ["Loader", "Task"]


class Loader(Protocol):
    """Gives a split of a data set; on several ranks every one calls it."""

    def __call__(self, split: Split, *, data_dir: str | None, communicator: Any) -> Dataset:
        """Return the split "train" or "test"."""
        ...


@dataclass(frozen=True)
class Task:
    """A model with its data, optimizer and settings.

    Attributes:
        name: what the command line calls it.
        model: float32 images [N, height, width, channels] -> logits [N, classes].
        load: gives the data.
        augmentation: how images become input.
        optimizer: (learning rate or None for the task's own, examples per epoch, global batch, options
            of `Optimizer`) -> an optimizer.
        global_batch: default size of the global batch.
        steps: default number of steps.
        average_decay: largest decay of the weights' moving averages.
    """

    name: str
    model: Callable[[Any], Tensor]
    load: Loader
    augmentation: Augmentation
    optimizer: Callable[..., Optimizer]
    global_batch: int
    steps: int
    average_decay: float
