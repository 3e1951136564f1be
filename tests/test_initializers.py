import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from distopt import initializers

RANDOM = [
    initializers.RandomNormal(0.1, 2.0),
    initializers.TruncatedNormal(0.1, 2.0),
    initializers.RandomUniform(-1.0, 3.0),
    initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
    initializers.GlorotUniform(),
    initializers.GlorotNormal(),
    initializers.HeNormal(),
    initializers.HeUniform(),
    initializers.LecunNormal(),
]


@pytest.mark.parametrize("initializer", RANDOM, ids=repr)
def test_a_value_depends_on_seed_and_name_only(initializer):
    first = initializer((40, 30), name="conv1/weights", seed=3)
    initializer((7,), name="other", seed=3)
    np.testing.assert_array_equal(initializer((40, 30), name="conv1/weights", seed=3), first)
    assert (initializer((40, 30), name="conv1/weights", seed=4) != first).all()
    assert (initializer((40, 30), name="conv2/weights", seed=3) != first).all()


@pytest.mark.parametrize("initializer", RANDOM, ids=repr)
def test_own_seed_of_an_initializer_comes_before_that_of_the_model(initializer):
    own = type(initializer)(**{**initializer.get_config(), "seed": 11})
    first = own((5, 5), name="w", seed=1)
    np.testing.assert_array_equal(own((5, 5), name="w", seed=2), first)
    np.testing.assert_array_equal(initializer((5, 5), name="w", seed=11), first)


@pytest.mark.parametrize("initializer", RANDOM, ids=repr)
def test_float32_and_bfloat16_values_are_the_rounded_float64_values(initializer):
    exact = initializer((50, 20), np.float64, name="w")
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        value = initializer((50, 20), dtype, name="w")
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, exact.astype(dtype))


def test_values_are_the_same_in_another_process():
    code = (
        "from distopt.initializers import TruncatedNormal as T;"
        "print(T(0.0, 1.0)((3,), name='w', seed=5).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(initializers.TruncatedNormal(0.0, 1.0)((3,), name="w", seed=5).tolist())


def test_truncated_normal_is_redrawn_beyond_two_sigma():
    values = initializers.TruncatedNormal(1.0, 0.5)((200_000,), np.float64, name="w")
    assert np.abs(values - 1.0).max() <= 1.0
    assert np.abs(values - 1.0).max() > 0.999
    # Four standard errors of 200,000 draws.
    assert values.mean() == pytest.approx(1.0, abs=4 * 0.44 / math.sqrt(200_000))
    assert values.std() == pytest.approx(0.8796 * 0.5, rel=0.007)


@pytest.mark.parametrize(
    ("initializer", "variance"),
    [
        (initializers.GlorotUniform(), 2 / (9 * 40 + 9 * 50)),
        (initializers.GlorotNormal(), 2 / (9 * 40 + 9 * 50)),
        (initializers.HeNormal(), 2 / (9 * 40)),
        (initializers.HeUniform(), 2 / (9 * 40)),
        (initializers.LecunNormal(), 1 / (9 * 40)),
        (initializers.VarianceScaling(3.0, "fan_out", "untruncated_normal"), 3 / (9 * 50)),
        (initializers.VarianceScaling(3.0, "fan_avg", "normal"), 3 / (9 * 45)),
    ],
)
def test_variance_of_a_filter_follows_its_fans(initializer, variance):
    values = initializer((3, 3, 40, 50), np.float64, name="w")
    assert values.std() == pytest.approx(math.sqrt(variance), rel=0.02)
    assert values.mean() == pytest.approx(0.0, abs=4 * math.sqrt(variance / values.size))


def test_glorot_uniform_fills_its_limits():
    values = initializers.GlorotUniform()((100, 200), np.float64, name="w")
    limit = math.sqrt(6 / 300)
    assert np.abs(values).max() <= limit
    assert np.abs(values).max() > 0.999 * limit


def test_fans_of_vectors_and_scalars_are_their_size():
    limit = math.sqrt(3 / 12)
    values = initializers.VarianceScaling(distribution="uniform")((12,), np.float64)
    assert 0.5 * limit < np.abs(values).max() <= limit
    assert initializers.VarianceScaling(distribution="uniform")(()).shape == ()


def test_random_uniform_stays_in_its_range():
    values = initializers.RandomUniform(-1.0, 3.0)((100_000,), np.float64, name="w")
    assert values.min() >= -1.0
    assert values.max() < 3.0
    assert values.mean() == pytest.approx(1.0, abs=0.02)
    assert values.std() == pytest.approx(4 / math.sqrt(12), rel=0.01)


def test_zeros_ones_and_constants_of_every_dtype():
    np.testing.assert_array_equal(initializers.zeros()((2,), np.int32), [0, 0])
    np.testing.assert_array_equal(initializers.zeros()((2,), bool), [False, False])
    np.testing.assert_array_equal(initializers.ones()((2, 1)), [[1.0], [1.0]])
    value = initializers.constant(0.1)((2, 2))
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, np.full((2, 2), np.float32(0.1)))


def test_constant_takes_as_many_numbers_as_the_shape_has():
    value = initializers.Constant([1, 2, 3, 4])((2, 2))
    np.testing.assert_array_equal(value, [[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ValueError, match=r"4 values, but variable 'b' of shape \(3,\) needs 3"):
        initializers.Constant([1, 2, 3, 4])((3,), name="b")


@pytest.mark.parametrize(
    "initializer",
    [*RANDOM, initializers.Zeros(), initializers.Ones(), initializers.Constant([0.5, 0.25])],
    ids=repr,
)
def test_config_makes_the_same_initializer_again(initializer):
    again = type(initializer)(**initializer.get_config())
    assert repr(again) == repr(initializer)
    np.testing.assert_array_equal(again((2,), name="w"), initializer((2,), name="w"))


def test_random_integers_are_refused():
    with pytest.raises(TypeError, match="'w' is to have dtype int32"):
        initializers.HeNormal()((2,), np.int32, name="w")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: initializers.TruncatedNormal(stddev=-1.0), "stddev .* -1.0"),
        (lambda: initializers.RandomUniform(1.0, 0.0), "1.0 and 0.0"),
        (lambda: initializers.VarianceScaling(0.0), "scale .* 0.0"),
        (lambda: initializers.VarianceScaling(mode="fan"), "mode .* 'fan'"),
        (lambda: initializers.VarianceScaling(distribution="n"), "distribution .* 'n'"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
