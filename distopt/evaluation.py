"""Evaluate a model: every example counted exactly once, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

from distopt import checkpoint
from distopt.aggregators import Ticket
from distopt.backend import Array, Device
from distopt.communicators import Communicator
from distopt.data.dataset import Dataset
from distopt.data.sampler import evaluation_batches
from distopt.errors import CheckpointError
from distopt.models import TASKS, Task
from distopt.optimizers import ExponentialMovingAverage
from distopt.replica import Batch, Replica

__all__ = ["evaluate", "evaluate_file", "load_weights"]


def evaluate(
    replica: Replica, task: Task, data: Dataset, communicator: Communicator, batch: int = 200
) -> dict[str, float]:
    """Return "examples", mean "loss" and "accuracy" over a data set that the ranks share. Collective."""
    total = Ticket()
    for part in evaluation_batches(len(data.labels), communicator.rank, communicator.size, batch):
        images = task.augmentation.evaluate(data.images[part])
        total += replica.evaluate(Batch(images, data.labels[part]))
    sums = total.to_array()
    communicator.all_reduce(sums).wait()
    total = Ticket.from_array(sums)
    return {
        "examples": total.examples,
        "loss": total.loss / total.examples,
        "accuracy": total.correct / total.examples,
    }


def evaluate_file(
    path: Path, averaged: bool, data_dir: str | None, device: Device, communicator: Communicator
) -> tuple[str, dict[str, float]]:
    """Evaluate a weights file on its task's test data; returns the task's name and `evaluate`'s result.

    Raises:
        CheckpointError: the file can't be read, is of an unknown task, or does not fit the model.
    """
    arrays, manifest = checkpoint.load(path)
    task = TASKS.get(str(manifest.get("task")))
    if task is None:
        raise CheckpointError(f"{path} is of task {manifest.get('task')!r}; there are {', '.join(TASKS)}")
    data = task.load("test", data_dir=data_dir, communicator=communicator)
    height, width, channels = data.images.shape[1:]
    replica = Replica(task.model, task.augmentation.output_shape((height, width, channels)), device, seed=0)
    if averaged:
        averages = ExponentialMovingAverage(task.average_decay)
        names = {v.name: averages.average_name(v) for v in replica.variables}
        missing = [average for average in names.values() if average not in arrays]
        if missing:
            raise CheckpointError(f"{path} has no {missing[0]!r}; evaluate it with --no-averaged")
        arrays |= {name: arrays[average] for name, average in names.items()}
    load_weights(path, replica, arrays)
    return task.name, evaluate(replica, task, data, communicator)


def load_weights(path: Path, replica: Replica, weights: dict[str, Array]) -> None:
    """Set a replica's variables from arrays of their names.

    Raises:
        CheckpointError: one is missing or has another shape; the message names it.
    """
    for variable in (*replica.variables, *replica.statistics):
        found = weights.get(variable.name)
        if found is None or found.shape != variable.shape:
            what = "is missing" if found is None else f"has shape {found.shape}"
            raise CheckpointError(
                f"{variable.name!r} {what} in {path}; the model's has shape {variable.shape}"
            )
        variable.assign(found)
