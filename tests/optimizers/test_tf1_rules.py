"""The rules of TensorFlow 1's optimizers, by numbers that can be worked out by hand."""

import inspect

import numpy as np
import pytest

from distopt.optimizers import Adagrad, Ftrl, tf1
from distopt.variables import IndexedSlices, Variable


def after(optimizer, *gradients, start=1.0, dtype=np.float64, **options):
    """Return a variable after updates by these gradients."""
    w = Variable(np.array(start, dtype), name="w")
    for gradient in gradients:
        optimizer.apply_gradients([(np.array(gradient, dtype), w)], **options)
    return w


def slot(optimizer, w, name):
    return float(optimizer.get_slot(w, name))


def counter():
    return Variable(np.int64(0), trainable=False, name="global_step")


def test_adagrad_has_no_epsilon():
    # A = 7 + 9 = 16: 1 - 0.5 * 3 / 4.
    optimizer = tf1.AdagradOptimizer(0.5, initial_accumulator_value=7.0)
    w = after(optimizer, 3.0)
    assert float(w) == 0.625
    assert slot(optimizer, w, "accumulator") == 16.0
    # A gradient of 1e-20 beside A = 1e-38 is a whole step; Keras' epsilon swallows it.
    tiny = float(after(tf1.AdagradOptimizer(1.0, 1e-50), 1e-20))
    assert tiny == pytest.approx(0.0, abs=1e-9)
    assert float(after(Adagrad(1.0, 1e-50), 1e-20)) == pytest.approx(1.0)


def test_adadelta_is_the_rule_of_keras_with_its_own_slots():
    optimizer = tf1.AdadeltaOptimizer(0.5, rho=0.75, epsilon=3.0)
    w = after(optimizer, 2.0)
    assert float(w) == pytest.approx(1.0 - 0.5 * 3**0.5, rel=1e-15)
    assert (slot(optimizer, w, "accum"), slot(optimizer, w, "accum_update")) == (1.0, pytest.approx(0.75))


def test_rmsprop_starts_its_mean_at_1_and_has_epsilon_inside_the_root():
    # decay 0.75, g 2: r = 0.75 + 0.25 * 4 = 1.75; epsilon 2.25: root 2.
    optimizer = tf1.RMSPropOptimizer(0.5, decay=0.75, momentum=0.5, epsilon=2.25)
    w = after(optimizer, 2.0)
    assert float(w) == 1.0 - 0.5 * 2 / 2
    assert slot(optimizer, w, "rms") == 1.75
    optimizer.apply_gradients([(0.0, w)])
    assert float(w) == 0.5 - 0.25
    # The slot of the momentum is there without momentum, too, and holds the last step.
    plain = tf1.RMSPropOptimizer(0.5, decay=0.75, epsilon=2.25)
    w = after(plain, 2.0)
    assert (float(w), slot(plain, w, "momentum")) == (0.5, 0.5)


def test_centered_rmsprop_subtracts_the_square_of_the_mean():
    # decay 0.75, g 4: r = 0.75 + 4, c = 1: r - 1 + 0.25 = 4.
    optimizer = tf1.RMSPropOptimizer(0.5, 0.75, epsilon=0.25, centered=True)
    w = after(optimizer, 4.0)
    assert float(w) == 1.0 - 0.5 * 4 / 2
    assert slot(optimizer, w, "mg") == 1.0


def test_ftrl_is_the_rule_of_keras_without_beta():
    options = {
        "l1_regularization_strength": 1.0,
        "l2_regularization_strength": 0.5,
        "l2_shrinkage_regularization_strength": 0.25,
    }
    optimizer = tf1.FtrlOptimizer(0.5, initial_accumulator_value=0.0, **options)
    w = after(optimizer, 2.0, start=3.0)
    assert (float(w), slot(optimizer, w, "linear"), slot(optimizer, w, "accum")) == (1.5, -8.5, 4.0)
    twin = after(Ftrl(0.5, initial_accumulator_value=0.0, **options), 2.0, start=3.0)
    assert float(w) == float(twin)
    assert float(after(tf1.FtrlOptimizer(0.5), 0.0)) == 0.0
    assert float(after(tf1.FtrlOptimizer(0.5, learning_rate_power=0.0), 2.0, start=7.0)) == -1.0


def test_adagrad_da_forgets_the_initial_weights():
    # G = 3, Q = 7 + 9 = 16: -0.5 * 3 / 4, whatever w was.
    for start in (0.0, 5.0, -100.0):
        optimizer = tf1.AdagradDAOptimizer(0.5, counter(), 7.0)
        w = after(optimizer, 3.0, start=start)
        assert float(w) == -0.375
    assert slot(optimizer, w, "gradient_accumulator") == 3.0
    assert slot(optimizer, w, "gradient_squared_accumulator") == 16.0


def test_adagrad_das_penalties_grow_with_the_global_step():
    # T = 1, then 2: |G| - l1 T = 3 - 0.5, then 3 - 1; the denominator 0.25 T 0.5 + 4.
    step = counter()
    optimizer = tf1.AdagradDAOptimizer(0.5, step, 7.0, 0.5, 0.25)
    w = after(optimizer, 3.0, global_step=step)
    assert float(w) == pytest.approx(-0.5 * 2.5 / (0.125 + 4), rel=1e-15)
    optimizer.apply_gradients([(0.0, w)], global_step=step)
    assert float(w) == pytest.approx(-0.5 * 2.0 / (0.25 + 4), rel=1e-15)
    assert int(step.value) == 2
    # T stays 1 for those who don't pass the step on.
    optimizer = tf1.AdagradDAOptimizer(0.5, counter(), 7.0, 0.5, 0.25)
    assert float(after(optimizer, 3.0, 0.0)) == pytest.approx(-0.5 * 2.5 / (0.125 + 4), rel=1e-15)
    # Up to l1 T the variable is exactly zero.
    assert float(after(tf1.AdagradDAOptimizer(0.5, counter(), 7.0, 3.0), 3.0)) == 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proximal_gradient_descent_solves_for_its_penalties(dtype):
    # p = 1 - 0.5 * 0.5 = 0.75; (0.75 - 0.5 * 0.5) / (1 + 0.5 * 2).
    optimizer = tf1.ProximalGradientDescentOptimizer(0.5, 0.5, 2.0)
    w = after(optimizer, 0.5, dtype=dtype)
    assert (float(w), w.dtype) == (0.25, dtype)
    assert optimizer.get_slot_names() == []
    assert float(after(optimizer, -4.0, start=-1.0, dtype=dtype)) == (1 - 0.25) / 2
    assert float(after(optimizer, 1.5, dtype=dtype)) == 0.0  # |p| = 0.25 = lr l1
    assert float(after(tf1.ProximalGradientDescentOptimizer(0.5, 0.0, 2.0), 1.0, dtype=dtype)) == 0.25


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_proximal_adagrad_takes_the_rate_of_each_element(dtype):
    # A = 7 + 9 = 16, rate 0.5 / 4: p = 1 - 0.375 = 0.625; (0.625 - 0.125 * 1) / (1 + 0.125 * 8) = 0.25.
    optimizer = tf1.ProximalAdagradOptimizer(0.5, 7.0, 1.0, 8.0)
    w = after(optimizer, 3.0, dtype=dtype)
    assert (float(w), slot(optimizer, w, "accumulator"), w.dtype) == (0.25, 16.0, dtype)
    plain = after(tf1.ProximalAdagradOptimizer(0.5, 7.0), 3.0, dtype=dtype)
    assert float(plain) == float(after(tf1.AdagradOptimizer(0.5, 7.0), 3.0, dtype=dtype)) == 0.625


def test_proximal_penalties_act_on_listed_rows_only():
    w = Variable(np.ones((3, 1)), name="w")
    optimizer = tf1.ProximalGradientDescentOptimizer(0.5, 0.5, 2.0)
    optimizer.apply_gradients([(IndexedSlices([[0.25], [0.25]], [1, 1], (3, 1)), w)])
    assert w.numpy().ravel().tolist() == [1.0, 0.25, 1.0]


REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "GradientDescent": {"learning_rate": REQUIRED, "use_locking": False, "name": "GradientDescent"},
    "Momentum": {
        "learning_rate": REQUIRED,
        "momentum": REQUIRED,
        "use_locking": False,
        "name": "Momentum",
        "use_nesterov": False,
    },
    "Adagrad": {
        "learning_rate": REQUIRED,
        "initial_accumulator_value": 0.1,
        "use_locking": False,
        "name": "Adagrad",
    },
    "AdagradDA": {
        "learning_rate": REQUIRED,
        "global_step": REQUIRED,
        "initial_gradient_squared_accumulator_value": 0.1,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "use_locking": False,
        "name": "AdagradDA",
    },
    "Adadelta": {
        "learning_rate": 0.001,
        "rho": 0.95,
        "epsilon": 1e-8,
        "use_locking": False,
        "name": "Adadelta",
    },
    "Adam": {
        "learning_rate": 0.001,
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "use_locking": False,
        "name": "Adam",
    },
    "Ftrl": {
        "learning_rate": REQUIRED,
        "learning_rate_power": -0.5,
        "initial_accumulator_value": 0.1,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "use_locking": False,
        "name": "Ftrl",
        "accum_name": None,
        "linear_name": None,
        "l2_shrinkage_regularization_strength": 0.0,
    },
    "RMSProp": {
        "learning_rate": REQUIRED,
        "decay": 0.9,
        "momentum": 0.0,
        "epsilon": 1e-10,
        "use_locking": False,
        "centered": False,
        "name": "RMSProp",
    },
    "ProximalGradientDescent": {
        "learning_rate": REQUIRED,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "use_locking": False,
        "name": "ProximalGradientDescent",
    },
    "ProximalAdagrad": {
        "learning_rate": REQUIRED,
        "initial_accumulator_value": 0.1,
        "l1_regularization_strength": 0.0,
        "l2_regularization_strength": 0.0,
        "use_locking": False,
        "name": "ProximalAdagrad",
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_tensorflows_order_and_defaults(name):
    parameters = inspect.signature(getattr(tf1, f"{name}Optimizer")).parameters
    found = {k: p.default for k, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert list(found.items()) == list(SIGNATURES[name].items())


SLOTS = {
    "Adagrad": ({}, {"accumulator": ("w/Adagrad", 0.1)}),
    "Adadelta": ({}, {"accum": ("w/Adadelta", 0.0), "accum_update": ("w/Adadelta_1", 0.0)}),
    "RMSProp": ({}, {"rms": ("w/RMSProp", 1.0), "momentum": ("w/RMSProp_1", 0.0)}),
    "RMSProp centered": (
        {"centered": True},
        {"rms": ("w/RMSProp", 1.0), "mg": ("w/RMSProp_1", 0.0), "momentum": ("w/RMSProp_2", 0.0)},
    ),
    "Ftrl": ({}, {"accum": ("w/Ftrl", 0.1), "linear": ("w/Ftrl_1", 0.0)}),
    "Ftrl named": (
        {"accum_name": "a", "linear_name": "l"},
        {"accum": ("w/a", 0.1), "linear": ("w/l", 0.0)},
    ),
    "Ftrl half named": ({"accum_name": "a"}, {"accum": ("w/a", 0.1), "linear": ("w/Ftrl", 0.0)}),
    "AdagradDA": (
        {"global_step": Variable(np.int64(0), trainable=False)},
        {
            "gradient_accumulator": ("w/AdagradDA", 0.0),
            "gradient_squared_accumulator": ("w/AdagradDA_1", 0.1),
        },
    ),
    "ProximalAdagrad": ({}, {"accumulator": ("w/ProximalAdagrad", 0.1)}),
    "ProximalGradientDescent": ({}, {}),
    "GradientDescent": ({}, {}),
}


@pytest.mark.parametrize("case", SLOTS)
def test_slots_have_tensorflows_names_and_initial_values(case):
    options, slots = SLOTS[case]
    name = case.partition(" ")[0]
    optimizer = getattr(tf1, f"{name}Optimizer")(learning_rate=0.5, **options)
    w, idle = Variable(np.ones(1), name="w"), Variable(np.ones(1), name="idle")
    assert optimizer.get_slot_names() == []
    optimizer._create_all_weights([w])
    assert optimizer.get_slot_names() == sorted(slots)
    for slot_name, (full_name, initial) in slots.items():
        found = optimizer.get_slot(w, slot_name)
        assert (found.name, found.numpy().tolist(), found.trainable) == (full_name, [initial], False)
        assert optimizer.get_slot(idle, slot_name) is None
    assert optimizer.get_slot(w, "unknown") is None
    assert [v.name for v in optimizer.variables()] == sorted(full_name for full_name, _ in slots.values())
    assert optimizer.get_name() == name


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: tf1.AdagradOptimizer(0.1, 0.0),
            ValueError,
            "initial_accumulator_value must be positive: 0.0",
        ),
        (lambda: tf1.ProximalAdagradOptimizer(0.1, -1.0), ValueError, "must be positive: -1.0"),
        (
            lambda: tf1.AdagradDAOptimizer(0.1, counter(), 0.0),
            ValueError,
            "initial_gradient_squared_accumulator_value must be positive: 0.0",
        ),
        (lambda: tf1.AdagradDAOptimizer(0.1, 3), TypeError, "global_step must be an integer Variable"),
        (lambda: tf1.AdagradDAOptimizer(0.1, Variable(0.0)), TypeError, "global_step must be an integer"),
        (lambda: tf1.AdagradDAOptimizer(0.1, counter(), 1.0, -1.0), ValueError, "l1_regularization_strength"),
        (lambda: tf1.ProximalGradientDescentOptimizer(0.1, -1.0), ValueError, "l1_regularization_strength"),
        (lambda: tf1.ProximalAdagradOptimizer(0.1, 1.0, 0.0, -1.0), ValueError, "l2_regularization_strength"),
        (
            lambda: tf1.FtrlOptimizer(0.1, 0.5),
            ValueError,
            "learning_rate_power 0.500000 needs to be negative",
        ),
        (lambda: tf1.FtrlOptimizer(0.1, -0.5, -1.0), ValueError, "initial_accumulator_value -1.000000 needs"),
        (lambda: tf1.FtrlOptimizer(0.1, l1_regularization_strength=-1), ValueError, "l1_regularization"),
        (lambda: tf1.FtrlOptimizer(0.1, l2_regularization_strength=-1), ValueError, "l2_regularization"),
        (
            lambda: tf1.FtrlOptimizer(0.1, l2_shrinkage_regularization_strength=-1),
            ValueError,
            "l2_shrinkage_regularization_strength -1.000000 needs to be positive or zero",
        ),
        (lambda: tf1.FtrlOptimizer(0.0), ValueError, "lr is not a positive scalar"),
        (lambda: tf1.RMSPropOptimizer(0.1, decay=1.0), ValueError, r"decay must be in \[0, 1\)"),
        (lambda: tf1.RMSPropOptimizer(0.1, momentum=2.0), ValueError, r"`momentum` must be between \[0, 1\]"),
        (lambda: tf1.AdadeltaOptimizer(0.1, epsilon=-1.0), ValueError, "epsilon must not be negative"),
        (lambda: tf1.AdagradOptimizer(0.1, name=""), ValueError, "Must specify the optimizer name"),
        (lambda: tf1.AdagradOptimizer(0.1, decay=0.5), TypeError, "Unexpected keyword argument"),
    ],
)
def test_arguments_out_of_range_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_epsilon_0_stays_0():
    assert tf1.RMSPropOptimizer(0.1, epsilon=0.0).epsilon == 0.0
    assert tf1.AdamOptimizer(epsilon=0.0).epsilon == 0.0


def test_use_locking_never_changes_a_number():
    found = [after(tf1.AdagradOptimizer(0.5, use_locking=locks), 3.0, -1.0) for locks in (False, True)]
    assert float(found[0]) == float(found[1])
