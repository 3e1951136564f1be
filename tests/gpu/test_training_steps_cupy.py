"""optimize_loss and LossScaleOptimizer on CuPy arrays, against the same on NumPy arrays."""

import numpy as np
import pytest

from distopt import ops, scopes, summaries
from distopt.backend import Device, device_of
from distopt.optimizers import SGD, LossScaleOptimizer, optimize_loss
from distopt.variables import Arena, Variable

pytestmark = pytest.mark.gpu

_DEVICES = (Device("cpu", 0), Device("cuda", 0))


def test_optimize_loss_gives_numpys_values_and_leaves_the_loss_on_the_device():
    features = np.random.default_rng(0).standard_normal((7, 3)).astype("f4")
    found = []
    for device in _DEVICES:
        with scopes.Graph(seed=1).as_default(), device.activate():
            weights = scopes.get_variable("w", initializer=np.ones((3, 1), "f4"), device=device)
            train_op = optimize_loss(
                lambda x, w=weights: ops.l2_loss(ops.matmul(x, w)),
                scopes.get_or_create_global_step(),
                0.01,
                "Momentum",
                gradient_noise_scale=0.5,
                clip_gradients=2.0,
                summaries=["loss", "gradients", "gradient_norm", "global_gradient_norm"],
            )
            for _ in range(3):
                loss = train_op(device.asarray(features))
            assert device_of(loss).kind == device.kind
            found.append([weights.numpy(), float(loss), *(s.numpy() for s in summaries.merge_all())])
    for expected, value in zip(*found, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("arena", [False, True])
def test_a_loss_scale_sees_one_infinite_element(arena):
    device = _DEVICES[1]
    with device.activate():
        variable = Variable(np.zeros(1000, "f4"), name="w", device=device)
        if arena:
            Arena([variable])
        optimizer = LossScaleOptimizer(SGD(1.0), initial_scale=8.0)
        for wrong in (1.0, np.inf):
            factor = np.ones(1000, "f4")
            factor[500] = wrong
            factor = device.asarray(factor)
            optimizer.minimize(lambda f=factor: ops.reduce_sum(variable * f), [variable])
    assert (optimizer.loss_scale, optimizer.iterations) == (4.0, 1)
    np.testing.assert_array_equal(variable.numpy(), -1.0)
