import gzip
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from distopt import scopes
from distopt.optimizers.averages import ExponentialMovingAverage
from distopt.scopes import Graph, GraphKeys
from distopt.testing import world
from distopt.variables import Arena, Variable

_FILE = Path(__file__).parents[1] / "data" / "tensorflow_cases.json.gz"
RECORDED = {case["name"]: case for case in json.loads(gzip.decompress(_FILE.read_bytes()))["ema"]}


@pytest.fixture(autouse=True)
def graph():
    with Graph().as_default() as graph:
        yield graph


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["plain", "num_updates_low"])
def test_averages_of_a_variable_equal_those_recorded_from_tensorflow(name):
    case = RECORDED[name]
    count = 0
    variable = Variable(np.array([10.0, 20.0], np.float32), name="w")
    average = ExponentialMovingAverage(
        **case["kwargs"], num_updates=None if name == "plain" else lambda: count
    )
    average.track([variable])
    seen = [average.average(variable).numpy()]
    for value in case["values"]:
        variable.assign(value)
        average.apply([variable])
        seen.append(average.average(variable).numpy())
        count += 1
    close(seen, case["average_initial_then_after_each"])


def test_averages_of_a_named_value_equal_those_recorded_from_tensorflow():
    case = RECORDED["tensor debias"]
    average = ExponentialMovingAverage(**case["kwargs"])
    first = np.array(case["values"][0], np.float32)
    average.track([("loss", first)])
    seen = [average.average("loss").numpy()]
    for value in case["values"]:
        average.apply([("loss", np.array(value, np.float32))])
        seen.append(average.average("loss").numpy())
    close(seen, case["average_initial_then_after_each"])


def test_weighted_averages_equal_those_recorded_from_tensorflow():
    case = RECORDED["weighted_moving_average"]
    average = ExponentialMovingAverage(case["decay"])
    results = []
    for value, weight in case["value_weight"]:
        average.apply([("product", float(value * weight)), ("weight", float(weight))])
        results.append(average.average("product").numpy() / average.average("weight").numpy())
    close(results, case["results"])


def test_named_values_without_debias_start_at_zero():
    average = ExponentialMovingAverage(0.9)
    average.apply([("loss", 2.0)])
    close(average.average("loss").numpy(), 0.2)
    assert [variable.name for variable in average.variables()] == ["loss/ExponentialMovingAverage"]


def test_variables_are_never_debiased():
    variable = Variable(np.array([10.0], np.float32), name="w")
    average = ExponentialMovingAverage(0.9, zero_debias=True)
    average.track([variable])
    variable.assign([0.0])
    average.apply([variable])
    close(average.average(variable).numpy(), [9.0])


@pytest.mark.parametrize("updates", [3, 3.0, np.int64(3), Variable(3), lambda: 3, lambda: Variable(3)])
def test_num_updates_may_be_a_number_a_variable_or_a_callable(updates):
    variable = Variable(np.array([1.0], np.float32), name="w")
    average = ExponentialMovingAverage(0.9, num_updates=updates)
    average.track([variable])
    variable.assign([0.0])
    average.apply([variable])
    close(average.average(variable).numpy(), [4 / 13])


def test_apply_tracks_what_is_new_at_its_present_value():
    variable = Variable(np.array([5.0], np.float32), name="w")
    average = ExponentialMovingAverage(0.9)
    assert average.average(variable) is None
    average.apply([variable])
    close(average.average(variable).numpy(), [5.0])


def test_default_is_all_trainable_variables():
    weights = scopes.get_variable("w", [2])
    scopes.get_variable("step", [], np.int64, trainable=False)
    average = ExponentialMovingAverage(0.9)
    average.apply()
    assert [variable.name for variable in average.variables()] == ["w/ExponentialMovingAverage"]
    assert scopes.moving_average_variables() == [weights]


def test_repeated_apply_keeps_the_average_and_the_collections():
    weights = scopes.get_variable("w", [2])
    average = ExponentialMovingAverage(0.9)
    average.apply()
    first = average.average(weights)
    average.apply()
    assert average.average(weights) is first
    assert scopes.moving_average_variables() == [weights]
    assert scopes.global_variables() == [weights, first]
    assert scopes.trainable_variables() == [weights]
    assert not first.trainable


def test_average_name_is_known_before_apply():
    variable = Variable(np.zeros(1, np.float32), name="conv1/weights")
    assert ExponentialMovingAverage(0.9).average_name(variable) == "conv1/weights/ExponentialMovingAverage"
    assert ExponentialMovingAverage(0.9, name="slow").average_name("loss") == "loss/slow"


def test_variables_to_restore_maps_averages_onto_variables():
    weights = scopes.get_variable("w", [1])
    running = scopes.get_variable("running", [1], trainable=False)
    step = scopes.get_variable("step", [], np.int64, trainable=False)
    average = ExponentialMovingAverage(0.9)
    expected = {"w/ExponentialMovingAverage": weights, "running": running, "step": step}
    assert average.variables_to_restore() == expected
    average.apply()
    assert average.variables_to_restore() == expected
    average.apply([running])
    assert average.variables_to_restore() == {
        "w/ExponentialMovingAverage": weights,
        "running/ExponentialMovingAverage": running,
        "step": step,
    }
    assert average.variables_to_restore([running]) == {
        "running/ExponentialMovingAverage": running,
        "w": weights,
        "w/ExponentialMovingAverage": average.average(weights),
        "step": step,
    }


def test_averages_follow_variables_that_moved_into_an_arena():
    variables = [Variable(np.full(3, 2.0, np.float32), name=name) for name in "ab"]
    average = ExponentialMovingAverage(0.5)
    average.track(variables)
    arena = Arena(variables)
    arena.slabs[0].values[...] = 0.0
    average.apply(variables)
    for variable in variables:
        close(average.average(variable).numpy(), np.ones(3))


def test_averaged_weights_are_in_force_within_the_block_only():
    variables = [Variable(np.full(3, 2.0, np.float32), name=name) for name in "ab"]
    Arena(variables)
    views = [variable.value for variable in variables]
    average = ExponentialMovingAverage(0.75)
    average.track(variables)
    for variable in variables:
        variable.assign(np.full(3, 6.0))
    average.apply([*variables, ("loss", 1.0)])
    with average.averaged_weights():
        for variable, view in zip(variables, views, strict=True):
            assert variable.value is view
            close(variable.numpy(), np.full(3, 3.0))
        variables[0].assign(np.zeros(3))
    for variable in variables:
        close(variable.numpy(), np.full(3, 6.0))
        close(average.average(variable).numpy(), np.full(3, 3.0))


def test_the_weights_come_back_after_an_error_in_the_block():
    variable = Variable(np.array([2.0], np.float32), name="w")
    average = ExponentialMovingAverage(0.5)
    average.track([variable])
    variable.assign([6.0])
    with pytest.raises(KeyError), average.averaged_weights():
        raise KeyError
    close(variable.numpy(), [6.0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_averages_of_an_arena_lie_in_its_layout_and_are_updated_in_one_pass(dtype, monkeypatch):
    from distopt.optimizers import averages

    passes = []
    update = averages.update_average
    monkeypatch.setattr(averages, "update_average", lambda *a: (passes.append(a[0].size), update(*a)))
    shapes = [(3, 2), (), (700,), (5,)]
    variables = [Variable(np.full(shape, 2.0, dtype), name=f"v{i}") for i, shape in enumerate(shapes)]
    (slab,) = Arena(variables).slabs
    average = ExponentialMovingAverage(0.75)
    average.track(variables)
    for variable in variables:
        variable.assign(np.full(variable.shape, 6.0))
    average.apply(variables)
    assert passes == [slab.values.size]
    for variable in variables:
        shadow = average.average(variable)
        assert shadow.dtype == dtype
        np.testing.assert_array_equal(shadow.numpy(), np.full(variable.shape, 3.0, dtype))
    first = average.average(variables[0]).value
    for variable in variables[1:]:
        shadow = average.average(variable).value
        distance = shadow.__array_interface__["data"][0] - first.__array_interface__["data"][0]
        assert distance == (variable.start - variables[0].start) * slab.dtype.itemsize


def test_some_variables_of_an_arena_can_be_averaged_without_the_others():
    variables = [Variable(np.full(3, 2.0, np.float32), name=name) for name in "abcd"]
    Arena(variables)
    average = ExponentialMovingAverage(0.5)
    average.track(variables)
    for variable in variables:
        variable.assign(np.full(3, 6.0))
    average.apply([variables[0], variables[2]])
    found = [average.average(variable).numpy()[0] for variable in variables]
    assert found == [4.0, 2.0, 4.0, 2.0]


def test_an_average_keeps_its_variable_when_it_moves_into_an_arena():
    variables = [Variable(np.full(3, 2.0, np.float32), name=name) for name in "ab"]
    average = ExponentialMovingAverage(0.5)
    average.apply(variables)
    before = average.average(variables[0])
    variables[0].assign([6.0, 6.0, 6.0])
    average.apply(variables)
    Arena(variables)
    average.apply(variables)
    assert average.average(variables[0]) is before
    close(before.numpy(), np.full(3, 5.0))
    before.assign(np.zeros(3))  # as a checkpoint does it
    average.apply([variables[0]])
    close(average.average(variables[0]).numpy(), np.full(3, 3.0))


def test_named_values_are_averaged_over_the_ranks_first():
    def rank(communicator):
        value = np.array([1.0, 2.0], np.float32) * (communicator.rank + 1)
        average = ExponentialMovingAverage(0.5, zero_debias=True, communicator=communicator)
        with Graph().as_default():
            average.apply([("loss", value), ("one", float(communicator.rank))])
        assert value.tolist() == [1.0 + communicator.rank, 2.0 + 2 * communicator.rank]
        return average.average("loss").numpy().tolist(), float(average.average("one"))

    assert world(3, rank) == [([2.0, 4.0], 1.0)] * 3


def test_decay_of_one_keeps_and_of_zero_copies():
    variable = Variable(np.array([3.0], np.float32), name="w")
    keeps, copies = ExponentialMovingAverage(1.0), ExponentialMovingAverage(0.0)
    for average in (keeps, copies):
        average.track([variable])
    variable.assign([7.0])
    for average in (keeps, copies):
        average.apply([variable])
    assert keeps.average(variable).numpy() == [3.0]
    assert copies.average(variable).numpy() == [7.0]


def test_integers_and_nameless_values_are_refused():
    average = ExponentialMovingAverage(0.9)
    with pytest.raises(TypeError, match=r"^The variables must be half, float, or double: 'step' has"):
        average.apply([Variable(np.int64(3), name="step")])
    with pytest.raises(TypeError, match="'count' has dtype int64"):
        average.apply([("count", np.array(3))])
    with pytest.raises(TypeError, match=r"\(name, value\) pairs, got array"):
        average.apply([np.zeros(3)])
    assert average.variables() == []


def test_nothing_to_average_and_wrong_shapes_are_errors():
    average = ExponentialMovingAverage(0.9)
    with pytest.raises(ValueError, match="nothing to average"):
        average.apply()
    average.apply([("loss", np.zeros(2))])
    with pytest.raises(ValueError, match=r"has shape \(3,\), but it had \(2,\)"):
        average.apply([("loss", np.zeros(3))])


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_wrong_decays_are_refused(decay):
    with pytest.raises(ValueError, match=f"decay must be in .* got {decay}"):
        ExponentialMovingAverage(decay)


def test_averages_belong_in_the_collection_of_their_graph():
    variable = Variable(np.zeros(1, np.float32), name="w")
    with Graph().as_default() as other:
        ExponentialMovingAverage(0.9).track([variable])
        assert other.get_collection(GraphKeys.MOVING_AVERAGE_VARIABLES) == [variable]
    assert scopes.moving_average_variables() == []
