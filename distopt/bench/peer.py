"""The same network, loss and step in PyTorch: what distopt is measured against.

PyTorch gets what is best for it: fused SGD, inplace rectifiers, buckets without copies. It is an extra
(`distopt[bench]`), imported when a step is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distopt.backend import Array, Device
from distopt.bench.workload import LEARNING_RATE, WEIGHT_DECAY
from distopt.communicators import Communicator
from distopt.replica import Batch

__all__ = ["LAYOUTS", "Layout", "connect_gloo", "make_step", "set_threads", "why_missing"]

Layout = Literal["nchw", "channels_last"]
LAYOUTS: tuple[Layout, ...] = ("nchw", "channels_last")

_NAMES = ("conv1", "conv2", "local3", "local4", "softmax_linear")


def why_missing(device: Device) -> str | None:
    """Return why PyTorch can't be measured on a device, None if it can."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed; pip install 'distopt[bench]'"
    if device.kind == "cuda" and not _torch().cuda.is_available():
        return "this PyTorch can't use the GPU; install a build for CUDA"
    return None


def make_step(
    batch: Batch,
    device: Device,
    *,
    layout: Layout,
    normalize: bool,
    weights: Mapping[str, Array] | None = None,
    distributed: bool = False,
) -> Callable[[], Any]:
    """Make a training step of the tutorial's network on a fixed batch.

    Args:
        batch: images [N, 24, 24, 3] and their labels.
        device: where it runs.
        layout: of images and filters in memory.
        normalize: with the two local response normalizations, or without.
        weights: initial values by distopt's names; PyTorch's own if None.
        distributed: average gradients over the ranks of `connect_gloo` (DistributedDataParallel).

    Returns:
        A function that does a step and returns the cross-entropy before it, as a tensor.
    """
    torch = _torch()
    torch.manual_seed(0)
    where = torch.device(str(device))
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    network = _network(torch.nn, normalize)
    if weights is not None:
        _load(network, weights)
    network = network.to(where, memory_format=order)
    decayed = [network.local3.weight, network.local4.weight]
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, fused=True)
    inputs = torch.from_numpy(np.ascontiguousarray(batch.images.transpose(0, 3, 1, 2)))
    inputs = inputs.to(where).contiguous(memory_format=order)
    targets = torch.from_numpy(batch.labels.astype(np.int64)).to(where)
    model: Any = network
    if distributed:
        model = torch.nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)

    def step() -> Any:
        cross_entropy = torch.nn.functional.cross_entropy(model(inputs), targets)
        penalty = sum(weight.square().sum() for weight in decayed) * (WEIGHT_DECAY / 2)
        optimizer.zero_grad(set_to_none=True)
        (cross_entropy + penalty).backward()
        optimizer.step()
        return cross_entropy.detach()

    return step


def set_threads(threads: int) -> None:
    """Set the threads that PyTorch computes with in this process."""
    _torch().set_num_threads(threads)


def connect_gloo(communicator: Communicator, meeting_file: Path) -> None:
    """Join the ranks of a communicator in a gloo group of PyTorch. Collective.

    Args:
        communicator: of ranks of one host.
        meeting_file: where they find each other; on rank 0's word, and absent before.
    """
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's own name needn't be resolvable
    meeting = communicator.broadcast_object(str(meeting_file.resolve()))
    _torch().distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=communicator.rank, world_size=communicator.size
    )


def _torch() -> Any:
    return importlib.import_module("torch")


def _network(nn: Any, normalize: bool) -> Any:
    def norm(number: int) -> dict[str, Any]:
        # PyTorch divides alpha by the window's size, TensorFlow doesn't.
        found = {f"norm{number}": nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)}
        return found if normalize else {}

    def pool(number: int) -> dict[str, Any]:
        # TensorFlow's SAME: the odd pixel goes after. Zeros never win, for what is pooled isn't negative.
        return {f"pad{number}": nn.ZeroPad2d((0, 1, 0, 1)), f"pool{number}": nn.MaxPool2d(3, 2)}

    def relu(name: str) -> dict[str, Any]:
        return {f"{name}_relu": nn.ReLU(inplace=True)}

    layers = {"conv1": nn.Conv2d(3, 64, 5, padding=2), **relu("conv1"), **pool(1), **norm(1)}
    layers |= {"conv2": nn.Conv2d(64, 64, 5, padding=2), **relu("conv2"), **norm(2), **pool(2)}
    layers |= {"flatten": nn.Flatten(), "local3": nn.Linear(2304, 384), **relu("local3")}
    layers |= {"local4": nn.Linear(384, 192), **relu("local4"), "softmax_linear": nn.Linear(192, 10)}
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    return network


def _load(network: Any, weights: Mapping[str, Array]) -> None:
    """Give a network distopt's weights: filters OIHW, dense matrices transposed, pixels after channels."""
    torch = _torch()
    with torch.no_grad():
        for name in _NAMES:
            value = np.asarray(weights[f"{name}/weights"])
            if value.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            else:
                if name == "local3":
                    value = value.reshape(6, 6, 64, -1).transpose(2, 0, 1, 3).reshape(value.shape)
                value = value.T
            layer = getattr(network, name)
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(value)))
            layer.bias.copy_(torch.from_numpy(np.array(weights[f"{name}/biases"])))
