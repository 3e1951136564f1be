"""A small task on random images, and helpers, for tests of training on any number of ranks."""

import numpy as np

from distopt import layers, regularizers
from distopt.backend import Device
from distopt.data.augment import Augmentation
from distopt.data.dataset import Dataset
from distopt.metrics import MetricsFile, Progress
from distopt.models import Task
from distopt.optimizers import SGD
from distopt.trainer import Settings, Trainer


def network(images):
    x = layers.sequence(
        images, [layers.Convolution(4, 3, relu=True, name="conv"), layers.MaxPool(2, 2, "SAME")]
    )
    x = layers.flatten(x)
    return layers.dense(x, 3, kernel_regularizer=regularizers.l2_regularizer(0.01), name="logits")


def data(split="train", count=41):
    random = np.random.default_rng({"train": 0, "test": 1}[split])
    labels = random.integers(0, 3, count)
    images = random.integers(0, 100, (count, 8, 8, 1)) + labels[:, None, None, None] * 50
    return Dataset(images.astype(np.uint8), labels, ("a", "b", "c"), f"random {split}")


TASK = Task(
    name="cifar10",  # a name that `distopt evaluate` knows is not needed here
    model=network,
    load=lambda split, *, data_dir, communicator: data(split),
    augmentation=Augmentation(crop=6, flip=True, contrast_range=None, max_brightness=0.0),
    optimizer=lambda rate, examples, batch, **options: SGD(0.05 if rate is None else rate, 0.9, **options),
    global_batch=16,
    steps=4,
    average_decay=0.9,
)


def trainer(communicator, replicas=1, task=TASK, train_data=None, **settings):
    chosen = Settings(**{"global_batch": 16, "steps": 4, "log_every": 1, **settings})
    devices = [Device("cpu", number) for number in range(replicas)]
    return Trainer(task, train_data or data(), communicator, devices, chosen)


def run(made, path=None):
    """Train to the end without output; returns the trainer."""
    metrics = MetricsFile(path)
    made.run(Progress(made.settings.steps, made.step, shown=False), metrics)
    metrics.close()
    return made


def state(made):
    """Everything that training changes, as one dict of arrays."""
    slots = {f"slot {name}": array for name, array in made.optimizer.state().items()}
    return {**made.weights(), **slots}
