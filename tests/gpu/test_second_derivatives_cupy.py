"""Second derivatives of every primitive on CuPy arrays, against the same on NumPy arrays."""

import numpy as np
import pytest
from ops_cases import CASES

from distopt import ops
from distopt.backend import Device, asnumpy, device_of
from distopt.tape import GradientTape, primitives
from distopt.variables import IndexedSlices, Variable

pytestmark = pytest.mark.gpu

_DEVICES = (Device("cpu", 0), Device("cuda", 0))
_ALL = [
    pytest.param(name, inputs, options, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, (inputs, options) in enumerate(cases)
]


@pytest.mark.parametrize(("name", "inputs", "options"), _ALL)
def test_second_derivatives_are_those_of_numpy(name, inputs, options):
    found = []
    for device in _DEVICES:
        with device.activate():
            moved = {k: device.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
            operands = [Variable(i) if isinstance(i, np.ndarray) else i for i in inputs]
            variables = [o for o in operands if isinstance(o, Variable)]
            with GradientTape() as outer:
                with GradientTape() as inner:
                    output = primitives[name](*operands, **moved)
                    loss = ops.reduce_sum(output * output * output)
                first = inner.gradient(loss, variables)
            second = outer.gradient(first, variables, unconnected_gradients="zero")
            dense = [g.to_dense() if isinstance(g, IndexedSlices) else g for g in second]
            assert all(device_of(g).kind == device.kind for g in dense)
            found.append([asnumpy(g) for g in dense])
    for expected, value in zip(*found, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)
