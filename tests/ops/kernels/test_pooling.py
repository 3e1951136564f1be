"""Pooling and LRN against their definitions, finite differences and torch."""

from __future__ import annotations

import direct
import numpy as np
import pytest

from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.piecewise import Chain
from distopt.ops.kernels.pooling import AveragePool, MaxPool

WINDOWS = [
    (24, 24, (3, 3), (2, 2), "SAME"),
    (7, 9, (3, 3), (2, 2), "SAME"),
    (9, 9, (3, 3), (2, 2), "VALID"),
    (8, 6, (2, 2), (2, 2), "VALID"),
    (7, 9, (2, 2), (3, 3), "VALID"),
    (8, 8, (5, 5), (1, 1), "SAME"),
    (7, 10, (3, 2), (1, 3), "SAME"),
    (17, 17, (17, 17), (1, 1), "VALID"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize(("height", "width", "window", "strides", "padding"), WINDOWS)
def test_pooling_agrees_with_the_definition(height, width, window, strides, padding, kind, dtype):
    random = np.random.default_rng(0)
    # Rounded values: many windows hold their maximum several times.
    x = np.round(random.standard_normal((3, height, width, 5)) * 2).astype(dtype)
    stage = MaxPool if kind == "max" else AveragePool
    run = Chain([stage(window, strides, padding)]).forward(x)
    expected = direct.pool(x, kind, window, strides, padding)
    np.testing.assert_allclose(run.output, expected, rtol=1e-6, atol=1e-6)
    dy = random.standard_normal(expected.shape).astype(dtype)
    dx, gradients = run.backward(dy)
    assert gradients == []
    expected_dx = direct.pool_gradient(x, dy, kind, window, strides, padding)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "window", "strides", "padding"), WINDOWS)
def test_compiled_loops_and_numpy_give_the_same_values(height, width, window, strides, padding, monkeypatch):
    pytest.importorskip("numba")
    random = np.random.default_rng(5)
    x = np.round(random.standard_normal((3, height, width, 5)) * 2).astype("float32")
    x[1, height // 2, width // 2, 3] = np.nan
    results = []
    for switch in ("0", "1"):
        monkeypatch.setenv("DISTOPT_NUMBA", switch)
        run = Chain([MaxPool(window, strides, padding)]).forward(x)
        if not results:
            dy = random.standard_normal(run.output.shape).astype("float32")
        results.append((run.output, run.backward(dy)[0]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize("stage", [MaxPool(3, 2, "SAME"), AveragePool(3, 2, "SAME")])
def test_pooling_is_the_same_for_any_batch(stage):
    random = np.random.default_rng(1)
    x = random.standard_normal((70, 24, 24, 16)).astype("float32")
    whole = Chain([stage]).forward(x)
    dy = random.standard_normal(whole.output.shape).astype("float32")
    dx, _ = whole.backward(dy)
    for first, last in ((0, 0), (0, 1), (7, 70)):
        run = Chain([stage]).forward(x[first:last])
        np.testing.assert_array_equal(run.output, whole.output[first:last])
        np.testing.assert_array_equal(run.backward(dy[first:last])[0], dx[first:last])


def test_a_nan_reaches_the_maximum_of_every_window_that_holds_it():
    x = np.zeros((1, 6, 6, 1), "float32")
    x[0, 2, 2] = np.nan
    y = Chain([MaxPool(3, 2, "SAME")]).forward(x).output
    np.testing.assert_array_equal(
        np.isnan(y[0, :, :, 0]), [[True, True, False], [True, True, False], [False] * 3]
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("depth_radius", "bias", "alpha", "beta"),
    [(4, 1.0, 0.001 / 9, 0.75), (5, 1.0, 1.0, 0.5), (1, 2.0, 0.3, 1.3), (40, 1.0, 0.1, 0.75)],
)
def test_lrn_agrees_with_the_definition(depth_radius, bias, alpha, beta, dtype):
    x = (np.random.default_rng(2).standard_normal((5, 6, 4, 24)) * 3).astype(dtype)
    stage = LocalResponseNormalization(depth_radius, bias, alpha, beta)
    y = Chain([stage]).forward(x, keep=False).output
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    np.testing.assert_allclose(
        y, direct.lrn(x, depth_radius, bias, alpha, beta), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("arguments", [(4, 1.0, 0.1, 0.75), (2, 1.0, 0.5, 0.5), (3, 1.5, 0.2, 1.1)])
def test_lrn_gradient_agrees_with_finite_differences(arguments):
    random = np.random.default_rng(3)
    x = random.standard_normal((2, 3, 4, 12)) * 2
    dy, direction = random.standard_normal((2, *x.shape))
    chain = Chain([LocalResponseNormalization(*arguments)])
    dx, _ = chain.forward(x).backward(dy)
    step = 1e-6
    slope = sum(
        sign * float((chain.forward(x + sign * step * direction).output * dy).sum()) for sign in (1, -1)
    ) / (2 * step)
    assert slope == pytest.approx(float((dx * direction).sum()), rel=1e-7)


def test_lrn_agrees_with_torch():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(4)
    x = (random.standard_normal((3, 5, 5, 20)) * 3).astype("float32")
    dy = random.standard_normal(x.shape).astype("float32")
    tensor = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    # torch divides alpha by the window's size.
    y = torch.nn.functional.local_response_norm(tensor, 9, alpha=0.09, beta=0.75, k=1.0)
    y.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    run = Chain([LocalResponseNormalization(4, 1.0, 0.01, 0.75)]).forward(x)
    np.testing.assert_allclose(run.output, y.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    dx, _ = run.backward(dy)
    np.testing.assert_allclose(dx, tensor.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_lrn_refuses_what_can_divide_by_zero():
    with pytest.raises(ValueError, match=r"bias must be above 0, got 0\.0"):
        LocalResponseNormalization(bias=0.0)
    with pytest.raises(ValueError, match="depth_radius must be at least 0, got -1"):
        LocalResponseNormalization(depth_radius=-1)
