import dataclasses
import gzip
import json
import math
import statistics
from pathlib import Path

import pytest

from distopt import schedules

_FILE = Path(__file__).parents[1] / "data" / "tensorflow_cases.json.gz"
RECORDED = json.loads(gzip.decompress(_FILE.read_bytes()))["lr_schedules_keras"]

EVERY_SCHEDULE = [
    schedules.ExponentialDecay(0.1, 3.5, 0.9, staircase=True, name="e"),
    schedules.InverseTimeDecay(0.1, 3, 0.9, staircase=True),
    schedules.PolynomialDecay(0.1, 7, 0.01, 2.0, cycle=True),
    schedules.PiecewiseConstantDecay([1, 5], [0.3, 0.2, 0.1]),
    schedules.CosineDecay(0.0, 9, 0.1, warmup_target=0.3, warmup_steps=3),
    schedules.CosineDecayRestarts(0.1, 4, 1.5, 0.5, 0.01),
    schedules.LinearWarmup(schedules.ExponentialDecay(0.1, 10, 0.5), 4, 0.01),
    schedules.LinearWarmup(0.2, 4),
    schedules.NaturalExpDecay(0.1, 3.5, 0.9, staircase=True),
    schedules.LinearCosineDecay(0.1, 10, 1.5, 0.1, 0.01),
    schedules.NoisyLinearCosineDecay(0.1, 10, 0.01, 0.6, seed=3),
    schedules.LinearScaling(schedules.CosineDecay(0.1, 10), 4),
    schedules.gradual_warmup(schedules.LinearWarmup(schedules.PolynomialDecay(0.1, 9), 3), 8, 5),
]


@pytest.mark.parametrize("case", RECORDED, ids=[f"{i}-{case['name']}" for i, case in enumerate(RECORDED)])
def test_rates_equal_those_recorded_from_keras(case):
    assert case["error"] is None  # Keras recorded none
    schedule = getattr(schedules, case["name"])(**case["kwargs"])
    assert len(case["steps"]) > 30
    for step, expected in zip(case["steps"], case["values"], strict=True):
        # Keras computes in float32: the phase of a late cosine has an error of 2e-7.
        close = max(case["atol"], 2e-7 if "Cosine" in case["name"] else 0.0)
        assert schedule(step) == pytest.approx(expected, rel=case["rtol"], abs=close), step


def test_natural_exponential_decay_divides_by_e_in_each_period():
    schedule = schedules.NaturalExpDecay(0.1, 4, 0.5)
    assert schedule(0) == 0.1
    assert schedule(6) == pytest.approx(0.1 / math.e**0.75)
    stairs = schedules.NaturalExpDecay(0.1, 4, 0.5, staircase=True)
    assert [stairs(step) for step in (3, 4, 7.9)] == pytest.approx(
        [0.1, 0.1 / math.e**0.5, 0.1 / math.e**0.5]
    )


def test_linear_cosine_starts_above_the_rate_and_ends_at_beta():
    schedule = schedules.LinearCosineDecay(0.1, 10)
    assert schedule(0) == pytest.approx(0.1001)
    assert schedule(5) == pytest.approx(0.1 * (0.5 * 0.5 + 0.001))
    assert schedule(10) == schedule(1000) == pytest.approx(0.0001)
    more = schedules.LinearCosineDecay(0.1, 10, num_periods=2.0, alpha=0.5, beta=0.01)
    assert more(5) == pytest.approx(0.1 * ((0.5 + 0.5) * 1.0 + 0.01))


def test_noise_of_the_linear_cosine_has_the_variance_that_is_asked_for():
    steps = range(4000)
    # Without decay of the variance, on a line so long that it and the cosine are 1 everywhere.
    schedule = schedules.NoisyLinearCosineDecay(1.0, 1e14, 0.04, 0.0, num_periods=0.0, beta=0.0, seed=5)
    noise = [schedule(step) - 1.0 for step in steps]
    assert statistics.fmean(noise) == pytest.approx(0.0, abs=4 * 0.2 / 4000**0.5)
    assert statistics.pstdev(noise) == pytest.approx(0.2, rel=4 / 8000**0.5)
    decaying = schedules.NoisyLinearCosineDecay(1.0, 1e14, 0.04, 0.5, num_periods=0.0, beta=0.0, seed=5)
    for step in steps:
        ratio = (decaying(step) - 1.0) / noise[step]
        assert ratio == pytest.approx((1.0 + step) ** -0.25, rel=1e-3)


def test_noise_depends_on_seed_and_step_only():
    def rates(seed):
        schedule = schedules.NoisyLinearCosineDecay(0.1, 100, seed=seed)
        return [schedule(step) for step in range(50)]

    assert rates(1) == rates(1)
    assert len({*rates(1), *rates(2)}) == 100
    schedule = schedules.NoisyLinearCosineDecay(0.1, 100, initial_variance=0.0)
    plain = schedules.LinearCosineDecay(0.1, 100)
    assert [schedule(step) for step in (0, 7, 200, 2**33)] == [plain(step) for step in (0, 7, 200, 2**33)]


def test_polynomial_cycle_is_at_the_end_rate_on_each_multiple_and_jumps_after_it():
    schedule = schedules.PolynomialDecay(0.1, 10, 0.01, cycle=True)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(10) == pytest.approx(0.01)
    assert schedule(11) == pytest.approx(0.09 * 9 / 20 + 0.01)
    assert schedule(20) == pytest.approx(0.01)


def test_boundary_step_of_piecewise_constant_keeps_the_old_value():
    schedule = schedules.PiecewiseConstantDecay([5, 10], [1.0, 0.5, 0.25])
    assert [schedule(step) for step in (0, 5, 5.5, 6, 10, 11)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("t_mul", [1.0, 1.5, 2.0, 3.0, 7.0])
def test_cosine_restarts_reach_the_peak_exactly_at_every_restart(t_mul):
    schedule = schedules.CosineDecayRestarts(0.1, 8, t_mul=t_mul, m_mul=0.5)
    start, length = 0.0, 8.0
    for index in range(8):
        assert schedule(start) == pytest.approx(0.1 * 0.5**index, rel=1e-9)
        assert schedule(start + length / 2) == pytest.approx(0.05 * 0.5**index, rel=1e-9)
        start, length = start + length, length * t_mul


@pytest.mark.parametrize("global_batch", [*range(1, 300), 512, 1000, 4096])
def test_staircase_by_examples_seen_falls_at_the_first_step_that_has_seen_them(global_batch):
    examples = 50_000 * 350
    schedule = schedules.ExponentialDecay(
        0.1, schedules.decay_steps(50_000, 350, global_batch), 0.1, staircase=True
    )
    for times in range(1, 30):  # without care for rounding, the 7th of some batches is late
        boundary = -(-times * examples // global_batch)  # integer arithmetic, rounded up
        assert schedule(boundary - 1) == pytest.approx(10.0**-times)
        assert schedule(boundary) == pytest.approx(10.0 ** -(times + 1))


def test_decay_steps_of_the_tutorial_keeps_its_fraction():
    assert schedules.decay_steps(50_000, 350, 128) == 136718.75
    assert schedules.decay_steps(50_000, 350, 256) == 68359.375


def test_linear_warmup_meets_the_schedule_without_moving_it():
    inner = schedules.ExponentialDecay(0.8, 10, 0.5, staircase=True)
    schedule = schedules.LinearWarmup(inner, 4, initial_learning_rate=0.2)
    rates = [schedule(step) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
    assert [schedule(step) for step in (9, 10, 20)] == [inner(step) for step in (9, 10, 20)]


def test_gradual_warmup_goes_from_the_rate_of_one_rank_to_that_of_all():
    inner = schedules.ExponentialDecay(0.1, 10, 0.5, staircase=True)
    schedule = schedules.gradual_warmup(inner, ranks=8, warmup_steps=7)
    assert [schedule(step) for step in range(8)] == pytest.approx([0.1 * n for n in range(1, 9)])
    assert [schedule(step) for step in (9, 10, 25)] == pytest.approx([0.8, 0.4, 0.2])
    constant = schedules.gradual_warmup(0.1, ranks=2, warmup_steps=0)
    assert [constant(step) for step in (0, 5)] == [0.2, 0.2]


def test_a_schedule_of_ones_own_may_stand_inside_another():
    @dataclasses.dataclass(frozen=True)
    class Halving(schedules.LearningRateSchedule):
        first: float

        def __call__(self, step):
            return self.first / 2 ** float(step)

    outer = schedules.LinearWarmup(schedules.LinearScaling(Halving(0.5), 4), 2)
    saved = json.loads(json.dumps(schedules.serialize(outer)))
    assert schedules.deserialize(saved, {"Halving": Halving}) == outer
    with pytest.raises(ValueError, match="unknown schedule 'Halving'"):
        schedules.deserialize(saved)


def test_linear_scaling_rule():
    assert schedules.scale_learning_rate(0.1, 8192) == pytest.approx(3.2)
    assert schedules.scale_learning_rate(0.1, 64, reference_batch=128) == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=lambda s: type(s).__name__)
def test_a_schedule_survives_json(schedule):
    text = json.dumps(schedules.serialize(schedule))
    again = schedules.deserialize(json.loads(text))
    assert again == schedule
    assert [again(step) for step in range(30)] == [schedule(step) for step in range(30)]


def test_every_public_schedule_is_in_the_serialisation_test():
    public = {
        cls
        for cls in vars(schedules).values()
        if isinstance(cls, type) and issubclass(cls, schedules.LearningRateSchedule)
    }
    assert {type(schedule) for schedule in EVERY_SCHEDULE} == public - {schedules.LearningRateSchedule}


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=lambda s: type(s).__name__)
def test_rates_are_plain_floats_whatever_the_type_of_the_step(schedule):
    import numpy as np

    for step in (3, 3.0, np.int64(3), np.float32(3), np.array(3)):
        assert type(schedule(step)) is float
        assert schedule(step) == schedule(3)


def test_own_schedules_are_found_through_custom_objects():
    @dataclasses.dataclass(frozen=True)
    class Halving(schedules.LearningRateSchedule):
        first: float

        def __call__(self, step):
            return self.first / 2 ** float(step)

    saved = schedules.serialize(Halving(0.5))
    assert schedules.deserialize(saved, {"Halving": Halving})(2) == 0.125
    with pytest.raises(ValueError, match="unknown schedule 'Halving'"):
        schedules.deserialize(saved)


def test_a_class_without_config_says_so_when_saved():
    class Constant(schedules.LearningRateSchedule):
        def __call__(self, step):
            return 1.0

    with pytest.raises(TypeError, match="get_config"):
        schedules.serialize(Constant())


def test_a_serialised_schedule_with_other_keys_is_refused():
    with pytest.raises(ValueError, match="class_name"):
        schedules.deserialize({"name": "x"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.ExponentialDecay(-0.1, 10, 0.5), "initial_learning_rate .* -0.1"),
        (lambda: schedules.ExponentialDecay(math.nan, 10, 0.5), "initial_learning_rate"),
        (lambda: schedules.ExponentialDecay(0.1, 0, 0.5), "decay_steps .* above 0"),
        (lambda: schedules.ExponentialDecay(0.1, 10, -0.5), "decay_rate"),
        (lambda: schedules.InverseTimeDecay(0.1, 10, -0.5), "decay_rate"),
        (lambda: schedules.PolynomialDecay(0.1, 10, -1.0), "end_learning_rate"),
        (lambda: schedules.PolynomialDecay(0.1, 10, power=0), "power"),
        (lambda: schedules.PiecewiseConstantDecay([1, 2], [1.0, 2.0]), "2 values and 2 bound"),
        (lambda: schedules.PiecewiseConstantDecay([2, 2], [1.0, 2.0, 3.0]), "increase"),
        (lambda: schedules.PiecewiseConstantDecay([2], [1.0, -2.0]), "values"),
        (lambda: schedules.CosineDecay(0.1, math.inf), "decay_steps"),
        (lambda: schedules.CosineDecay(0.1, 10, warmup_target=-1.0), "warmup_target"),
        (lambda: schedules.CosineDecayRestarts(0.1, 10, t_mul=0.5), "t_mul"),
        (lambda: schedules.PiecewiseConstantDecay([], [1.0, 2.0]), "2 values and 0 bound"),
        (lambda: schedules.NaturalExpDecay(0.1, 0, 1.0), "decay_steps"),
        (lambda: schedules.LinearCosineDecay(0.1, 0), "decay_steps"),
        (lambda: schedules.LinearCosineDecay(0.1, 10, num_periods=-1), "num_periods"),
        (lambda: schedules.NoisyLinearCosineDecay(0.1, 10, initial_variance=-1), "initial_variance"),
        (lambda: schedules.NoisyLinearCosineDecay(0.1, 10, variance_decay=-1), "variance_decay"),
        (lambda: schedules.NoisyLinearCosineDecay(0.1, 10, seed=-1), "seed"),
        (lambda: schedules.LinearScaling(0.1, 0), "factor"),
        (lambda: schedules.LinearScaling(-0.1, 2), "schedule"),
        (lambda: schedules.gradual_warmup(-0.1, 8, 10), "schedule .* -0.1"),
        (lambda: schedules.gradual_warmup(0.1, 0, 10), "factor"),
        (lambda: schedules.LinearWarmup(-0.1, 10), "schedule"),
        (lambda: schedules.LinearWarmup(0.1, -1), "warmup_steps"),
        (lambda: schedules.decay_steps(50_000, 350, 0), "global_batch"),
        (lambda: schedules.scale_learning_rate(0.1, 0), "global_batch"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_boundaries_are_an_index_error_as_in_tensorflow():
    with pytest.raises(IndexError, match="boundaries must not be empty"):
        schedules.PiecewiseConstantDecay([], [1.0])


def test_a_rate_that_grows_beyond_all_numbers_is_infinite():
    # TensorFlow 2.15.1 gives inf from 1e38 on, where its float32 ends.
    for base in (2.0, 2):
        assert schedules.ExponentialDecay(0.5, 1, base, staircase=True)(1024) == math.inf
        assert schedules.ExponentialDecay(0.5, 1, base)(1000) == 2.0**999
