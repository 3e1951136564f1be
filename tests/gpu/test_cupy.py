"""The same model, tape, aggregators and optimizers on CuPy arrays, against the same on NumPy arrays."""

import numpy as np
import pytest
import training
from ops_cases import CASES

from distopt.backend import Device, asnumpy, device_of
from distopt.communicators import connect
from distopt.data.dataset import Dataset
from distopt.models import TASKS
from distopt.optimizers import SGD, Adam
from distopt.tape import GradientTape, primitives
from distopt.trainer import Settings, Trainer
from distopt.variables import Arena, IndexedSlices, Variable

pytestmark = pytest.mark.gpu

_CPU, _GPU = Device("cpu", 0), Device("cuda", 0)
_ALL = [
    pytest.param(name, inputs, options, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, (inputs, options) in enumerate(cases)
]


def _moved(options, device):
    return {
        key: device.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }


@pytest.mark.parametrize(("name", "inputs", "options"), _ALL)
def test_values_and_gradients_are_those_of_numpy(name, inputs, options):
    found = {}
    for device in (_CPU, _GPU):
        with device.activate():
            operands = [Variable(i) if isinstance(i, np.ndarray) else i for i in inputs]
            variables = [o for o in operands if isinstance(o, Variable)]
            with GradientTape() as tape:
                output = primitives[name](*operands, **_moved(options, device))
            assert device_of(output.value).kind == device.kind
            gradients = tape.gradient(output, variables)
            dense = [g.to_dense() if isinstance(g, IndexedSlices) else g for g in gradients]
            found[device.kind] = [asnumpy(output.value), *(asnumpy(g) for g in dense)]
    for expected, value in zip(found["cpu"], found["cuda"], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(0.1),
        lambda: SGD(0.1, 0.9, nesterov=True),
        lambda: Adam(0.1, global_clipnorm=1.0),
    ],
)
def test_optimizers_give_numpys_values(make):
    random = np.random.default_rng(0)
    start = [random.standard_normal(s).astype("f4") for s in ((300, 70), (), (5,))]
    gradients = [random.standard_normal(s.shape).astype("f4") for s in start]
    found = []
    for device in (_CPU, _GPU):
        with device.activate():
            variables = [Variable(s, name=f"v{n}") for n, s in enumerate(start)]
            Arena(variables)
            optimizer = make()
            for _ in range(3):
                optimizer.apply_gradients(
                    [(device.asarray(g), v) for g, v in zip(gradients, variables, strict=True)]
                )
            found.append([v.numpy() for v in variables])
    for expected, value in zip(*found, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_training_on_a_gpu_follows_the_cpu():
    states = []
    for device in (_CPU, _GPU):
        with connect("local") as communicator:
            settings = Settings(global_batch=16, steps=4, log_every=1)
            made = Trainer(training.TASK, training.data(), communicator, [device], settings)
            states.append(training.state(training.run(made)))
    for name, expected in states[0].items():
        np.testing.assert_allclose(states[1][name], expected, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_tutorial_network_follows_the_cpu_for_200_steps():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (512, 32, 32, 3)).astype(np.uint8)
    data = Dataset(images, random.integers(0, 10, 512), tuple("abcdefghij"), "random")
    losses = []
    for device in (_CPU, _GPU):
        with connect("local") as communicator:
            settings = Settings(global_batch=32, steps=200, log_every=20)
            made = Trainer(TASKS["cifar10"], data, communicator, [device], settings)
            rows = []
            made._log = lambda progress, metrics, ticket, *rest, rows=rows: rows.append(ticket.loss)
            training.run(made)
            losses.append(rows)
    np.testing.assert_allclose(losses[1][:3], losses[0][:3], rtol=1e-3)
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-2)


def test_replicas_of_one_rank_can_share_a_gpu():
    states = []
    for devices in ([_GPU], [_GPU, _GPU]):
        with connect("local") as communicator:
            settings = Settings(global_batch=17, steps=4, log_every=1)
            made = Trainer(training.TASK, training.data(), communicator, devices, settings)
            states.append(training.state(training.run(made)))
    for name, expected in states[0].items():
        np.testing.assert_allclose(states[1][name], expected, rtol=1e-3, atol=1e-5, err_msg=name)
