import numpy as np
import pytest

from distopt.transforms import GradientMultipliers
from distopt.variables import Arena, IndexedSlices, Variable


@pytest.fixture
def variable():
    return Variable(np.zeros(2, np.float32), name="test")


def multiplied(multipliers, variable, gradient=(1.0, -2.0)):
    gradient = np.array(gradient, np.float32)
    ((result, same),) = GradientMultipliers(multipliers)([(gradient, variable)])
    assert same is variable
    return result.tolist()


def test_a_variable_its_name_and_its_full_name_are_keys(variable):
    for key in (variable, "test", "test:0"):
        assert multiplied({key: 7.0}, variable) == [7.0, -14.0]


def test_the_variable_counts_before_the_full_name_and_that_before_the_plain_one(variable):
    assert multiplied({"test": 2.0, "test:0": 3.0, variable: 5.0}, variable) == [5.0, -10.0]
    assert multiplied({"test": 2.0, "test:0": 3.0}, variable) == [3.0, -6.0]


@pytest.mark.parametrize("factor", [3, 3.0, np.float64(3), Variable(3.0), lambda: 3.0, lambda: Variable(3.0)])
def test_a_factor_may_be_a_number_a_variable_or_a_callable(variable, factor):
    assert multiplied({variable: factor}, variable) == [3.0, -6.0]


def test_a_variable_factor_is_read_at_each_call(variable):
    factor = Variable(2.0)
    transform = GradientMultipliers({variable: factor})
    ((first, _),) = transform([(np.ones(2, np.float32), variable)])
    factor.assign(0.0)
    ((second, _),) = transform([(np.ones(2, np.float32), variable)])
    assert first.tolist() == [2.0, 2.0]
    assert second.tolist() == [0.0, 0.0]


def test_a_mask_is_a_factor(variable):
    assert multiplied({variable: np.array([1.0, 0.0])}, variable) == [1.0, 0.0]


def test_others_and_none_pass(variable):
    other = Variable(np.zeros(2, np.float32), name="other")
    gradient = np.ones(2, np.float32)
    pairs = GradientMultipliers({variable: 2.0})([(None, variable), (gradient, other)])
    assert pairs == [(None, variable), (gradient, other)]
    assert pairs[1][0] is gradient
    assert gradient.tolist() == [1.0, 1.0]


def test_rows_of_slices_are_multiplied(variable):
    slices = IndexedSlices(np.array([1.0, 2.0], np.float32), np.array([1, 1]), (2,))
    ((result, _),) = GradientMultipliers({variable: 3.0})([(slices, variable)])
    assert result.values.tolist() == [3.0, 6.0]
    assert result.indices.tolist() == [1, 1]
    assert result.dense_shape == (2,)
    assert slices.values.tolist() == [1.0, 2.0]


def test_a_gradient_in_the_arena_is_changed_in_place_and_another_is_not(variable):
    Arena([variable])
    variable.gradient[...] = 2.0
    ((result, _),) = GradientMultipliers({"test": 3.0})([(variable.gradient, variable)])
    assert result is variable.gradient
    assert result.tolist() == [6.0, 6.0]
    foreign = np.ones(2, np.float32)
    GradientMultipliers({"test": 3.0})([(foreign, variable)])
    assert foreign.tolist() == [1.0, 1.0]


def test_names_that_no_variable_has_are_warned_about_once(variable):
    transform = GradientMultipliers({"tset": 3.0, "test": 2.0})
    pair = (np.ones(2, np.float32), variable)
    with pytest.warns(UserWarning, match=r"multipliers are given for \['tset'\]"):
        transform([pair])
    transform([pair])  # warnings are errors here


def test_wrong_multipliers_are_refused(variable):
    with pytest.raises(TypeError, match="must be a dict"):
        GradientMultipliers([(variable, 2.0)])
    with pytest.raises(TypeError, match=r"key .* got 3"):
        GradientMultipliers({3: 2.0})
