import gzip
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from distopt import scopes
from distopt.optimizers import assign_moving_average, moving_averages, weighted_moving_average
from distopt.scopes import Graph
from distopt.variables import Arena, Variable

_FILE = Path(__file__).parents[1] / "data" / "tensorflow_cases.json.gz"
RECORDED = {case["name"]: case for case in json.loads(gzip.decompress(_FILE.read_bytes()))["ema"]}


@pytest.fixture(autouse=True)
def graph():
    with Graph().as_default() as graph:
        yield graph


@pytest.mark.parametrize("size", [0, 1, 16 * 1024 - 1, 16 * 1024, 50_000])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_update_in_blocks_equals_the_formula(size, dtype):
    rng = np.random.default_rng(0)
    average, value = (rng.standard_normal(size).astype(dtype) for _ in range(2))
    # Half precision is computed in float32 and rounded once.
    wide = np.float64 if dtype is np.float64 else np.float32
    a, v = average.astype(wide), value.astype(wide)
    expected = (a - wide(0.25) * (a - v)).astype(dtype)
    moving_averages.update_average(average, value, 0.25)
    np.testing.assert_array_equal(average, expected)


def test_update_of_values_that_are_not_contiguous():
    average = np.zeros((3, 4), np.float32)
    value = np.arange(12, dtype=np.float32).reshape(4, 3).T
    moving_averages.update_average(average, value, 0.5)
    np.testing.assert_array_equal(average, value / 2)


def test_update_of_an_average_that_is_not_contiguous():
    memory = np.zeros((3, 8), np.float32)
    average, value = memory[:, ::2], np.arange(12, dtype=np.float64).reshape(3, 4)
    moving_averages.update_average(average, value, 0.5)
    np.testing.assert_array_equal(average, value / 2)
    assert not memory[:, 1::2].any()


def test_an_assigned_average_without_debias_starts_at_the_variables_value():
    variable = Variable(np.array([10.0, 20.0], np.float32), name="w")
    case = RECORDED["plain"]
    for value, expected in zip(case["values"], case["average_initial_then_after_each"][1:], strict=True):
        assert assign_moving_average(variable, value, 0.9, zero_debias=False) is variable
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-6)
    assert scopes.global_variables() == []


def test_an_assigned_average_is_debiased_by_default():
    variable = Variable(np.array([10.0, 20.0], np.float32), name="w")
    case = RECORDED["tensor debias"]  # the same recurrence, whatever the variable starts at
    for value, expected in zip(case["values"], case["average_initial_then_after_each"][1:], strict=True):
        assign_moving_average(variable, value, 0.9)
        np.testing.assert_allclose(variable.numpy(), expected, rtol=2e-6)
    biased, local_step = scopes.global_variables()
    assert [biased.name, local_step.name] == ["w/biased", "w/local_step"]
    assert int(local_step.numpy()) == 5
    assert not biased.trainable
    np.testing.assert_allclose(biased.numpy(), variable.numpy() * (1 - 0.9**5), rtol=1e-6)


def test_each_variable_has_its_own_correction():
    first, second = Variable([5.0], name="a"), Variable([7.0], name="b")
    assign_moving_average(first, [1.0], 0.5)
    assign_moving_average(first, [1.0], 0.5)
    assign_moving_average(second, [3.0], 0.5)
    assert first.numpy().tolist() == [1.0]
    assert second.numpy().tolist() == [3.0]


def test_averages_are_assigned_in_place_in_an_arena():
    variable = Variable(np.zeros(2, np.float32), name="w")
    Arena([variable])
    view = variable.value
    assign_moving_average(variable, Variable([2.0, 4.0]), lambda: 0.5, zero_debias=False)
    assert variable.value is view
    assert view.tolist() == [1.0, 2.0]


def test_a_decay_of_one_keeps_and_of_zero_copies():
    variable = Variable(np.array([3.0], np.float32))
    assert assign_moving_average(variable, [7.0], 1.0, zero_debias=False).numpy().tolist() == [3.0]
    assert assign_moving_average(variable, [7.0], 0.0, zero_debias=False).numpy().tolist() == [7.0]
    assert assign_moving_average(variable, [9.0], 0.0).numpy().tolist() == [9.0]


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(TypeError, match="to a Variable, got ndarray"):
        assign_moving_average(np.zeros(2), np.zeros(2), 0.9)
    with pytest.raises(TypeError, match=r"^The variables must be half, float, or double: 'n' has"):
        assign_moving_average(Variable(3, name="n"), 4, 0.9)
    variable = Variable(np.zeros(2, np.float32), name="w")
    with pytest.raises(ValueError, match=r"into 'w' has shape \(3,\), the variable has \(2,\)"):
        assign_moving_average(variable, np.zeros(3), 0.9)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1\.5"):
        assign_moving_average(variable, np.zeros(2), 1.5)


def test_weighted_averages_equal_those_recorded_from_tensorflow():
    case = RECORDED["weighted_moving_average"]
    now = [0.0, 0.0]
    average = weighted_moving_average(lambda: now[0], case["decay"], lambda: now[1])
    assert average.variables() == []
    found = []
    for now[:] in case["value_weight"]:
        found.append(float(average()))
    np.testing.assert_allclose(found, case["results"], rtol=2e-6)
    assert [v.name for v in average.variables()] == [
        "WeightedMovingAvg/value_x_weight",
        "WeightedMovingAvg/weight",
    ]
    assert scopes.global_variables() == average.variables()


def test_values_and_weights_may_be_variables_of_several_elements():
    value, weight = Variable([1.0, 10.0]), Variable(1.0)
    average = weighted_moving_average(value, Variable(0.5), weight, collections=["averages"], name="mine")
    assert average().tolist() == [1.0, 10.0]
    value.assign([4.0, 40.0])
    weight.assign(2.0)
    # (0.25 * 1 + 0.5 * 8) / (0.25 + 0.5 * 2), and ten times that
    np.testing.assert_allclose(average(), [3.4, 34.0], rtol=1e-6)
    assert scopes.get_collection("averages") == average.variables()
    assert scopes.global_variables() == []
    assert average.variables()[0].name == "mine/value_x_weight"


def test_a_weighted_average_without_any_weight_is_nan():
    assert np.isnan(weighted_moving_average(3.0, 0.5, 0.0)())
    with pytest.raises(ValueError, match=r"decay must be"):
        weighted_moving_average(3.0, -0.5, 1.0)()
