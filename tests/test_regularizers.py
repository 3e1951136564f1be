import ml_dtypes
import numpy as np
import pytest

from distopt import regularizers
from distopt.variables import Variable

WEIGHTS = np.array([[1.0, -2.0], [0.0, 3.0]])


def test_l2_has_the_half_of_slim():
    assert regularizers.l2_regularizer(0.1)(np.array([1.0, -2.0])) == pytest.approx(0.25)


def test_penalties_are_the_sums_of_their_definitions():
    assert regularizers.l1_regularizer(0.5)(WEIGHTS) == pytest.approx(0.5 * 6)
    assert regularizers.l2_regularizer(0.5)(WEIGHTS) == pytest.approx(0.5 * 14 / 2)
    assert regularizers.l1_l2_regularizer()(WEIGHTS) == pytest.approx(6 + 7)
    assert regularizers.l1_l2_regularizer(0.5, 2.0)(WEIGHTS) == pytest.approx(3 + 14)


def test_a_regularizer_takes_a_variable_as_well():
    variable = Variable(WEIGHTS.astype(np.float32))
    loss = regularizers.l2_regularizer(1.0)(variable)
    assert loss == pytest.approx(7)
    assert loss.dtype == np.float32
    assert loss.shape == ()


SOME = [
    regularizers.l1_regularizer(0.3),
    regularizers.l2_regularizer(0.3),
    regularizers.l1_l2_regularizer(0.2, 0.7),
    regularizers.RegularizerSum([regularizers.l1_regularizer(0.3), regularizers.l2_regularizer(0.1)]),
    regularizers.L1(0.3),
    regularizers.L2(0.3),
    regularizers.L1L2(0.2, 0.7),
    regularizers.no_regularizer,
]


@pytest.mark.parametrize("regularizer", SOME, ids=repr)
def test_gradient_agrees_with_finite_differences(regularizer):
    rng = np.random.default_rng(0)
    value = rng.uniform(0.5, 2.0, (300, 250)) * rng.choice([-1.0, 1.0], (300, 250))
    direction = rng.standard_normal(value.shape)
    step = 1e-5
    expected = (regularizer.loss(value + step * direction) - regularizer.loss(value - step * direction)) / (
        2 * step
    )
    slope = (regularizer.gradient(value) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("regularizer", SOME, ids=repr)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_gradient_fills_out_and_keeps_the_dtype(regularizer, dtype):
    value = np.linspace(-1, 1, 100_000).astype(dtype)
    out = np.full_like(value, 7)
    result = regularizer.gradient(value, out=out)
    assert result is out
    assert regularizer.gradient(value).dtype == dtype
    np.testing.assert_array_equal(out, regularizer.gradient(value))
    assert regularizer.loss(value).dtype == dtype


def test_l1_gradient_at_zero_is_zero():
    np.testing.assert_array_equal(regularizers.l1_regularizer(1.0).gradient(WEIGHTS), np.sign(WEIGHTS))


def test_arrays_that_are_not_contiguous_give_the_same():
    value = np.arange(12.0).reshape(3, 4).T - 5
    regularizer = regularizers.l1_l2_regularizer(0.5, 0.25)
    assert regularizer.loss(value) == pytest.approx(regularizer.loss(value.copy()))
    out = np.empty(value.shape)
    np.testing.assert_allclose(regularizer.gradient(value, out=out), 0.5 * np.sign(value) + 0.25 * value)


def test_infinite_weights_have_no_nan_in_the_l1_gradient():
    gradient = regularizers.l1_regularizer(2.0).gradient(np.array([np.inf, -np.inf]))
    np.testing.assert_array_equal(gradient, [2.0, -2.0])


def test_a_large_float32_penalty_is_exact_to_its_last_digits():
    value = np.full(10_000_000, 0.1, np.float32)
    exact = 0.5 * 1e7 * float(np.float32(0.1)) ** 2
    assert regularizers.l2_regularizer(1.0).loss(value) == pytest.approx(exact, rel=2e-7)


def test_scale_zero_gives_no_penalty_but_is_a_regularizer():
    for regularizer in (
        regularizers.l1_regularizer(0.0),
        regularizers.l2_regularizer(0.0),
        regularizers.l1_l2_regularizer(0.0, 0.0),
    ):
        assert regularizer is regularizers.no_regularizer
        assert regularizer(WEIGHTS) is None


def test_sum_regularizer_leaves_out_none():
    total = regularizers.sum_regularizer(
        [None, regularizers.l1_regularizer(1.0), regularizers.l2_regularizer(1.0)]
    )
    assert total is not None
    assert total(WEIGHTS) == pytest.approx(13)
    assert regularizers.sum_regularizer([None, None]) is None
    assert regularizers.sum_regularizer([]) is None
    nothing = regularizers.sum_regularizer([None, regularizers.no_regularizer])
    assert nothing is regularizers.no_regularizer


@pytest.mark.parametrize("make", [regularizers.l1_regularizer, regularizers.l2_regularizer])
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1, "cannot be an integer: 1"),
        (True, "cannot be an integer"),
        (np.int64(2), "cannot be an integer"),
        (-0.5, "got -0.5"),
        (float("nan"), "got nan"),
        (float("inf"), "got inf"),
    ],
)
def test_wrong_scales_are_refused(make, scale, message):
    with pytest.raises(ValueError, match=message):
        make(scale)
    with pytest.raises(ValueError, match=message):
        regularizers.l1_l2_regularizer(0.5, scale)


def test_config_makes_the_same_regularizer_again():
    config = regularizers.l1_l2_regularizer(0.5, 0.25).get_config()
    assert config == {"l1": 0.5, "l2": 0.25}
    assert regularizers.ElasticNet(**config)(WEIGHTS) == pytest.approx(0.5 * 6 + 0.25 * 7)
    with pytest.raises(ValueError, match="l2 must be"):
        regularizers.ElasticNet(0.0, -1.0)


def test_keras_l2_has_no_half():
    # Recorded from TensorFlow: l2(0.1) of [1, -2] is 0.5, contrib's l2_regularizer(0.1) is 0.25.
    value = np.array([1.0, -2.0])
    assert regularizers.L2(0.1)(value) == pytest.approx(0.5)
    assert regularizers.l2(0.1)(value) == pytest.approx(0.5)
    np.testing.assert_allclose(regularizers.L2(0.1).gradient(value), [0.2, -0.4])
    assert regularizers.L2(0.1)(value) == regularizers.l2_regularizer(0.2)(value)


def test_keras_penalties_are_the_sums_of_their_definitions():
    assert regularizers.L1(0.5)(WEIGHTS) == pytest.approx(0.5 * 6)
    assert regularizers.L1L2(0.5, 0.25)(WEIGHTS) == pytest.approx(0.5 * 6 + 0.25 * 14)
    assert regularizers.L1L2()(WEIGHTS) == 0
    assert regularizers.l1_l2()(WEIGHTS) == pytest.approx(0.01 * 6 + 0.01 * 14)
    assert regularizers.l1()(WEIGHTS) == pytest.approx(0.01 * 6)
    assert regularizers.L2(1)(WEIGHTS) == pytest.approx(14)  # an integer is a number to Keras


@pytest.mark.parametrize(
    "regularizer", [regularizers.L1(0.3), regularizers.L2(0.3), regularizers.L1L2(0.2, 0.7)], ids=repr
)
def test_keras_config_makes_the_same_regularizer_again(regularizer):
    again = type(regularizer)(**regularizer.get_config())
    assert again.get_config() == regularizer.get_config()
    assert again(WEIGHTS) == regularizer(WEIGHTS)


def test_keras_regularizers_tell_their_arguments():
    assert repr(regularizers.L2(0.5)) == "L2(l2=0.5)"
    assert repr(regularizers.L1L2(0.5, 2.0)) == "L1L2(l1=0.5, l2=2.0)"


@pytest.mark.parametrize("make", [regularizers.L1, regularizers.L2, regularizers.L1L2])
@pytest.mark.parametrize(
    ("factor", "message"),
    [
        ("a", "'a' is not a valid regularization penalty number"),
        (None, "None is not a valid"),
        (True, "True is not a valid"),
        (-0.5, "Value: -0.5 is not a valid"),
        (float("nan"), "Value: nan is not a valid"),
        (float("inf"), "Value: inf is not a valid"),
    ],
)
def test_wrong_factors_of_keras_regularizers_are_refused(make, factor, message):
    with pytest.raises(ValueError, match=message):
        make(factor)
