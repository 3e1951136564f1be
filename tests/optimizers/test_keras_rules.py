"""The rules of Keras' optimizers, by numbers that can be worked out by hand."""

import inspect

import numpy as np
import pytest

from distopt import optimizers
from distopt.optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, Ftrl, Nadam, RMSprop, tf1
from distopt.schedules import ExponentialDecay
from distopt.variables import Variable


def after(optimizer, *gradients, start=1.0):
    """Return a float64 variable after updates by these gradients."""
    w = Variable(np.array(start, np.float64), name="w")
    for gradient in gradients:
        optimizer.apply_gradients([(np.array(gradient, np.float64), w)])
    return w


def slot(optimizer, w, name):
    return float(optimizer.get_slot(w, name))


def test_adagrad_adds_epsilon_outside_the_root():
    # A = 0 + 9: 1 - 0.5 * 3 / (3 + 1) = 0.625; inside the root it would be 1 - 1.5 / sqrt(10).
    optimizer = Adagrad(0.5, initial_accumulator_value=0.0, epsilon=1.0)
    w = after(optimizer, 3.0)
    assert float(w) == 0.625
    assert slot(optimizer, w, "accumulator") == 9.0
    # A = 0.75 + 0.25 + 8: the initial value counts.
    assert float(after(Adagrad(1.0, 0.75, 1.0), 0.5)) == 1.0 - 0.5 / (1.0 + 1.0)


def test_adadelta_has_epsilon_in_both_roots_and_the_old_steps_above():
    # rho 0.75, epsilon 3, g 2: A = 1, d = sqrt(0 + 3) / sqrt(1 + 3) * 2 = sqrt(3); U = 0.25 * 3.
    optimizer = Adadelta(0.5, rho=0.75, epsilon=3.0)
    w = after(optimizer, 2.0)
    assert float(w) == pytest.approx(1.0 - 0.5 * 3**0.5, rel=1e-15)
    assert slot(optimizer, w, "accum_grad") == 1.0
    assert slot(optimizer, w, "accum_var") == pytest.approx(0.75, rel=1e-15)  # without the learning rate
    # Then A = 0.75 * 1 + 0.25 * 4 = 1.75, d = sqrt(0.75 + 3) / sqrt(1.75 + 3) * 2.
    optimizer.apply_gradients([(2.0, w)])
    d = (3.75 / 4.75) ** 0.5 * 2
    assert float(w) == pytest.approx(1.0 - 0.5 * 3**0.5 - 0.5 * d, rel=1e-14)
    assert slot(optimizer, w, "accum_var") == pytest.approx(0.75 * 0.75 + 0.25 * d * d, rel=1e-14)


def test_adam_adds_epsilon_to_the_root_that_is_not_corrected():
    # b1 = 0.5, b2 = 0.75, g = 2: m = 1, v = 1, rate = lr sqrt(0.25) / 0.5 = lr: 1 - 0.5 * 1 / (1 + 1).
    assert float(after(Adam(0.5, 0.5, 0.75, epsilon=1.0), 2.0)) == 0.75


def test_amsgrad_divides_by_the_largest_v_that_is_not_corrected():
    # b1 = 0, b2 = 0.75: v = 4 then 3: vhat stays 4 while the rate is corrected with 1 - 0.75^2.
    optimizer = Adam(0.5, 0.0, 0.75, epsilon=2.0, amsgrad=True)
    w = after(optimizer, 4.0, 0.0, start=0.0)
    assert (slot(optimizer, w, "v"), slot(optimizer, w, "vhat")) == (3.0, 4.0)
    assert float(w) == pytest.approx(-0.5 * 0.5 * 4 / (2 + 2), rel=1e-15)
    optimizer.apply_gradients([(1.0, w)])
    v = 0.75 * 3 + 0.25
    step = 0.5 * (1 - 0.75**3) ** 0.5 * 1 / (2 + 2)
    assert slot(optimizer, w, "v") == v
    assert float(w) == pytest.approx(-0.25 - step, rel=1e-15)


def test_adamax_divides_by_the_decayed_largest_gradient():
    # b1 = 0.5, b2 = 0.5: m = 2, u = 4: 1 - lr / 0.5 * 2 / (4 + 4) = 1 - 0.5 lr.
    optimizer = Adamax(0.5, 0.5, 0.5, epsilon=4.0)
    w = after(optimizer, -4.0)
    assert float(w) == 1.0 + 0.25
    # m = -1 + 0.5, u = max(2, 1) = 2: w += lr / 0.75 * 0.5 / (2 + 4).
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == pytest.approx(1.25 + 0.5 / 0.75 * 0.5 / 6.0, rel=1e-15)
    assert slot(optimizer, w, "v") == 2.0


@pytest.mark.parametrize(
    ("options", "s"), [({}, 0.004), ({"schedule_decay": 0.5}, 0.5), ({"decay": 0.5}, 0.5)]
)
def test_nadam_has_a_schedule_for_its_momentum_that_decay_means(options, s):
    optimizer = Nadam(0.5, 0.5, 0.75, epsilon=1.0, **options)
    w = Variable(np.array(1.0), name="w")
    m = v = 0.0
    value, product = 1.0, 1.0
    for t, g in enumerate((2.0, -1.0, 0.5), 1):
        now, ahead = (0.5 * (1 - 0.5 * 0.96 ** (s * i)) for i in (t, t + 1))
        product *= now
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
        mean = (1 - now) * g / (1 - product) + ahead * m / (1 - product * ahead)
        value -= 0.5 * mean / ((v / (1 - 0.75**t)) ** 0.5 + 1.0)
        optimizer.apply_gradients([(g, w)])
        assert float(w) == pytest.approx(value, rel=1e-14)
        assert float(optimizer.weights[1]) == pytest.approx(product, rel=1e-14)
    assert optimizer.get_config()["decay"] == s
    assert optimizer.learning_rate == 0.5


def test_nadams_second_weight_is_the_product_in_the_first_variables_dtype():
    optimizer = Nadam()
    a, b = Variable(np.zeros(2, np.float32), name="a"), Variable(np.zeros(3, np.float64), name="b")
    optimizer.apply_gradients([(np.ones(2), a), (np.ones(3), b)])
    names = [weight.name for weight in optimizer.weights]
    assert names[:2] == ["Nadam/iter", "Nadam/momentum_cache"]
    assert names[2:] == ["Nadam/a/m", "Nadam/b/m", "Nadam/a/v", "Nadam/b/v"]
    assert optimizer.weights[1].dtype == np.float32
    assert optimizer.weights[1].shape == ()


def test_nadam_refuses_schedules_also_later():
    with pytest.raises(ValueError, match=r"^The Nadam optimizer does not support LearningRateSchedules"):
        Nadam(ExponentialDecay(0.1, 10, 0.5))
    optimizer = Nadam()
    with pytest.raises(ValueError, match="does not support LearningRateSchedules"):
        optimizer.learning_rate = ExponentialDecay(0.1, 10, 0.5)
    assert optimizer.learning_rate == 0.001


def test_rmsprop_has_epsilon_outside_the_root_without_momentum_and_inside_with_it():
    # rho 0.75, g 2: r = 0 + 0.25 * 4 = 1.
    plain = RMSprop(0.5, rho=0.75, epsilon=3.0)
    w = after(plain, 2.0)
    assert float(w) == 1.0 - 0.5 * 2 / (1 + 3)
    assert slot(plain, w, "rms") == 1.0
    assert plain.get_slot_names() == ["rms"]
    moving = RMSprop(0.5, rho=0.75, momentum=0.5, epsilon=3.0)
    w = after(moving, 2.0)
    assert float(w) == 1.0 - 0.5 * 2 / (1 + 3) ** 0.5
    # r = 0.75, a = 0.5 * 0.5 + 0: the velocity holds steps.
    moving.apply_gradients([(0.0, w)])
    assert float(w) == 0.5 - 0.25
    assert slot(moving, w, "momentum") == 0.25


def test_centered_rmsprop_divides_by_the_standard_deviation():
    # rho 0.75, g 4: r = 4, c = 1, r - c^2 = 3.
    assert float(after(RMSprop(0.5, 0.75, epsilon=1.0, centered=True), 4.0)) == pytest.approx(
        1.0 - 0.5 * 4 / (3**0.5 + 1.0), rel=1e-15
    )
    inside = RMSprop(0.5, 0.75, momentum=0.5, epsilon=1.0, centered=True)
    w = after(inside, 4.0)
    assert float(w) == 1.0 - 0.5 * 4 / 2.0
    assert slot(inside, w, "mg") == 1.0


def test_rmsprops_slots_are_settled_when_it_is_made():
    optimizer = RMSprop(0.5, 0.75, epsilon=3.0)
    w = after(optimizer, 2.0)
    optimizer.momentum = 0.9
    optimizer.centered = False
    optimizer.apply_gradients([(0.0, w)])
    assert float(w) == 0.75  # nothing coasts
    assert optimizer.get_slot_names() == ["rms"]
    assert RMSprop(momentum=lambda: 0.0)._used_slots() == ["rms", "momentum"]


def test_ftrl_follows_its_recurrence():
    # lr 0.5, n 0 -> 4: z = 2 + 2 * 0.25 * 3 - (2 - 0) / 0.5 * 3 = -8.5; w = (8.5 - 1) / (2 / 0.5 + 2 * 0.5).
    options = {
        "l1_regularization_strength": 1.0,
        "l2_regularization_strength": 0.5,
        "l2_shrinkage_regularization_strength": 0.25,
    }
    optimizer = Ftrl(0.5, initial_accumulator_value=0.0, **options)
    w = after(optimizer, 2.0, start=3.0)
    assert slot(optimizer, w, "linear") == -8.5
    assert slot(optimizer, w, "accumulator") == 4.0  # shrinkage does not enter n
    assert float(w) == 1.5
    # beta 1: l2 + 1 / (2 * 0.5) = 1.5 in its place, so the denominator is 7 instead of 5.
    assert float(after(Ftrl(0.5, initial_accumulator_value=0.0, beta=1.0, **options), 2.0, start=3.0)) == (
        pytest.approx(7.5 / 7, rel=1e-15)
    )


def test_ftrl_gives_exact_zeros_up_to_l1():
    # n 0 -> 1, z = 1 - 1 / 1 * 0.5 = 0.5 exactly l1.
    assert float(after(Ftrl(1.0, -0.5, 0.0, l1_regularization_strength=0.5), 1.0, start=0.5)) == 0.0
    w = after(Ftrl(1.0, -0.5, 0.0, l1_regularization_strength=0.25), 1.0, start=0.5)
    assert float(w) == 0.25 - 0.5


@pytest.mark.parametrize("accumulator", [0.0, 0.1])
def test_a_first_gradient_of_zero_makes_ftrls_variable_zero(accumulator):
    assert float(after(Ftrl(0.5, initial_accumulator_value=accumulator), 0.0)) == 0.0


def test_ftrl_with_power_0_is_gradient_descent_from_zero():
    w = after(Ftrl(0.5, learning_rate_power=0.0), 2.0, -1.0, 0.5, start=7.0)
    assert float(w) == 0.0 - 0.5 * (2.0 - 1.0 + 0.5)


def test_ftrl_with_any_power_follows_its_recurrence_and_the_power_can_be_set():
    optimizer = Ftrl(0.5, -0.25, 1.0)
    w = after(optimizer, 15.0**0.5, start=1.0)  # n 1 -> 16, n^0.25 1 -> 2
    z = 15.0**0.5 - (2 - 1) / 0.5
    assert float(w) == pytest.approx(-z / (2 / 0.5), rel=1e-14)
    optimizer.learning_rate_power = -0.5
    optimizer.apply_gradients([(0.0, w)])  # z stays, n^0.5 = 4
    assert float(w) == pytest.approx(-z / (4 / 0.5), rel=1e-14)


@pytest.mark.parametrize("cls", [Ftrl, tf1.FtrlOptimizer])
def test_the_usual_power_takes_roots_which_are_exact(cls):
    for power in (-0.5, -0.3):
        optimizer = cls(0.5, learning_rate_power=power)
        assert optimizer.rule.formula(**optimizer.options()).exact == (power == -0.5)


def test_nan_gives_nan_in_ftrl_and_not_zero():
    assert np.isnan(float(after(Ftrl(0.5), float("nan"))))


@pytest.mark.parametrize("cls", [Adagrad, Adadelta, Adam, Adamax, Nadam, RMSprop])
@pytest.mark.parametrize("epsilon", [0, 0.0, None])
def test_epsilon_0_and_none_become_1e_7(cls, epsilon):
    assert cls(epsilon=epsilon).epsilon == 1e-7
    assert cls(epsilon=epsilon).get_config()["epsilon"] == 1e-7


SIGNATURES = {
    SGD: {"learning_rate": 0.01, "momentum": 0.0, "nesterov": False},
    Adagrad: {"learning_rate": 0.001, "initial_accumulator_value": 0.1, "epsilon": 1e-7},
    Adadelta: {"learning_rate": 0.001, "rho": 0.95, "epsilon": 1e-7},
    Adam: {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7, "amsgrad": False},
    Adamax: {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7},
    Nadam: {"learning_rate": 0.001, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7},
    RMSprop: {"learning_rate": 0.001, "rho": 0.9, "momentum": 0.0, "epsilon": 1e-7, "centered": False},
    Ftrl: {
        "learning_rate": 0.001,
        "learning_rate_power": -0.5,
        "initial_accumulator_value": 0.1,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "name": "Ftrl",
        "l2_shrinkage_regularization_strength": 0.0,
        "beta": 0.0,
    },
}


@pytest.mark.parametrize("cls", SIGNATURES, ids=lambda cls: cls.__name__)
def test_arguments_have_keras_order_and_defaults_and_are_the_configuration(cls):
    expected = {"name": cls.__name__} if "name" not in SIGNATURES[cls] else {}
    expected = {**SIGNATURES[cls], **expected}
    parameters = inspect.signature(cls).parameters
    assert {k: p.default for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD} == expected
    assert [k for k in parameters if k != "kwargs"] == list(expected)
    assert cls().get_config() == {**expected, "decay": 0.004 if cls is Nadam else 0.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Adagrad(initial_accumulator_value=-0.1),
            "initial_accumulator_value must be non-negative: -0.1",
        ),
        (lambda: Adagrad(epsilon=-1.0), "epsilon must not be negative"),
        (lambda: Adadelta(rho=1.0), r"rho must be in \[0, 1\), got 1.0"),
        (lambda: Adamax(beta_2=-0.1), r"beta_2 must be in \[0, 1\)"),
        (lambda: Nadam(beta_1=1.5), r"beta_1 must be in \[0, 1\)"),
        (lambda: Nadam(schedule_decay=-1.0), "decay"),
        (lambda: RMSprop(momentum=1.5), r"`momentum` must be between \[0, 1\]"),
        (lambda: RMSprop(momentum=-0.5), r"`momentum` must be between \[0, 1\]"),
        (lambda: RMSprop(rho=2.0), r"rho must be in \[0, 1\)"),
        (lambda: Ftrl(learning_rate_power=0.5), "learning_rate_power 0.500000 needs to be negative or zero"),
        (lambda: Ftrl(initial_accumulator_value=-1.0), "initial_accumulator_value .* to be positive or zero"),
        (lambda: Ftrl(l1_regularization_strength=-1.0), "l1_regularization_strength .* positive or zero"),
        (lambda: Ftrl(l2_regularization_strength=-1.0), "l2_regularization_strength .* positive or zero"),
        (lambda: Ftrl(l2_shrinkage_regularization_strength=-1.0), "l2_shrinkage_regularization_strength -1"),
        (lambda: Ftrl(beta=-1.0), "beta -1.000000 needs to be positive or zero"),
        (lambda: Ftrl(0.0), "^lr is not a positive scalar"),
        (lambda: Adagrad(-0.1), "learning_rate must not be negative"),
        (lambda: Adagrad(clipnorm=-1.0), "Expected clipnorm >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cls", [Adagrad, Adadelta, Adamax, Nadam, RMSprop, Ftrl])
def test_unknown_arguments_are_refused_and_lr_is_the_learning_rate(cls):
    with pytest.raises(TypeError, match="Unexpected keyword argument passed to optimizer: rate"):
        cls(rate=1.0)
    with pytest.warns(UserWarning, match="`lr` argument is deprecated"):
        assert cls(lr=0.25).learning_rate == 0.25
    optimizer = cls()
    optimizer.lr = 0.5
    assert optimizer.learning_rate == 0.5


@pytest.mark.parametrize("cls", [Adagrad, Adadelta, Adamax, RMSprop, Ftrl])
def test_decay_divides_the_rate_by_the_count_of_updates(cls):
    decayed, by_hand = cls(0.5, decay=0.25), cls(0.5)
    a, b = Variable(np.ones(3), name="a"), Variable(np.ones(3), name="b")
    for step in range(3):
        by_hand.learning_rate = 0.5 / (1 + 0.25 * step)
        decayed.apply_gradients([(np.arange(3.0) + step, a)])
        by_hand.apply_gradients([(np.arange(3.0) + step, b)])
    np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Adagrad(), ["a/accumulator", "b/accumulator"]),
        (lambda: Adadelta(), ["a/accum_grad", "b/accum_grad", "a/accum_var", "b/accum_var"]),
        (lambda: Adam(amsgrad=True), ["a/m", "b/m", "a/v", "b/v", "a/vhat", "b/vhat"]),
        (lambda: Adamax(), ["a/m", "b/m", "a/v", "b/v"]),
        (lambda: RMSprop(), ["a/rms", "b/rms"]),
        (
            lambda: RMSprop(momentum=0.5, centered=True),
            ["a/rms", "b/rms", "a/momentum", "b/momentum", "a/mg", "b/mg"],
        ),
        (lambda: Ftrl(), ["a/accumulator", "a/linear", "b/accumulator", "b/linear"]),
    ],
)
def test_weights_are_the_count_and_then_the_slots_in_keras_order(make, expected):
    optimizer = make()
    a, b, idle = (Variable(np.ones(2), name=name) for name in ("a", "b", "idle"))
    optimizer.apply_gradients([(np.ones(2), a), (np.ones(2), b), (None, idle)])
    name = type(optimizer).__name__
    assert [weight.name for weight in optimizer.weights[1:]] == [f"{name}/{slot}" for slot in expected]
    assert optimizer.weights[0] is optimizer.iterations
    assert optimizer.get_slot_names() == list(dict.fromkeys(slot.partition("/")[2] for slot in expected))
    with pytest.raises(KeyError, match="for variable 'idle'"):
        optimizer.get_slot(idle, optimizer.get_slot_names()[0])
    with pytest.raises(ValueError, match=f"expecting {len(expected) + 1} weights"):
        optimizer.set_weights([])


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda: Adagrad(initial_accumulator_value=0.5), {"accumulator": 0.5}),
        (lambda: Adadelta(), {"accum_grad": 0.0, "accum_var": 0.0}),
        (lambda: Adamax(), {"m": 0.0, "v": 0.0}),
        (lambda: RMSprop(momentum=0.5, centered=True), {"rms": 0.0, "momentum": 0.0, "mg": 0.0}),
        (lambda: Ftrl(initial_accumulator_value=0.25), {"accumulator": 0.25, "linear": 0.0}),
    ],
)
def test_slots_start_as_keras_do(make, values):
    optimizer = make()
    w = Variable(np.ones(2), name="w")
    optimizer._create_all_weights([w])
    found = {name: optimizer.get_slot(w, name).numpy().tolist() for name in optimizer.get_slot_names()}
    assert found == {name: [value, value] for name, value in values.items()}


def test_all_keras_optimizers_are_there():
    names = {"SGD", "Adagrad", "Adadelta", "Adam", "Adamax", "Nadam", "RMSprop", "Ftrl"}
    assert names <= set(optimizers.__all__)
