"""The network of TensorFlow's CIFAR-10 tutorial (`cifar10.py`), and how the tutorial trains it.

What the tutorial does is kept: layers, initial values, weight decay as regularisation losses, rate and its
decay, moving averages. What it got wrong on several GPUs is not: its rate decays by steps, so N times later
with N towers; here it decays by examples seen.
"""

from __future__ import annotations

from typing import Any

from distopt import initializers, layers, regularizers
from distopt.data import cifar10
from distopt.data.augment import TUTORIAL
from distopt.models.task import Task
from distopt.optimizers import SGD, Optimizer
from distopt.schedules import ExponentialDecay, decay_steps
from distopt.tape import Tensor

__all__ = ["TASK", "network", "network_without_normalization"]

_WEIGHT_DECAY = 0.004
_INITIAL_LEARNING_RATE = 0.1
_EPOCHS_PER_DECAY = 350.0
_DECAY_FACTOR = 0.1


def network(images: Any) -> Tensor:
    """Return the logits [N, 10] of images [N, 24, 24, 3]; creates 1,068,298 parameters on the first call."""
    return _network(images, normalize=True)


def network_without_normalization(images: Any) -> Tensor:
    """Return the logits of the same network without its two local response normalizations."""
    return _network(images, normalize=False)


def _network(images: Any, normalize: bool) -> Tensor:
    norm = [layers.LocalResponseNormalization(depth_radius=4, bias=1.0, alpha=0.001 / 9.0, beta=0.75)]
    norm = norm if normalize else []
    pool = layers.MaxPool(window=3, strides=2, padding="SAME")
    x = layers.sequence(images, [_convolution("conv1", 0.0), pool, *norm])
    # The tutorial swaps the two after its second convolution.
    x = layers.sequence(x, [_convolution("conv2", 0.1), *norm, pool])
    x = layers.flatten(x)
    x = _dense(x, 384, "local3", deviation=0.04, bias=0.1, decay=_WEIGHT_DECAY, relu=True)
    x = _dense(x, 192, "local4", deviation=0.04, bias=0.1, decay=_WEIGHT_DECAY, relu=True)
    return _dense(x, 10, "softmax_linear", deviation=1 / 192.0, bias=0.0, decay=0.0, relu=False)


def _convolution(name: str, bias: float) -> layers.Convolution:
    return layers.Convolution(
        64,
        5,
        relu=True,
        kernel_initializer=initializers.TruncatedNormal(stddev=0.05),
        bias_initializer=initializers.Constant(bias),
        name=name,
    )


def _dense(
    x: Tensor, units: int, name: str, *, deviation: float, bias: float, decay: float, relu: bool
) -> Tensor:
    return layers.dense(
        x,
        units,
        relu=relu,
        kernel_initializer=initializers.TruncatedNormal(stddev=deviation),
        bias_initializer=initializers.Constant(bias),
        kernel_regularizer=regularizers.l2_regularizer(decay) if decay else None,
        name=name,
    )


def _optimizer(
    learning_rate: float | None, num_examples: int, global_batch: int, **options: Any
) -> Optimizer:
    rate = ExponentialDecay(
        _INITIAL_LEARNING_RATE if learning_rate is None else learning_rate,
        decay_steps(num_examples, _EPOCHS_PER_DECAY, global_batch),
        _DECAY_FACTOR,
        staircase=True,
    )
    return SGD(rate, **options)


TASK = Task(
    name="cifar10",
    model=network,
    load=cifar10.load,
    augmentation=TUTORIAL,
    optimizer=_optimizer,
    global_batch=256,
    steps=2000,
    average_decay=0.9999,
)
"""The tutorial's training."""
