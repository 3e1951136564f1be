"""Time the convolution chains of the CIFAR-10 tutorial's network: microseconds per image.

taskset -c 1 env OMP_NUM_THREADS=1 python docs/results/cpu_kernels.py
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from distopt.backend import Array
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.piecewise import Chain
from distopt.ops.kernels.pooling import MaxPool
from distopt.ops.kernels.stages import Stage

BATCH = 128
ROUNDS = 30


def measure(stages: Sequence[Stage], x: Array, parameters: Sequence[Array], dx: bool) -> tuple[float, float]:
    """Return the 10th percentiles of the forward and the backward pass, in microseconds per image."""
    chain, groups = Chain(stages), [parameters] if parameters else []
    dy = np.ones_like(chain.forward(x, groups).output)
    spans: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run = chain.forward(x, groups)
        middle = time.perf_counter()
        run.backward(dy, input_gradient=dx)
        spans.append((middle - begin, time.perf_counter() - middle))
    forward, backward = np.percentile(np.array(spans), 10, axis=0) * 1e6 / len(x)
    return float(forward), float(backward)


def main() -> None:
    """Print one line for every chain."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return random.standard_normal(shape).astype(np.float32)

    convolution = Convolution(relu=True)
    pool = MaxPool(3, 2, "SAME")
    lrn = LocalResponseNormalization(4, 1.0, 0.001 / 9, 0.75)
    images, features = normal(BATCH, 24, 24, 3), np.abs(normal(BATCH, 12, 12, 64))
    first = (normal(5, 5, 3, 64) * 0.05, np.zeros(64, np.float32))
    second = (normal(5, 5, 64, 64) * 0.05, np.full(64, 0.1, np.float32))
    for name, stages, x, parameters, dx in (
        ("conv1", [convolution], images, first, False),
        ("conv1, pool1", [convolution, pool], images, first, False),
        ("conv1, pool1, lrn1", [convolution, pool, lrn], images, first, False),
        ("conv2", [convolution], features, second, True),
        ("conv2, lrn2", [convolution, lrn], features, second, True),
        ("conv2, lrn2, pool2", [convolution, lrn, pool], features, second, True),
    ):
        forward, backward = measure(stages, x, parameters, dx)
        print(f"{name:20s} forward {forward:6.1f}  backward {backward:6.1f}")


if __name__ == "__main__":
    main()
