"""TensorFlow 1's decay functions, bound to a global step."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from distopt import schedules
from distopt.optimizers import Adam
from distopt.variables import Variable

_FILE = Path(__file__).parents[1] / "data" / "tensorflow_cases.json.gz"
RECORDED = json.loads(gzip.decompress(_FILE.read_bytes()))["lr_schedules_tf1"]

# name -> (arguments after learning_rate and global_step, what the class is called with)
FUNCTIONS = {
    "exponential_decay": (10, 0.5),
    "natural_exp_decay": (10, 0.5),
    "inverse_time_decay": (10, 0.5),
    "polynomial_decay": (10,),
    "cosine_decay": (10,),
    "cosine_decay_restarts": (10,),
    "linear_cosine_decay": (10,),
    "noisy_linear_cosine_decay": (10,),
}


@pytest.mark.parametrize("case", RECORDED, ids=[f"{i}-{case['name']}" for i, case in enumerate(RECORDED)])
def test_rates_equal_those_recorded_from_tensorflow(case):
    step = Variable(np.int64(0), name="global_step")
    argument = "x" if case["name"] == "piecewise_constant" else "global_step"
    rate = getattr(schedules, case["name"])(**{argument: step}, **case["kwargs"])
    assert len(case["steps"]) > 30
    for number, expected in zip(case["steps"], case["values"], strict=True):
        step.assign(number)
        # TensorFlow computes in float32: the phase of a late cosine has an error of 2e-7.
        close = max(case["atol"], 2e-7 if "cosine" in case["name"] else 0.0)
        assert rate() == pytest.approx(expected, rel=case["rtol"], abs=close), number


def test_polynomial_cycle_stretches_the_period():
    step = Variable(0)
    rate = schedules.polynomial_decay(0.1, step, 10, 0.01, cycle=True)
    found = []
    for number in (0, 10, 11, 20, 21):
        step.assign(number)
        found.append(rate())
    assert found == pytest.approx([0.1, 0.01, 0.09 * 9 / 20 + 0.01, 0.01, 0.09 * 9 / 30 + 0.01])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "step", [7, 7.0, np.int64(7), np.array(7), Variable(7), lambda: 7, lambda: Variable(7.0)]
)
def test_the_global_step_may_be_a_number_a_variable_or_a_callable(name, step):
    function = getattr(schedules, name)
    expected = function(0.1, 7, *FUNCTIONS[name]).schedule(7)
    rate = function(0.1, step, *FUNCTIONS[name])()
    assert type(rate) is float
    assert rate == expected


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_learning_rate_may_be_a_variable_that_changes(name):
    function = getattr(schedules, name)
    learning_rate = Variable(np.float64(0.5))
    rate = function(learning_rate, 3, *FUNCTIONS[name])
    before = rate()
    assert before == function(0.5, 3, *FUNCTIONS[name])()
    learning_rate.assign(0.25)
    assert rate() == function(0.25, 3, *FUNCTIONS[name])()
    assert rate() != before


def test_every_number_may_be_a_callable():
    period = [10]
    rate = schedules.exponential_decay(0.1, 20, lambda: period[0], Variable(0.5))
    assert rate() == pytest.approx(0.025)
    period[0] = 20
    assert rate() == pytest.approx(0.05)


def test_the_schedule_of_a_rate_can_be_saved():
    step = Variable(4)
    rate = schedules.cosine_decay_restarts(0.1, step, 5, 1.5, 0.9, 0.01, name="restarts")
    assert rate.get_config() == {
        "initial_learning_rate": 0.1,
        "first_decay_steps": 5,
        "t_mul": 1.5,
        "m_mul": 0.9,
        "alpha": 0.01,
        "name": "restarts",
    }
    again = schedules.deserialize(json.loads(json.dumps(schedules.serialize(rate.schedule))))
    assert again == schedules.CosineDecayRestarts(0.1, 5, 1.5, 0.9, 0.01, "restarts")
    assert again(4) == rate()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_function_keeps_an_argument_for_itself(name):
    rate = getattr(schedules, name)(0.1, 0, *FUNCTIONS[name], name="of a test")
    config = rate.get_config()
    assert config["name"] == "of a test"
    assert config["initial_learning_rate"] == 0.1
    assert schedules.deserialize(schedules.serialize(rate.schedule)) == rate.schedule


def test_noisy_rates_are_those_of_the_class_with_the_same_seed():
    step = Variable(0)
    rate = schedules.noisy_linear_cosine_decay(0.1, step, 100, 0.01, 0.6, 0.7, 0.1, 0.02, seed=9)
    schedule = schedules.NoisyLinearCosineDecay(0.1, 100, 0.01, 0.6, 0.7, 0.1, 0.02, seed=9)
    for number in (0, 1, 50, 200):
        step.assign(number)
        assert rate() == schedule(number)


def test_an_optimizer_takes_the_rate_as_its_learning_rate():
    step = Variable(np.int64(0))
    rate = schedules.piecewise_constant(step, [1, 2], [1.0, 0.5, 0.25])
    optimizer = Adam(rate)
    found = []
    for number in range(4):
        step.assign(number)
        found.append(optimizer.hyperparameter("learning_rate"))
    assert found == [1.0, 1.0, 0.5, 0.25]


MESSAGES = {
    "exponential_decay": "global_step is required for exponential_decay.",
    "natural_exp_decay": "global_step is required for natural_exp_decay.",
    "inverse_time_decay": "global_step is required for inverse_time_decay.",
    "polynomial_decay": "global_step is required for polynomial_decay.",
    "cosine_decay": "cosine decay requires global_step",
    "cosine_decay_restarts": "cosine decay restarts requires global_step",
    "linear_cosine_decay": "linear cosine decay requires global_step",
    "noisy_linear_cosine_decay": "noisy linear cosine decay requires global_step",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_missing_global_step_is_refused_in_tensorflows_words(name):
    with pytest.raises(ValueError, match=f"^{MESSAGES[name]}"):
        getattr(schedules, name)(0.1, None, *FUNCTIONS[name])


def test_a_missing_step_of_piecewise_constant_is_refused():
    with pytest.raises(ValueError, match="global_step is required for piecewise_constant"):
        schedules.piecewise_constant(None, [1], [1.0, 0.5])


def test_wrong_numbers_are_refused_at_once():
    with pytest.raises(ValueError, match="decay_steps"):
        schedules.exponential_decay(0.1, Variable(0), 0, 0.5)
    with pytest.raises(ValueError, match=r"initial_learning_rate .* nan"):
        schedules.cosine_decay(math.nan, Variable(0), 10)


@pytest.mark.parametrize(
    ("step", "boundaries"),
    [
        (7, [5, 10]),
        (Variable(np.int64(7)), [5, 10]),
        (Variable(np.int32(7)), np.array([5, 10], np.int64)),
        (7.0, [5.0, 10.0]),
        (Variable(np.float32(7)), [5.5, 10.0]),
        (Variable(np.float64(7)), np.array([5.0, 10.0])),
    ],
)
def test_boundaries_of_the_steps_type_are_taken(step, boundaries):
    rate = schedules.piecewise_constant(step, boundaries, [1.0, 0.5, 0.25])
    assert rate() == 0.5
    assert json.loads(json.dumps(rate.get_config()))["boundaries"] == list(boundaries)


@pytest.mark.parametrize(
    ("step", "boundaries", "types"),
    [
        (7, [5, 10.0], r"\(float32\) .* x \(int32\)"),
        (Variable(np.int64(7)), [5.0, 10.0], r"\(float32\) .* x \(int64\)"),
        (Variable(np.float32(7)), [5, 10], r"\(int32\) .* x \(float32\)"),
        (Variable(np.float32(7)), np.array([5.0, 10.0]), r"\(float64\) .* x \(float32\)"),
    ],
)
def test_boundaries_of_another_type_than_the_step_are_refused(step, boundaries, types):
    with pytest.raises(ValueError, match=f"^Boundaries {types}"):
        schedules.piecewise_constant(step, boundaries, [1.0, 0.5, 0.25])
    rate = schedules.piecewise_constant(lambda: step, boundaries, [1.0, 0.5, 0.25])
    with pytest.raises(ValueError, match=f"^Boundaries {types}"):
        rate()


def test_values_of_several_types_are_refused():
    with pytest.raises(ValueError, match=r"^Values must have .* same dtype \(int32 vs float32\)"):
        schedules.piecewise_constant(0, [5], [1, 0.5])


def test_lengths_of_boundaries_and_values_must_fit():
    with pytest.raises(ValueError, match=r"^The length of boundaries should be 1 less"):
        schedules.piecewise_constant_decay(0, [5], [1.0, 0.5, 0.25])
    with pytest.raises(IndexError, match="boundaries"):
        schedules.piecewise_constant(0, [], [1.0])
