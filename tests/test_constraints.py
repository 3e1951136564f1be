import ml_dtypes
import numpy as np
import pytest

from distopt import constraints

COLUMNS = np.array([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])  # norms 5, 0.5, 0 along axis 0


def test_non_neg_cuts_at_zero_and_keeps_nan():
    value = constraints.NonNeg()(np.array([-1.0, 0.0, 2.0, -np.inf, np.inf, np.nan]))
    np.testing.assert_array_equal(value, [0.0, 0.0, 2.0, 0.0, np.inf, np.nan])


def test_max_norm_shortens_long_columns_only():
    value = constraints.MaxNorm(2.0)(COLUMNS)
    expected = COLUMNS * [2.0 / (5.0 + 1e-7), 0.5 / (0.5 + 1e-7), 0.0]
    np.testing.assert_allclose(value, expected, rtol=1e-14)


def test_unit_norm_leaves_zero_at_zero():
    value = constraints.UnitNorm()(COLUMNS)
    np.testing.assert_allclose(np.linalg.norm(value, axis=0), [1.0, 1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(value[:, 0], [0.6, 0.8], rtol=1e-6)


def test_min_max_norm_goes_the_part_rate_of_the_way():
    value = constraints.MinMaxNorm(1.0, 2.0, rate=0.25)(COLUMNS)
    norms = np.linalg.norm(value, axis=0)
    np.testing.assert_allclose(norms, [0.25 * 2 + 0.75 * 5, 0.25 * 1 + 0.75 * 0.5, 0], rtol=1e-6)


def test_norms_over_several_axes_are_those_of_whole_filters():
    filters = np.random.default_rng(0).standard_normal((3, 3, 4, 5)) * 3
    value = constraints.MaxNorm(1.5, axis=[0, 1, 2])(filters)
    norms = np.sqrt((value**2).sum(axis=(0, 1, 2)))
    np.testing.assert_allclose(norms, np.full(5, 1.5), rtol=1e-6)
    whole = constraints.UnitNorm(axis=None)(filters)
    assert np.sqrt((whole**2).sum()) == pytest.approx(1.0, rel=1e-6)


EVERY = [
    constraints.NonNeg(),
    constraints.MaxNorm(0.7, axis=1),
    constraints.UnitNorm(axis=None),
    constraints.MinMaxNorm(0.1, 0.9, 0.5, axis=1),
]


@pytest.mark.parametrize("constraint", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_shape_dtype_and_the_argument_are_kept(constraint, dtype):
    value = np.linspace(-2, 2, 12).reshape(3, 4).astype(dtype)
    before = value.copy()
    result = constraint(value)
    assert result.dtype == dtype
    assert result.shape == (3, 4)
    np.testing.assert_array_equal(value, before)


@pytest.mark.parametrize("constraint", EVERY, ids=repr)
def test_config_makes_the_same_constraint_again(constraint):
    again = type(constraint)(**constraint.get_config())
    assert repr(again) == repr(constraint)
    np.testing.assert_array_equal(again(COLUMNS), constraint(COLUMNS))


def test_float16_norms_do_not_overflow():
    value = constraints.UnitNorm()(np.full((4, 1), 1000.0, np.float16))
    np.testing.assert_allclose(value.astype(float), np.full((4, 1), 0.5), rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constraints.MaxNorm(-1.0), "max_value .* -1.0"),
        (lambda: constraints.MaxNorm(float("nan")), "max_value"),
        (lambda: constraints.MinMaxNorm(2.0, 1.0), "bounds .* 2.0 and 1.0"),
        (lambda: constraints.MinMaxNorm(-1.0, 1.0), "bounds"),
        (lambda: constraints.MinMaxNorm(0.0, 1.0, rate=1.5), "rate .* 1.5"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
