import statistics

import numpy as np
import pytest

from distopt.schedules import PiecewiseConstantDecay
from distopt.transforms import GradientNoise, noise
from distopt.variables import Arena, IndexedSlices, Variable


def zeros(*shapes):
    return [(np.zeros(shape, np.float32), Variable(np.zeros(shape, np.float32))) for shape in shapes]


def test_noise_is_a_normal_cut_at_two_standard_deviations():
    ((drawn, _),) = GradientNoise(3.0, seed=7)(zeros(200_000))
    assert np.abs(drawn).max() <= 6.0
    assert np.abs(drawn).max() > 5.99
    # Of a standard normal cut at 2: sigma = 0.8796; the tolerances are four standard errors.
    assert drawn.std() == pytest.approx(0.8796 * 3.0, rel=4 / 400_000**0.5)
    assert drawn.mean() == pytest.approx(0.0, abs=4 * 2.64 / 200_000**0.5)
    normal = statistics.NormalDist()
    inside = normal.cdf(2.0) - normal.cdf(-2.0)
    for quantile in (-1.5, -1.0, -0.3, 0.0, 0.5, 1.2, 1.9):
        expected = (normal.cdf(quantile) - normal.cdf(-2.0)) / inside
        assert (drawn < 3.0 * quantile).mean() == pytest.approx(expected, abs=4 * 0.5 / 200_000**0.5)


def test_quantiles_equal_those_of_the_standard_library(monkeypatch):
    words = np.linspace(0, 2**32 - 1, 10_001).astype(np.uint32)
    monkeypatch.setattr(noise.counter_random, "words", lambda *address: words)
    drawn = noise.truncated_normal(0, 0, 0, words.size, words)
    normal = statistics.NormalDist()
    low, high = normal.cdf(-2.0), normal.cdf(2.0)
    exact = [normal.inv_cdf(low + (float(word) + 0.5) / 2**32 * (high - low)) for word in words]
    np.testing.assert_allclose(drawn, exact, rtol=0, atol=3e-9)
    words = (2**32 - 1 - words.astype(np.int64)).astype(np.uint32)
    np.testing.assert_array_equal(noise.truncated_normal(0, 0, 0, words.size, words), -drawn)


def test_noise_of_a_step_depends_on_seed_step_and_place_only():
    def drawn(seed=1, step=5, position=1):
        pairs = GradientNoise(1.0, seed, step=step)(zeros(*[50] * 3))
        return pairs[position][0]

    np.testing.assert_array_equal(drawn(), drawn())
    for other in (drawn(seed=2), drawn(step=6), drawn(position=0)):
        assert np.intersect1d(drawn(), other).size < 3


def test_the_noise_of_an_element_does_not_depend_on_the_arrays_size():
    # Longer than one address of the random numbers, on the CPU a piece at a time.
    ((long, _),) = GradientNoise(1.0, seed=3)(zeros(150_000))
    ((short, _),) = GradientNoise(1.0, seed=3)(zeros(70_001))
    np.testing.assert_array_equal(long[:70_001], short)
    assert np.unique(long).size > 149_000
    whole = noise.truncated_normal(3, 0, 0, 150_000, long)  # as a GPU does it
    np.testing.assert_array_equal(long, whole.astype(np.float32))


def test_variables_of_several_pieces_share_no_numbers():
    pairs = GradientNoise(1.0, seed=3, step=0)(zeros(200_000, 200_000))
    drawn = np.concatenate([gradient.astype(np.float64) for gradient, _ in pairs])
    # 400,000 of 2**32 numbers, rounded to float32: chance repeats some hundreds, a shared piece 65,536.
    assert np.unique(drawn).size > 390_000


def test_steps_are_counted_in_a_variable_that_can_be_restored():
    noisy = GradientNoise(1.0, seed=4)
    first, second = (noisy(zeros(5))[0][0] for _ in range(2))
    assert not np.array_equal(first, second)
    (calls,) = noisy.variables()
    assert int(calls.numpy()) == 2
    resumed = GradientNoise(1.0, seed=4)
    resumed.variables()[0].assign(1)
    np.testing.assert_array_equal(resumed(zeros(5))[0][0], second)


@pytest.mark.parametrize("step", [1, np.int64(1), Variable(1), lambda: 1, lambda: Variable(1)])
def test_the_step_may_be_given(step):
    noisy = GradientNoise(1.0, seed=4, step=step)
    assert noisy.variables() == []
    counted = GradientNoise(1.0, seed=4)
    counted(zeros(5))
    np.testing.assert_array_equal(noisy(zeros(5))[0][0], counted(zeros(5))[0][0])


@pytest.mark.parametrize(
    "scale", [0.25, Variable(0.25), lambda: 0.25, PiecewiseConstantDecay([2], [1.0, 0.25])]
)
def test_the_scale_may_be_a_number_a_variable_a_callable_or_a_schedule(scale):
    ((drawn, _),) = GradientNoise(scale, seed=1, step=3)(zeros(20))
    ((full, _),) = GradientNoise(1.0, seed=1, step=3)(zeros(20))
    np.testing.assert_allclose(drawn, 0.25 * full, rtol=1e-6)


def test_noise_is_added_and_none_stays_none():
    gradient = np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)
    variable = Variable(np.zeros((2, 2), np.float32))
    (none, first), (noisy, second) = GradientNoise(0.5, seed=1)([(None, variable), (gradient, variable)])
    assert none is None
    assert first is second is variable
    difference = noisy - np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)
    assert np.abs(difference).max() <= 1.0
    assert np.unique(difference).size == 4
    np.testing.assert_array_equal(gradient, [[1.0, -2.0], [3.0, 4.0]])


@pytest.mark.parametrize("dense_shape", [(3, 2), None])
def test_slices_become_dense(dense_shape):
    variable = Variable(np.zeros((3, 2), np.float32))
    slices = IndexedSlices(np.ones((2, 2), np.float32), np.array([2, 2]), dense_shape)
    ((noisy, _),) = GradientNoise(1.0, seed=1)([(slices, variable)])
    ((plain, _),) = GradientNoise(1.0, seed=1)(zeros((3, 2)))
    np.testing.assert_allclose(noisy - plain, [[0, 0], [0, 0], [2, 2]], atol=1e-6)
    np.testing.assert_array_equal(slices.values, np.ones((2, 2)))


def test_a_gradient_in_the_arena_is_changed_in_place():
    variables = [Variable(np.zeros((3, 2), np.float32), name=name) for name in "ab"]
    Arena(variables)
    noisy = GradientNoise(1.0, seed=1)([(variable.gradient, variable) for variable in variables])
    for (gradient, variable), (expected, _) in zip(
        noisy, GradientNoise(1.0, seed=1)(zeros((3, 2), (3, 2))), strict=True
    ):
        assert gradient is variable.gradient
        np.testing.assert_array_equal(gradient, expected)


def test_a_view_of_the_arena_in_another_order_is_changed_in_place():
    variable = Variable(np.zeros((3, 2), np.float32), name="w")
    Arena([variable])
    view = variable.gradient.T
    ((noisy, _),) = GradientNoise(1.0, seed=1)([(view, variable)])
    assert noisy is view
    np.testing.assert_array_equal(view, GradientNoise(1.0, seed=1)(zeros((2, 3)))[0][0])


def test_the_layout_of_a_gradient_does_not_change_its_noise():
    variable = Variable(np.zeros((4, 3), np.float32))
    ((plain, _),) = GradientNoise(1.0, seed=1)([(np.zeros((4, 3), np.float32), variable)])
    ((turned, _),) = GradientNoise(1.0, seed=1)([(np.zeros((3, 4), np.float32).T, variable)])
    np.testing.assert_array_equal(plain, turned)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_dtype_is_kept(dtype):
    ((noisy, _),) = GradientNoise(1.0)([(np.zeros(100, dtype), Variable(np.zeros(100, dtype)))])
    assert noisy.dtype == dtype
    assert 0.5 < noisy.astype(float).std() < 1.2


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_wrong_scales_are_refused(scale):
    with pytest.raises(ValueError, match=f"scale .* 0 or more, got {scale}"):
        GradientNoise(scale)
    noisy = GradientNoise(lambda: scale)
    with pytest.raises(ValueError, match=f"got {scale}"):
        noisy(zeros(1))


def test_a_wrong_seed_is_refused():
    with pytest.raises(ValueError, match=r"seed must be .* got -1"):
        GradientNoise(1.0, seed=-1)
