"""The optimizers for large batches on CuPy arrays, against the same on NumPy arrays."""

import numpy as np
import pytest

from distopt.backend import Device, device_of
from distopt.optimizers import LAMB, LARS, SGDW, AdamW, LazyAdam, Lion, Muon
from distopt.variables import Arena, IndexedSlices, Variable

pytestmark = pytest.mark.gpu

MAKERS = {
    "AdamW": lambda: AdamW(0.01, 0.1, amsgrad=True, exclude_from_weight_decay=["bias"]),
    "AdamW, tfa": lambda: AdamW(0.01, 0.1, decay_convention="tfa"),
    "SGDW": lambda: SGDW(0.1, 0.1, 0.9, nesterov=True),
    "LazyAdam": lambda: LazyAdam(0.01),
    "LAMB": lambda: LAMB(0.1, weight_decay=0.1, exclude_from_weight_decay=["bias"]),
    "LARS": lambda: LARS(0.1, eeta=0.1, skip_list=["bias"]),
    "Lion": lambda: Lion(0.01, weight_decay=0.1),
    "Muon": lambda: Muon(0.02, weight_decay=0.1, adam_learning_rate=0.01),
}
SHAPES = {"kernel": (300, 70), "bias": (70,), "scalar": (), "conv": (3, 3, 4, 8)}


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_values_are_numpys(make, arena):
    random = np.random.default_rng(0)
    start = {name: random.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    start["table"] = random.standard_normal((9, 4)).astype("f4")
    steps = [
        {name: random.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()} for _ in range(3)
    ]
    rows = random.standard_normal((3, 3, 4)).astype("f4")
    found = []
    for device in (Device("cpu", 0), Device("cuda", 0)):
        with device.activate():
            variables = {name: Variable(value, name=name) for name, value in start.items()}
            if arena:
                Arena(list(variables.values()))
            optimizer = make()
            for step, values in zip(steps, rows, strict=True):
                indices = device.asarray(np.array([7, 0, 7]))
                slices = IndexedSlices(device.asarray(values), indices, (9, 4))
                pairs = [(device.asarray(gradient), variables[name]) for name, gradient in step.items()]
                optimizer.apply_gradients([*pairs, (slices, variables["table"])])
            assert all(device_of(v.value).kind == device.kind for v in variables.values())
            found.append({name: v.numpy() for name, v in variables.items()})
    for name, expected in found[0].items():
        np.testing.assert_allclose(found[1][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
