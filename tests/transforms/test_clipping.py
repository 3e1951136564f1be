import math

import ml_dtypes
import numpy as np
import pytest

from distopt import transforms
from distopt.transforms import clipping, norms, pairs
from distopt.variables import Arena, IndexedSlices, Variable

INF, NAN = math.inf, math.nan


class OtherLibrary:
    """An array library that isn't NumPy, so that the path for GPUs runs without one."""

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.fixture(params=["numpy", "another library"])
def library(request, monkeypatch):
    if request.param != "numpy":
        other = OtherLibrary()
        for module in (clipping, norms, pairs):
            monkeypatch.setattr(module, "namespace", lambda *arrays: other)


def pairs_of(*gradients):
    return [(None if g is None else np.asarray(g, np.float32), f"v{i}") for i, g in enumerate(gradients)]


def values(result):
    return [None if g is None else np.asarray(g).tolist() for g, _ in result]


@pytest.mark.usefixtures("library")
def test_clip_by_value_keeps_nan_and_cuts_infinity():
    clipped = transforms.clip_by_value(pairs_of([-3, -1, 0, 0.5, INF, -INF, NAN], None), 1.0)
    np.testing.assert_array_equal(clipped[0][0], [-1, -1, 0, 0.5, 1, -1, NAN])
    assert clipped[1] == (None, "v1")


@pytest.mark.usefixtures("library")
def test_clip_by_norm_scales_each_gradient_on_its_own():
    clipped = transforms.clip_by_norm(pairs_of([3, 4], [0.3, 0.4], None, [0, 0]), 1.0)
    np.testing.assert_allclose(clipped[0][0], [0.6, 0.8], rtol=1e-6)
    assert values(clipped)[1] == pytest.approx([0.3, 0.4], rel=1e-7)
    assert values(clipped)[2:] == [None, [0.0, 0.0]]


@pytest.mark.usefixtures("library")
def test_clip_by_norm_of_infinity_is_nan_there_and_zero_elsewhere():
    clipped = transforms.clip_by_norm(pairs_of([INF, 1, -2], [3, 4]), 1.0)
    np.testing.assert_array_equal(clipped[0][0], [NAN, 0, 0])
    np.testing.assert_allclose(clipped[1][0], [0.6, 0.8], rtol=1e-6)


@pytest.mark.usefixtures("library")
def test_clip_by_norm_of_nan_is_nan_in_that_gradient_only():
    clipped = transforms.clip_by_norm(pairs_of([NAN, 1], [0.3, 0.4]), 1.0)
    np.testing.assert_array_equal(clipped[0][0], [NAN, NAN])
    np.testing.assert_allclose(clipped[1][0], [0.3, 0.4], rtol=1e-6)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "clip", [transforms.clip_by_value, transforms.clip_by_norm, transforms.clip_by_global_norm]
)
def test_a_limit_of_zero_makes_zeros(clip):
    assert values(clip(pairs_of([3, -4], [0, 0], None), 0.0)) == [[0, 0], [0, 0], None]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "clip", [transforms.clip_by_value, transforms.clip_by_norm, transforms.clip_by_global_norm]
)
def test_an_infinite_limit_changes_nothing(clip):
    assert values(clip(pairs_of([3, -4], [0, 0]), INF)) == [[3, -4], [0, 0]]


@pytest.mark.usefixtures("library")
def test_clip_by_global_norm_scales_all_by_one_factor():
    # The example in TensorFlow's own tests: norm 5, clipped to 4.
    clipped = transforms.clip_by_global_norm(pairs_of([[-2, 0, 0], [4, 0, 0]], None, [1, -2]), 4.0)
    np.testing.assert_allclose(clipped[0][0], [[-1.6, 0, 0], [3.2, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(clipped[2][0], [0.8, -1.6], rtol=1e-6)
    assert clipped[1] == (None, "v1")


@pytest.mark.usefixtures("library")
def test_clip_by_global_norm_below_the_limit_keeps_every_bit():
    gradient = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    ((clipped, _),) = transforms.clip_by_global_norm([(gradient, None)], 1e3)
    np.testing.assert_array_equal(clipped, gradient)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("limit", [1.0, 0.0, -1.0, INF])
def test_one_non_finite_element_makes_every_gradient_nan(bad, limit):
    clipped = transforms.clip_by_global_norm(pairs_of([bad, 1], [2, 3], None), limit)
    for gradient, _ in clipped[:2]:
        assert np.isnan(gradient).all()
    assert clipped[2][0] is None


@pytest.mark.usefixtures("library")
def test_a_negative_global_limit_does_nothing():
    assert values(transforms.clip_by_global_norm(pairs_of([3, 4]), -1.0)) == [[3, 4]]


@pytest.mark.usefixtures("library")
def test_zero_gradients_stay_zero():
    assert values(transforms.clip_by_global_norm(pairs_of([0, 0]), 1.0)) == [[0, 0]]


@pytest.mark.usefixtures("library")
def test_a_known_norm_can_be_given():
    given = pairs_of([3, 4])
    norm = transforms.global_norm(given)
    assert float(norm) == 5.0
    clipped = transforms.clip_by_global_norm(given, 1.0, use_norm=norm * 2)
    np.testing.assert_allclose(clipped[0][0], [0.3, 0.4], rtol=1e-6)


@pytest.mark.usefixtures("library")
def test_global_norm_of_nothing_is_zero():
    assert transforms.global_norm(pairs_of(None)) == 0.0
    assert transforms.global_norm([]) == 0.0


@pytest.mark.usefixtures("library")
def test_repeated_rows_of_slices_are_not_summed_first():
    slices = IndexedSlices(np.array([[3.0], [4.0]], np.float32), np.array([0, 0]), (5, 1))
    assert transforms.global_norm([(slices, None)]) == 5.0
    ((clipped, _),) = transforms.clip_by_norm([(slices, None)], 1.0)
    np.testing.assert_allclose(clipped.values, [[0.6], [0.8]], rtol=1e-6)
    np.testing.assert_array_equal(clipped.indices, [0, 0])
    assert clipped.dense_shape == (5, 1)
    np.testing.assert_array_equal(slices.values, [[3.0], [4.0]])
    ((cut, _),) = transforms.clip_by_value([(slices, None)], 3.5)
    np.testing.assert_array_equal(cut.values, [[3.0], [3.5]])


@pytest.mark.usefixtures("library")
def test_slices_without_rows_pass():
    empty = IndexedSlices(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), (5, 2))
    ((clipped, _),) = transforms.clip_by_global_norm([(empty, None)], 1.0)
    assert clipped.values.shape == (0, 2)
    assert transforms.global_norm([(empty, None)]) == 0.0


CLIPS = [
    lambda pairs: transforms.clip_by_value(pairs, 0.5),
    lambda pairs: transforms.clip_by_norm(pairs, 0.5),
    lambda pairs: transforms.clip_by_global_norm(pairs, 0.5),
]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("clip", CLIPS)
def test_gradients_in_the_arena_are_changed_in_place_and_others_are_not(clip):
    variables = [Variable(np.zeros(3, np.float32), name=name) for name in "ab"]
    arena = Arena(variables)
    for variable in variables:
        variable.gradient[...] = 2.0
    foreign = np.full(3, 2.0, np.float32)
    (inside, _), (outside, _) = clip([(variables[0].gradient, variables[0]), (foreign, variables[1])])
    assert inside is variables[0].gradient
    assert np.abs(inside).max() <= 0.5
    np.testing.assert_array_equal(foreign, [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(variables[1].gradient, [2.0, 2.0, 2.0])
    assert np.abs(outside).max() <= 0.5
    assert arena.size == 6


def test_another_view_of_the_arena_is_changed_in_place_too():
    variable = Variable(np.zeros((2, 2), np.float32), name="w")
    arena = Arena([variable])
    flat = arena.slabs[0].gradients[: variable.size].reshape(2, 2)
    flat[...] = 2.0
    ((clipped, _),) = transforms.clip_by_value([(flat, variable)], 0.5)
    assert clipped is flat
    np.testing.assert_array_equal(variable.gradient, np.full((2, 2), 0.5))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("clip", CLIPS)
def test_the_dtype_is_kept(clip, dtype):
    ((clipped, _),) = clip([(np.linspace(-2, 2, 7).astype(dtype), None)])
    assert clipped.dtype == dtype
    assert float(np.abs(clipped.astype(np.float64)).max()) <= 0.5


def test_half_precision_norms_do_not_overflow():
    gradient = np.full(1000, 1000, np.float16)
    assert transforms.global_norm([(gradient, None)]) == pytest.approx(1000 * math.sqrt(1000))
    ((clipped, _),) = transforms.clip_by_norm([(gradient, None)], 1.0)
    np.testing.assert_allclose(clipped.astype(float), 1 / math.sqrt(1000), rtol=1e-3)


@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e-12, 1.0, 1e12, 1e25, 1e38])
def test_float32_norms_neither_overflow_nor_underflow(size):
    gradient = np.full(100_000, size, np.float32)
    expected = float(np.float32(size)) * math.sqrt(100_000)
    assert transforms.global_norm([(gradient, None)]) == pytest.approx(expected, rel=2e-7)


def test_norm_of_a_large_gradient_is_right_to_the_last_float32_digit():
    gradient = np.random.default_rng(0).standard_normal(3_000_001).astype(np.float32)
    exact = math.sqrt(np.square(gradient.astype(np.float64)).sum())
    assert transforms.global_norm([(gradient, None)]) == pytest.approx(exact, rel=1e-8)


def test_lists_and_tensors_are_gradients_too():
    assert transforms.global_norm([([3.0, 4.0], None), (Variable([12.0]), None)]) == 13.0
    ((clipped, _),) = transforms.clip_by_value([([3.0, -4.0], None)], 3.5)
    np.testing.assert_array_equal(clipped, [3.0, -3.5])


def test_pairs_may_come_from_a_generator():
    clipped = transforms.clip_by_global_norm((pair for pair in pairs_of([3, 4], [0, 12])), 6.5)
    np.testing.assert_allclose(clipped[1][0], [0, 6], rtol=1e-6)


def test_transforms_do_what_their_functions_do():
    for transform, function in (
        (transforms.ClipValue(2.0), transforms.clip_by_value),
        (transforms.ClipNorm(2.0), transforms.clip_by_norm),
        (transforms.GlobalClipNorm(2.0), transforms.clip_by_global_norm),
    ):
        given = pairs_of([3, 4], [1, 1])
        assert values(transform(given)) == values(function(given, 2.0))


def test_clips_are_in_the_order_of_keras():
    assert transforms.clips(clipnorm=2.0, clipvalue=1.0) == [
        transforms.ClipValue(1.0),
        transforms.ClipNorm(2.0),
    ]
    assert transforms.clips(1.0, None, 0.0) == [
        transforms.ClipValue(1.0),
        transforms.GlobalClipNorm(0.0),
    ]
    assert transforms.clips() == []
    with pytest.raises(ValueError, match=r"clipnorm=1\.0 and global_clipnorm=2\.0"):
        transforms.clips(clipnorm=1.0, global_clipnorm=2.0)


@pytest.mark.parametrize("limit", [-1.0, NAN])
@pytest.mark.parametrize(
    "make",
    [
        transforms.ClipValue,
        transforms.ClipNorm,
        transforms.GlobalClipNorm,
        lambda limit: transforms.clip_by_value([], limit),
        lambda limit: transforms.clip_by_norm([], limit),
    ],
)
def test_wrong_limits_are_refused(make, limit):
    with pytest.raises(ValueError, match=f"0 or more, got {limit}"):
        make(limit)


def test_a_global_limit_of_nan_is_refused():
    with pytest.raises(ValueError, match="nan"):
        transforms.clip_by_global_norm([], NAN)
