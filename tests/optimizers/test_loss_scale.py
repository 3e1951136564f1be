"""LossScaleOptimizer: Keras' rules for the scale, on one rank and on several."""

import json

import ml_dtypes
import numpy as np
import pytest

from distopt import ops, schedules
from distopt.aggregators import AllReduce
from distopt.optimizers import SGD, Adam, LossScaleOptimizer, optimize_loss, tf1
from distopt.optimizers.loss_scale import all_finite
from distopt.scopes import Graph, get_or_create_global_step
from distopt.tape import GradientTape
from distopt.testing import world
from distopt.transforms import adaptive_clipping_fn
from distopt.variables import Arena, IndexedSlices, Variable

_INF, _NAN = np.float32(np.inf), np.float32(np.nan)


def _make(**settings):
    return LossScaleOptimizer(SGD(0.5), initial_scale=8.0, dynamic_growth_steps=3, **settings)


def test_defaults_are_those_of_keras():
    optimizer = LossScaleOptimizer(SGD())
    assert optimizer.dynamic is True
    assert optimizer.loss_scale == optimizer.initial_scale == 32768.0
    assert optimizer.dynamic_growth_steps == 2000
    assert int(optimizer.dynamic_counter.value) == 0


def test_the_scale_doubles_after_finite_steps_and_halves_at_an_overflow():
    variable, optimizer = Variable(0.0), _make()
    scales, counters = [], []
    for gradient in (1.0, 1.0, 1.0, 1.0, _INF, 1.0, _NAN, -_INF, 1.0):
        optimizer.apply_gradients([(np.float32(gradient), variable)])
        scales.append(optimizer.loss_scale)
        counters.append(int(optimizer.dynamic_counter.value))
    assert scales == [8, 8, 16, 16, 8, 8, 4, 2, 2]
    assert counters == [1, 2, 0, 1, 0, 1, 0, 0, 1]
    assert optimizer.iterations == 6  # steps left out don't count
    assert float(variable) == -0.5 * 6


def test_the_scale_does_not_fall_below_one():
    variable, optimizer = Variable(0.0), LossScaleOptimizer(SGD(), initial_scale=1.5)
    for _ in range(3):
        optimizer.apply_gradients([(_INF, variable)])
    assert optimizer.loss_scale == 1.0


def test_the_scale_does_not_grow_beyond_its_type():
    optimizer = LossScaleOptimizer(SGD(), initial_scale=2.0**127, dynamic_growth_steps=1)
    optimizer.apply_gradients([(np.float32(1.0), Variable(0.0))])
    assert optimizer.loss_scale == 2.0**127
    assert int(optimizer.dynamic_counter.value) == 0


def test_a_fixed_scale_never_changes_and_applies_what_comes():
    variable = Variable(0.0)
    optimizer = LossScaleOptimizer(SGD(0.5), dynamic=False, initial_scale=128.0)
    optimizer.apply_gradients([(np.float32(1.0), variable)])
    optimizer.apply_gradients([(_INF, variable)])
    assert (optimizer.loss_scale, optimizer.iterations) == (128.0, 2)
    assert optimizer.dynamic_counter is None
    assert optimizer.dynamic_growth_steps is None
    assert float(variable) == -np.inf


@pytest.mark.parametrize("arena", [False, True])
def test_minimize_scales_the_loss_and_unscales_the_gradients(arena):
    variable = Variable(np.array([3.0, 4.0], "f4"))
    if arena:
        Arena([variable])

    def loss():
        return ops.l2_loss(variable)

    in_place = []
    optimizer = _make()
    optimizer.gradient_transformers = [
        lambda pairs: in_place.append(pairs[0][0] is variable.gradient) or pairs
    ]
    optimizer.minimize(loss, [variable])
    assert in_place == [arena]
    np.testing.assert_array_equal(variable.numpy(), [1.5, 2.0])
    (pair,) = optimizer.compute_gradients(loss, [variable])
    np.testing.assert_array_equal(pair[0], [1.5, 2.0])


def test_what_is_differentiated_is_the_scaled_loss(monkeypatch):
    variable, factor = Variable(np.float16(1.0)), np.float16(2.0**-13)

    def loss():  # its derivative, 2 ** -26, is below float16's smallest number, 2 ** -24
        return variable * factor * factor

    assert float(SGD().compute_gradients(loss, [variable])[0][0]) == 0.0
    optimizer = LossScaleOptimizer(SGD(), initial_scale=2.0**10)
    monkeypatch.setattr(LossScaleOptimizer, "get_unscaled_gradients", lambda self, grads: list(grads))
    assert float(optimizer.compute_gradients(loss, [variable])[0][0]) == 2.0**-16


def test_around_a_tape_loss_and_gradients_are_scaled_by_hand():
    variable, optimizer = Variable(3.0), _make()
    with GradientTape() as tape:
        loss = optimizer.get_scaled_loss(variable * variable)
    assert float(loss) == 72.0
    scaled = tape.gradient(loss, [variable])
    assert float(scaled[0]) == 48.0
    gradients = optimizer.get_unscaled_gradients([*scaled, None])
    assert (float(gradients[0]), gradients[1]) == (6.0, None)
    optimizer.apply_gradients(zip(gradients[:1], [variable], strict=True))
    assert float(variable) == 0.0
    assert float(optimizer.get_scaled_loss(lambda: variable + 1.0)()) == 8.0


def test_a_recorded_loss_is_scaled_too():
    variable, optimizer = Variable(3.0), _make()
    with GradientTape() as tape:
        loss = variable * variable
    optimizer.minimize(loss, [variable], tape=tape)
    assert float(variable) == 0.0


def test_sparse_gradients_are_unscaled_and_checked():
    table = Variable(np.ones((3, 2), "f4"))
    optimizer = _make()
    optimizer.minimize(lambda: ops.reduce_sum(ops.gather(table, indices=np.array([1, 1]))), [table])
    np.testing.assert_array_equal(table.numpy(), [[1, 1], [0, 0], [1, 1]])
    rows = np.array([[1.0, np.inf]], "f4")
    optimizer.apply_gradients([(IndexedSlices(rows, np.array([0]), (3, 2)), table)])
    np.testing.assert_array_equal(table.numpy(), [[1, 1], [0, 0], [1, 1]])
    assert (optimizer.loss_scale, optimizer.iterations) == (4.0, 1)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan, None])
def test_all_finite_sees_one_wrong_element(dtype, wrong):
    values = np.full(1000, np.finfo(dtype).max, dtype)  # finite, however large
    if wrong is not None:
        values[[3, 500]] = wrong, -wrong  # inf - inf is still not finite
    assert all_finite([(None, None), (np.ones(2), None), (values, None)]) is (wrong is None)


def test_gradients_may_be_numbers_and_bfloat16():
    variable, optimizer = Variable(0.0), _make()
    narrow = np.full(2, 8.0, ml_dtypes.bfloat16)
    first, second = optimizer.get_unscaled_gradients([16.0, narrow])
    assert (second.dtype, second.astype("f4").tolist()) == (ml_dtypes.bfloat16, [1.0, 1.0])
    optimizer.apply_gradients([(first, variable)])
    assert float(variable) == -1.0
    optimizer.apply_gradients([(float("nan"), variable)])
    assert (optimizer.loss_scale, optimizer.iterations) == (4.0, 1)
    assert all_finite([(narrow, None)])
    assert not all_finite([(narrow * np.inf, None)])


def test_a_scale_beyond_float16_falls_until_it_fits():
    variable = Variable(np.float16(1.0))
    optimizer = LossScaleOptimizer(SGD(0.5), initial_scale=2.0**18)
    with np.errstate(invalid="ignore"):
        for _ in range(4):
            optimizer.minimize(lambda: variable * np.float16(0.5), [variable])
    assert (optimizer.loss_scale, optimizer.iterations) == (2.0**15, 1)
    assert float(variable) == 0.75


def test_an_overflow_leaves_slots_and_variables_alone():
    first, second = Variable(1.0, name="a"), Variable(1.0, name="b")
    optimizer = LossScaleOptimizer(Adam(0.1))
    one = np.float32(1.0)
    optimizer.apply_gradients([(one, first), (one, second)])
    before = optimizer.inner_optimizer.get_weights()
    optimizer.apply_gradients([(one, first), (_NAN, second)])
    for old, new in zip(before, optimizer.inner_optimizer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_step_left_out_says_nothing_about_the_next():
    variable, optimizer = Variable(0.0), _make()
    optimizer.apply_gradients([(_INF, variable)])
    optimizer.apply([(np.float32(1.0), variable)])
    assert float(variable) == -0.5


def test_clips_see_unscaled_gradients_and_no_overflow():
    variable = Variable(0.0)
    seen = []
    inner = SGD(1.0, clipvalue=2.0, gradient_transformers=[lambda pairs: seen.extend(pairs) or pairs])
    optimizer = LossScaleOptimizer(inner, initial_scale=1024.0)
    optimizer.minimize(lambda: variable * 3.0, [variable])
    optimizer.apply_gradients([(_INF, variable)])
    assert [float(gradient) for gradient, _ in seen] == [2.0]
    assert float(variable) == -2.0


# The inner optimizer.


def test_hyperparameters_are_the_inner_optimizers():
    inner = SGD(0.1, momentum=0.9, nesterov=True, clipnorm=1.0)
    optimizer = LossScaleOptimizer(inner)
    assert (optimizer.learning_rate, optimizer.lr, optimizer.momentum) == (0.1, 0.1, 0.9)
    assert (optimizer.nesterov, optimizer.clipnorm) == (True, 1.0)
    optimizer.learning_rate = 0.5
    optimizer.momentum = 0.8
    optimizer.clipnorm = 2.0
    assert (inner.learning_rate, inner.momentum, inner.clipnorm) == (0.5, 0.8, 2.0)
    assert optimizer.hyperparameter("learning_rate") == 0.5
    with pytest.raises(AttributeError, match="no attribute or hyperparameter 'beta_1'"):
        _ = optimizer.beta_1
    inner.gradient_aggregator = list
    assert optimizer.gradient_aggregator is list


def test_slots_and_weights_are_the_inner_optimizers_after_scale_and_counter():
    variable = Variable(1.0, name="w")
    optimizer = LossScaleOptimizer(SGD(0.1, momentum=0.9))
    optimizer.apply_gradients([(np.float32(2.0), variable)])
    assert optimizer.get_slot_names() == ["momentum"]
    assert float(optimizer.get_slot(variable, "momentum")) == pytest.approx(-0.2)
    assert [w.name for w in optimizer.weights] == [
        "current_loss_scale",
        "good_steps",
        "SGD/iter",
        "SGD/w/momentum",
    ]
    assert [float(w) for w in optimizer.get_weights()] == pytest.approx([32768, 1, 1, -0.2])
    optimizer.set_weights([64.0, 5, 7, 0.5])
    assert (optimizer.loss_scale, int(optimizer.dynamic_counter.value), optimizer.iterations) == (64, 5, 7)


def test_state_round_trips():
    def make():
        variable = Variable(1.0, name="w")
        return variable, LossScaleOptimizer(SGD(0.1, momentum=0.9), initial_scale=4.0, dynamic_growth_steps=2)

    variable, optimizer = make()
    for gradient in (1.0, _INF, 1.0):
        optimizer.apply_gradients([(np.float32(gradient), variable)])
    restored, other = make()
    restored.assign(variable.numpy())
    other.load_state(optimizer.state(), [restored])
    for trained, using in ((variable, optimizer), (restored, other)):
        using.apply_gradients([(np.float32(1.0), trained)])
    assert float(restored) == float(variable)
    assert (other.loss_scale, other.iterations) == (optimizer.loss_scale, 3) == (4.0, 3)
    with pytest.raises(ValueError, match="no 'current_loss_scale'"):
        make()[1].load_state(SGD().state(), [])


def test_config_round_trips_schedules_included():
    inner = Adam(schedules.ExponentialDecay(0.1, 10, 0.5), beta_1=0.8)
    optimizer = LossScaleOptimizer(inner, initial_scale=64.0, dynamic_growth_steps=7)
    config = json.loads(json.dumps(optimizer.get_config()))
    made = LossScaleOptimizer.from_config(config)
    assert (made.initial_scale, made.dynamic_growth_steps, made.dynamic) == (64.0, 7, True)
    assert type(made.inner_optimizer) is Adam
    assert made.beta_1 == 0.8
    assert made.learning_rate == inner.learning_rate
    assert made.get_config() == optimizer.get_config()


def test_config_of_a_fixed_scale_and_of_an_own_optimizer():
    class Mine(SGD):
        pass

    optimizer = LossScaleOptimizer(Mine(0.2), dynamic=False, initial_scale=2.0)
    with pytest.raises(ValueError, match="Unknown optimizer: Mine"):
        LossScaleOptimizer.from_config(optimizer.get_config())
    made = LossScaleOptimizer.from_config(optimizer.get_config(), {"Mine": Mine})
    assert type(made.inner_optimizer) is Mine
    assert (made.dynamic, made.loss_scale) == (False, 2.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inner_optimizer": 3}, TypeError, '"inner_optimizer" must be an instance'),
        (
            {"inner_optimizer": tf1.GradientDescentOptimizer(0.1)},
            TypeError,
            '"inner_optimizer" must be an instance',
        ),
        (
            {"inner_optimizer": LossScaleOptimizer(SGD())},
            TypeError,
            "cannot wrap another LossScaleOptimizer",
        ),
        ({"dynamic": 1}, TypeError, '"dynamic" argument .* must be a bool, but got: 1'),
        ({"dynamic": False}, ValueError, '"initial_scale" must be specified if "dynamic" is False'),
        (
            {"dynamic": False, "initial_scale": 2.0, "dynamic_growth_steps": 3},
            ValueError,
            '"dynamic_growth_steps" must be None if "dynamic" is False, but got: 3',
        ),
        ({"initial_scale": 0.0}, ValueError, '"initial_scale" must be a positive number'),
        ({"initial_scale": float("inf")}, ValueError, '"initial_scale" must be a positive number'),
        ({"dynamic_growth_steps": 0}, ValueError, '"dynamic_growth_steps" must be 1 or more'),
    ],
)
def test_arguments_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        LossScaleOptimizer(**{"inner_optimizer": SGD(), **arguments})


def test_no_gradients_are_an_error_as_without_a_scale():
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        _make().apply_gradients([(None, Variable(1.0))])


# Several ranks.


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(reduction, arena):
    def train(ranks):
        variable = Variable(np.zeros(3, "f4"), name="w")
        if arena:
            Arena([variable])
        inner = SGD(1.0, gradient_aggregator=AllReduce(ranks, reduction))
        optimizer = LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=2)
        history = []
        for bad in (None, 1, None, None):
            factor = np.ones(3, "f4")
            if ranks.rank == bad:
                factor[1] = np.inf
            optimizer.minimize(lambda f=factor: ops.reduce_sum(variable * f), [variable], examples=2)
            history.append((optimizer.loss_scale, int(optimizer.iterations)))
        return history, variable.numpy().tolist()

    moved = -9.0 if reduction == "sum" else -1.5  # three steps of 3, or of 3 / 6
    expected = [(8.0, 1), (4.0, 1), (4.0, 2), (8.0, 3)], [moved] * 3
    assert world(3, train) == [expected] * 3


def test_infinities_of_opposite_sign_are_still_seen():
    def train(ranks):
        variable = Variable(0.0, name="w")
        inner = SGD(1.0, gradient_aggregator=AllReduce(ranks, "sum"))
        optimizer = LossScaleOptimizer(inner, initial_scale=8.0)
        with np.errstate(invalid="ignore"):  # of the sum
            optimizer.apply_gradients([(_INF if ranks.rank else -_INF, variable)])
        return optimizer.loss_scale, float(variable)

    assert world(2, train) == [(4.0, 0.0)] * 2


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_overflow_in_rows_of_one_rank_skips_the_step_on_all(reduction):
    def train(ranks):
        table = Variable(np.zeros((4, 1), "f4"), name="table")
        inner = SGD(1.0, gradient_aggregator=AllReduce(ranks, reduction))
        optimizer = LossScaleOptimizer(inner, initial_scale=8.0)
        for bad in (2, None):
            value = np.inf if ranks.rank == bad else 1.0
            rows = IndexedSlices(np.array([[value]], "f4"), np.array([ranks.rank]), (4, 1))
            optimizer.apply_gradients([(rows, table)], examples=1)
        return optimizer.loss_scale, int(optimizer.iterations), table.numpy().ravel().tolist()

    step = -1.0 if reduction == "sum" else -1.0 / 3
    expected = (4.0, 1, pytest.approx([step, step, step, 0.0]))
    assert world(3, train) == [expected] * 3


def test_optimize_loss_with_a_loss_scale_counts_no_skipped_step_and_spares_the_clips_averages():
    def train(ranks):
        with Graph().as_default():
            variable, step = Variable(0.0, name="w"), get_or_create_global_step()
            clip = adaptive_clipping_fn(global_step=step)
            optimizer = LossScaleOptimizer(SGD(1.0), initial_scale=8.0)
            train_op = optimize_loss(
                lambda x: variable * x,
                step,
                None,
                optimizer,
                clip_gradients=clip,
                gradient_aggregator=AllReduce(ranks, "sum"),
            )
            steps = []
            for bad in (None, 0, None):
                train_op(np.float32(np.inf if ranks.rank == bad else 1.0))
                steps.append((int(step.value), optimizer.loss_scale))
            return steps, float(variable), bool(np.isfinite(clip.mean.numpy()))

    expected = [(1, 8.0), (1, 4.0), (2, 4.0)], -6.0, True
    with np.errstate(invalid="ignore"):
        assert world(3, train) == [expected] * 3
