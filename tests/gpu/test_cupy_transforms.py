"""Transforms and moving averages on CuPy arrays, against the same on NumPy arrays."""

import numpy as np
import pytest

from distopt.backend import Device, asnumpy, device_of
from distopt.optimizers import ExponentialMovingAverage
from distopt.transforms import AdaptiveClipping, Chain, GradientMultipliers, GradientNoise
from distopt.variables import Arena, IndexedSlices, Variable

pytestmark = pytest.mark.gpu

_CPU, _GPU = Device("cpu", 0), Device("cuda", 0)


def _on_both(run):
    """Return what `run(device)` gives on the CPU and on the GPU, as NumPy arrays."""
    found = []
    for device in (_CPU, _GPU):
        with device.activate():
            arrays = run(device)
            assert all(device_of(array).kind == device.kind for array in arrays)
            found.append([asnumpy(array) for array in arrays])
    return found


def test_noise_has_the_same_bits():
    def run(device):
        pairs = [
            (device.zeros(200_000, np.float32), Variable(np.zeros(200_000, np.float32))),
            (device.asarray(np.ones((3, 5), np.float32)), Variable(np.zeros((3, 5), np.float32))),
            (
                IndexedSlices(
                    device.asarray(np.ones((2, 5), np.float32)), device.asarray(np.array([1, 1])), (3, 5)
                ),
                Variable(np.zeros((3, 5), np.float32)),
            ),
        ]
        return [gradient for gradient, _ in GradientNoise(0.5, seed=3, step=7)(pairs)]

    for cpu, gpu in zip(*_on_both(run), strict=True):
        np.testing.assert_array_equal(cpu, gpu)


def test_adaptive_clipping_and_multipliers_give_numpys_values():
    def run(device):
        variable = Variable(np.zeros(2, np.float32), name="w")
        step = Variable(np.float32(0.0))
        clip = AdaptiveClipping(static_max_norm=50.0, global_step=step)
        chain = Chain([GradientMultipliers({variable: Variable(2.0)}), clip])
        seen = []
        for size in (1.0, 0.1, 30.0, 1.0):
            ((clipped, _),) = chain([(device.asarray(np.array([3.0, 4.0], np.float32) * size), variable)])
            seen.append(clipped)
            step.assign_add(1)
        return [*seen, clip.mean.value, clip.sq_mean.value]

    for cpu, gpu in zip(*_on_both(run), strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=1e-6)


def test_averages_of_an_arena_agree():
    def run(device):
        variables = [Variable(np.full(shape, 2.0, np.float32), name=f"v{shape}") for shape in (300, 5)]
        Arena(variables)
        average = ExponentialMovingAverage(0.9, num_updates=3)
        average.track(variables)
        for value in (5.0, -1.25):
            for variable in variables:
                variable.assign(np.full(variable.shape, value))
            average.apply(variables)
        return [average.average(variable).value for variable in variables]

    for cpu, gpu in zip(*_on_both(run), strict=True):
        np.testing.assert_allclose(gpu, cpu, rtol=1e-6)
