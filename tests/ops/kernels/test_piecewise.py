"""Chains of stages: fused or one by one, in one piece or many."""

from __future__ import annotations

import direct
import numpy as np
import pytest

from distopt.backend import memory_pool
from distopt.ops.kernels import piecewise
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.convpool import ConvolutionMaxPool, fused
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.piecewise import Chain
from distopt.ops.kernels.pooling import AveragePool, MaxPool

LRN = LocalResponseNormalization(4, 1.0, 0.001 / 9, 0.75)
TUTORIAL = {
    "first": ([Convolution(relu=True), MaxPool(3, 2, "SAME"), LRN], (24, 24, 3, 64)),
    "second": ([Convolution(relu=True), LRN, MaxPool(3, 2, "SAME")], (12, 12, 64, 64)),
}


def _arrays(shape, kernel, batch, dtype="float32", seed=0):
    height, width, depth, outputs = shape
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, height, width, depth)).astype(dtype)
    w = (random.standard_normal((kernel, kernel, depth, outputs)) * 0.1).astype(dtype)
    b = (random.standard_normal(outputs) * 0.1).astype(dtype)
    return x, w, b, random


def _agreement(actual, expected):
    """The part of values that agree: rounding may change which of two inputs is a maximum."""
    return np.isclose(actual, expected, rtol=0, atol=1e-3).mean()


def _one_by_one(stages, x, parameters, dy):
    """The same stages as chains of one stage each: nothing is fused, nothing cut alike."""
    runs = []
    for number, stage in enumerate(stages):
        runs.append(Chain([stage]).forward(x, parameters[number : number + 1]))
        x = runs[-1].output
    gradients = []
    for run in reversed(runs):
        dy, own = run.backward(dy)
        gradients = own + gradients
    return x, dy, gradients


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel", "pool", "padding"),
    [
        ((24, 24, 3, 64), 5, MaxPool(3, 2, "SAME"), "SAME"),
        ((9, 7, 2, 4), 3, MaxPool(3, 2, "SAME"), "VALID"),
        ((9, 10, 2, 4), 3, MaxPool(2, 2, "VALID"), "SAME"),
        ((11, 11, 1, 4), 3, MaxPool(2, (1, 2), "SAME"), "SAME"),
        ((12, 13, 3, 4), 5, MaxPool(2, 3, "VALID"), "SAME"),
        ((7, 8, 3, 4), 5, MaxPool(5, 2, "SAME"), "SAME"),
    ],
)
def test_fused_convolution_and_pooling_equal_the_two_stages(shape, kernel, pool, padding, relu):
    x, w, b, random = _arrays(shape, kernel, 3, "float64")
    stages = [Convolution(padding=padding, relu=relu), pool]
    both, _ = fused(stages, [(w, b), ()], x.shape[1:])
    assert [type(stage) for stage in both] == [ConvolutionMaxPool]
    run = Chain(stages).forward(x, [(w, b)])
    dy = random.standard_normal(run.output.shape)
    dx, (dw, db) = run.backward(dy)
    y, expected_dx, (expected_dw, expected_db) = _one_by_one(stages, x, [(w, b)], dy)
    for actual, expected in (
        (run.output, y),
        (dx, expected_dx),
        (dw, expected_dw),
        (db, expected_db),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("stages", "kernel"),
    [
        ([Convolution(2), MaxPool(2)], (3, 3, 2, 4)),
        ([Convolution(), AveragePool(2)], (3, 3, 2, 4)),
        ([Convolution(), MaxPool(2)], (5, 5, 16, 16)),
        ([Convolution(), MaxPool(2)], (1, 1, 3, 16)),
        ([MaxPool(2), Convolution()], (3, 3, 2, 4)),
    ],
)
def test_pairs_that_do_not_pay_stay_as_they_are(stages, kernel):
    parameters = [(np.zeros(kernel, "float32"),) if isinstance(s, Convolution) else () for s in stages]
    shape = (12, 12, kernel[2])
    assert fused(stages, parameters, shape) == (stages, parameters)


def test_a_strided_convolution_can_not_be_fused():
    with pytest.raises(ValueError, match="must have stride 1, got 2"):
        ConvolutionMaxPool(Convolution(2), MaxPool(2))


@pytest.mark.parametrize("name", TUTORIAL)
@pytest.mark.parametrize("piece_bytes", [1, 1 << 20, 1 << 40])
def test_pieces_of_any_size_give_what_the_whole_batch_gives(name, piece_bytes, monkeypatch):
    stages, shape = TUTORIAL[name]
    x, w, b, random = _arrays(shape, 5, 13)
    whole = Chain(stages).forward(x, [(w, b)])
    dy = random.standard_normal(whole.output.shape).astype("float32")
    dx, gradients = whole.backward(dy)
    monkeypatch.setattr(piecewise, "_PIECE_BYTES", piece_bytes)
    run = Chain(stages).forward(x, [(w, b)])
    assert np.abs(run.output - whole.output).max() < 3e-5 * np.abs(whole.output).max()
    cut_dx, cut_gradients = run.backward(dy)
    assert _agreement(cut_dx, dx) > 0.99
    for cut, full in zip(cut_gradients, gradients, strict=True):
        assert np.abs(cut - full).max() < 1e-3 * np.abs(full).max()


@pytest.mark.parametrize("name", TUTORIAL)
def test_the_tutorials_chains_agree_with_their_definition(name):
    stages, shape = TUTORIAL[name]
    x, w, b, _ = _arrays(shape, 5, 3)
    y = direct.convolution(x, w, b, relu=True)
    for stage in stages[1:]:
        if stage is LRN:
            y = direct.lrn(y, 4, 1.0, 0.001 / 9, 0.75)
        else:
            y = direct.pool(y, "max", (3, 3), (2, 2), "SAME")
    for keep in (True, False):
        run = Chain(stages).forward(x, [(w, b)], keep=keep)
        assert np.abs(run.output - y).max() < 3e-5 * np.abs(y).max()


@pytest.mark.parametrize("name", TUTORIAL)
def test_a_chains_gradients_agree_with_finite_differences(name):
    stages, shape = TUTORIAL[name]
    x, w, b, random = _arrays(shape, 5, 2, "float64")
    chain = Chain(stages)
    dy = random.standard_normal(chain.forward(x, [(w, b)], keep=False).output.shape)
    dx, (dw, db) = chain.forward(x, [(w, b)]).backward(dy)
    directions = [random.standard_normal(a.shape) for a in (x, w, b)]
    step = 1e-7  # so small that hardly a maximum or a sign changes on the way
    values = [
        float(
            (
                chain.forward(x + s * directions[0], [(w + s * directions[1], b + s * directions[2])]).output
                * dy
            ).sum()
        )
        for s in (step, -step)
    ]
    expected = sum(float((g * d).sum()) for g, d in zip((dx, dw, db), directions, strict=True))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", TUTORIAL)
def test_two_runs_give_the_same_bits_and_the_second_allocates_nothing(name):
    stages, shape = TUTORIAL[name]
    x, w, b, random = _arrays(shape, 5, 20)
    dy = None
    results = []
    for _ in range(3):
        misses = memory_pool.misses
        run = Chain(stages).forward(x, [(w, b)])
        if dy is None:
            dy = random.standard_normal(run.output.shape).astype("float32")
        dx, gradients = run.backward(dy)
        results.append([a.copy() for a in (run.output, dx, *gradients)])
        del run, dx, gradients
    assert memory_pool.misses == misses
    for first, second in zip(results[0], results[2], strict=True):
        np.testing.assert_array_equal(first, second)


def test_backward_runs_again_where_it_was_told_to_keep():
    stages, shape = TUTORIAL["first"]
    x, w, b, random = _arrays(shape, 5, 9)
    run = Chain(stages).forward(x, [(w, b)])
    dy = random.standard_normal(run.output.shape).astype("float32")
    dx, gradients = run.backward(dy, keep=True)
    again_dx, again = run.backward(dy)
    np.testing.assert_array_equal(again_dx, dx)
    for first, second in zip(gradients, again, strict=True):
        np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="gone back through before"):
        run.backward(dy)


def test_backward_refuses_what_was_not_kept_and_what_does_not_fit():
    chain = Chain([MaxPool()])
    x = np.zeros((1, 4, 4, 2), "float32")
    with pytest.raises(ValueError, match="kept nothing"):
        chain.forward(x, keep=False).backward(np.zeros((1, 2, 2, 2), "float32"))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2, 3\), the output \(1, 2, 2, 2\)"):
        chain.forward(x).backward(np.zeros((1, 2, 2, 3), "float32"))


@pytest.mark.parametrize("name", TUTORIAL)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_small_batches_give_the_images_of_large_ones(name, batch):
    stages, shape = TUTORIAL[name]
    x, w, b, random = _arrays(shape, 5, 16)
    whole = Chain(stages).forward(x, [(w, b)])
    run = Chain(stages).forward(x[:batch], [(w, b)])
    largest = np.abs(whole.output).max()
    assert np.all(np.abs(run.output - whole.output[:batch]) < 3e-5 * largest)
    dy = random.standard_normal(whole.output.shape).astype("float32")
    dx, _ = run.backward(dy[:batch])
    assert batch == 0 or _agreement(dx, whole.backward(dy)[0][:batch]) > 0.99


def test_a_chain_refuses_what_it_can_not_compute():
    with pytest.raises(ValueError, match="at least one stage"):
        Chain([])
    with pytest.raises(ValueError, match="float32 or float64, got int64"):
        Chain([MaxPool()]).forward(np.zeros((1, 4, 4, 2), "int64"))
    with pytest.raises(ValueError, match="parameters for 2 stages, there are 1"):
        Chain([MaxPool()]).forward(np.zeros((1, 4, 4, 2), "float32"), [(), ()])


def test_images_and_gradients_may_be_strided_views():
    stages, shape = TUTORIAL["first"]
    x, w, b, random = _arrays(shape, 5, 6)
    plain = Chain(stages).forward(x[::2].copy(), [(w, b)])
    run = Chain(stages).forward(x[::2], [(w, b)])
    np.testing.assert_array_equal(run.output, plain.output)
    dy = random.standard_normal((6, *run.output.shape[1:])).astype("float32")[::2]
    np.testing.assert_array_equal(run.backward(dy)[0], plain.backward(dy.copy())[0])
