"""Decoupled weight decay: both conventions, what decays, and the extension of other optimizers."""

import inspect

import numpy as np
import pytest
from every import CLASSES, REQUIRED

from distopt import ops
from distopt.elementwise import elementwise
from distopt.optimizers import (
    LAMB,
    SGD,
    SGDW,
    Adam,
    AdamW,
    LazyAdam,
    Lion,
    Optimizer,
    contrib,
    keras_new,
    tf1,
)
from distopt.optimizers.contrib import extend_with_decoupled_weight_decay
from distopt.optimizers.lars import LayerwiseMomentum
from distopt.optimizers.weight_decay import DecoupledWeightDecay
from distopt.schedules import PiecewiseConstantDecay
from distopt.variables import Arena, IndexedSlices, Variable

CONVENTIONS = {
    "adamw": (lambda c, **o: AdamW(0.1, 0.25, decay_convention=c, **o), lambda: Adam(0.1)),
    "amsgrad": (
        lambda c, **o: AdamW(0.1, 0.25, amsgrad=True, decay_convention=c, **o),
        lambda: Adam(0.1, amsgrad=True),
    ),
    "sgdw": (lambda c, **o: SGDW(0.1, 0.25, decay_convention=c, **o), lambda: SGD(0.1)),
    "momentum": (lambda c, **o: SGDW(0.1, 0.25, 0.9, decay_convention=c, **o), lambda: SGD(0.1, 0.9)),
    "nesterov": (
        lambda c, **o: SGDW(0.1, 0.25, 0.9, nesterov=True, decay_convention=c, **o),
        lambda: SGD(0.1, 0.9, nesterov=True),
    ),
    "lion": (lambda c, **o: Lion(0.1, weight_decay=0.25, decay_convention=c, **o), lambda: Lion(0.1)),
}


@pytest.mark.parametrize("name", CONVENTIONS)
@pytest.mark.parametrize(("convention", "share"), [("keras", 0.1), ("tfa", 1.0)])
def test_the_decay_comes_first_bit_for_bit(name, convention, share):
    decaying, plain = CONVENTIONS[name][0](convention), CONVENTIONS[name][1]()
    random = np.random.default_rng(1)
    start = random.standard_normal(50).astype("f4")
    first, second = Variable(start, name="w"), Variable(start, name="w")
    share = np.float32(0.25 * float(np.float32(share)))
    for _ in range(4):
        gradient = random.standard_normal(50).astype("f4")
        decaying.apply_gradients([(gradient, first)])
        second.value -= share * second.value
        plain.apply_gradients([(gradient, second)])
        np.testing.assert_array_equal(first.numpy(), second.numpy())


def test_the_two_conventions_by_arithmetic():
    # lr 0.5, wd 0.25, w 8, g 1. keras: 8 - 0.125*8 - 0.5 = 6.5; tfa: 8 - 0.25*8 - 0.5 = 5.5
    for convention, expected in (("keras", 6.5), ("tfa", 5.5)):
        w = Variable(8.0)
        SGDW(0.5, 0.25, decay_convention=convention).apply_gradients([(1.0, w)])
        assert float(w) == expected
    # Adam's first step is lr * sign(g), up to epsilon.
    for convention, expected in (("keras", 6.5), ("tfa", 5.5)):
        w = Variable(8.0)
        AdamW(0.5, 0.25, decay_convention=convention).apply_gradients([(1.0, w)])
        assert float(w) == pytest.approx(expected, abs=1e-5)


def test_weight_decay_does_not_enter_the_moments():
    w = Variable(100.0)
    optimizer = AdamW(0.1, 0.5)
    optimizer.apply_gradients([(2.0, w)])
    assert float(optimizer.get_slot(w, "m")) == pytest.approx(0.2)
    assert float(optimizer.get_slot(w, "v")) == pytest.approx(0.004, rel=1e-4)


def test_sparse_gradients_decay_all_rows_in_the_keras_convention():
    # All rows: 8 - 0.5*0.25*8 = 7; the listed ones 7 - 0.5*g.
    table = Variable(np.full((3, 1), 8.0))
    optimizer = SGDW(0.5, 0.25)
    optimizer.apply_gradients([(IndexedSlices([[1.0], [1.0]], [2, 2], (3, 1)), table)])
    assert table.numpy().ravel().tolist() == [7.0, 7.0, 6.0]
    # Momentum is that of the dense gradient with zeros: row 2 coasts on.
    sparse, dense = Variable(np.full((3, 1), 8.0)), Variable(np.full((3, 1), 8.0))
    first, second = SGDW(0.5, 0.25, 0.5), SGDW(0.5, 0.25, 0.5)
    for row in (2, 0):
        gradient = np.zeros((3, 1))
        gradient[row] = 1.0
        first.apply_gradients([(IndexedSlices([[1.0]], [row], (3, 1)), sparse)])
        second.apply_gradients([(gradient, dense)])
    np.testing.assert_array_equal(sparse.numpy(), dense.numpy())
    # Row 2: 8 -> 8-1-0.5 = 6.5 with a = -0.5; then 6.5 * 0.875 - 0.25
    assert dense.numpy()[2, 0] == 6.5 * 0.875 - 0.25


def test_sparse_gradients_decay_the_listed_rows_in_the_tfa_convention():
    table = Variable(np.full((3, 1), 8.0))
    optimizer = SGDW(0.5, 0.25, decay_convention="tfa")
    optimizer.apply_gradients([(IndexedSlices([[1.0], [1.0]], [2, 2], (3, 1)), table)])
    assert table.numpy().ravel().tolist() == [8.0, 8.0, 5.0]  # 8 - 2 - 0.5*2: a repeated row decays once


def test_adam_moves_all_rows_and_decays_the_listed_ones_in_the_tfa_convention():
    start = np.arange(1.0, 7.0).reshape(3, 2)
    first, second = Variable(start), Variable(start)
    decaying, plain = AdamW(0.1, 0.25, decay_convention="tfa"), Adam(0.1)
    for rows in ([0, 0], [2, 1], []):
        values = np.ones((len(rows), 2)) * 2.0
        decaying.apply_gradients([(IndexedSlices(values, np.array(rows, int), (3, 2)), first)])
        listed = sorted(set(rows))
        second.value[listed] -= 0.25 * second.value[listed]
        plain.apply_gradients([(IndexedSlices(values, np.array(rows, int), (3, 2)), second)])
    np.testing.assert_array_equal(first.numpy(), second.numpy())


def test_excluded_variables_between_others_in_an_arena_do_not_decay():
    names = ["dense/kernel", "dense/bias", "norm/gamma", "out/kernel", "out/bias"]
    variables = [Variable(np.full(n, 8.0, np.float32), name=name) for n, name in enumerate(names, 3)]
    Arena(variables)
    optimizer = AdamW(0.5, 0.25, exclude_from_weight_decay=["bias$", "gamma|beta"])
    optimizer.apply_gradients([(np.zeros(v.shape, np.float32), v) for v in variables])
    left = [v.numpy()[0] for v in variables]
    assert left == [7.0, 8.0, 8.0, 7.0, 8.0]  # 8 - 0.5*0.25*8
    assert all((v.numpy() == v.numpy()[0]).all() for v in variables)


def test_exclusion_searches_anywhere_in_the_name():
    optimizer = SGDW(0.5, 0.25, exclude_from_weight_decay=["b"])
    assert not optimizer.decays(Variable(1.0, name="emb"))
    assert optimizer.decays(Variable(1.0, name="w"))


def test_only_listed_variables_decay():
    a, b, c = (Variable(8.0, name=name) for name in ("a", "b", "c"))
    optimizer = SGDW(0.5, 0.25, decay_var_list=[a, "b"])
    optimizer.apply_gradients([(0.0, v) for v in (a, b, c)])
    assert [float(v) for v in (a, b, c)] == [7.0, 7.0, 8.0]
    twin = Variable(8.0, name="a")  # a variable is itself, not its name
    optimizer.apply_gradients([(0.0, twin)])
    assert float(twin) == 8.0
    assert optimizer.get_config()["decay_var_list"] == ["a", "b"]


def test_a_list_given_to_one_update_holds_for_it_alone():
    for optimizer, expected in (
        (contrib.SGDW(0.25, 0.5), [[6.0, 8.0], [4.5, 6.0]]),
        (contrib.MomentumWOptimizer(0.25, 0.5, 0.0), [[6.0, 8.0], [4.5, 6.0]]),
    ):
        a, b = Variable(8.0, name="a"), Variable(8.0, name="b")
        optimizer.apply_gradients([(0.0, a), (0.0, b)], decay_var_list=[a])
        assert [float(a), float(b)] == expected[0]
        optimizer.apply_gradients([(0.0, a), (0.0, b)])
        assert [float(a), float(b)] == expected[1]


def test_minimize_takes_the_list_too():
    a, b = Variable(8.0, name="a"), Variable(8.0, name="b")
    contrib.SGDW(0.25, 0.5).minimize(lambda: a + b, var_list=[a, b], decay_var_list=[b])
    assert [float(a), float(b)] == [7.5, 5.5]
    a, b = Variable(8.0, name="a"), Variable(8.0, name="b")
    step = Variable(0, name="step")
    optimizer = contrib.MomentumWOptimizer(0.25, 0.5, 0.0)
    optimizer.minimize(lambda: a + b, step, [a, b], decay_var_list=[b])
    assert [float(a), float(b), int(step.value)] == [7.5, 5.5, 1]


def test_a_decay_can_be_a_schedule_or_callable_and_be_set():
    w = Variable(8.0)
    optimizer = SGDW(0.5, PiecewiseConstantDecay([0], [0.5, 0.25]), decay_convention="tfa")
    optimizer.apply_gradients([(0.0, w)])
    optimizer.apply_gradients([(0.0, w)])
    assert float(w) == 3.0  # 8 * 0.5 * 0.75
    optimizer.weight_decay = lambda: 1.0
    optimizer.apply_gradients([(0.0, w)])
    assert float(w) == 0.0
    optimizer.weight_decay = 0.125
    assert optimizer.weight_decay == 0.125


def test_a_schedule_of_the_rate_scales_the_keras_decay_only():
    rate = PiecewiseConstantDecay([0], [0.5, 0.25])
    for convention, expected in (("keras", 8 * 0.75 * 0.875), ("tfa", 8 * 0.5 * 0.5)):
        w = Variable(8.0)
        optimizer = SGDW(rate, 0.5, decay_convention=convention)
        for _ in range(2):
            optimizer.apply_gradients([(0.0, w)])
        assert float(w) == expected


def test_time_based_decay_of_the_rate_is_in_the_keras_decay():
    w = Variable(8.0)
    optimizer = SGDW(0.5, 0.5, decay=1.0)  # rates 0.5, 0.25
    for _ in range(2):
        optimizer.apply_gradients([(0.0, w)])
    assert float(w) == 8 * 0.75 * 0.875


def test_no_weight_decay_is_adam():
    random = np.random.default_rng(2)
    start, gradients = random.standard_normal(9).astype("f4"), random.standard_normal((3, 9)).astype("f4")
    first, second = Variable(start), Variable(start)
    adamw, adam = AdamW(0.1, weight_decay=None), Adam(0.1)
    for gradient in gradients:
        adamw.apply_gradients([(gradient, first)])
        adam.apply_gradients([(gradient, second)])
    np.testing.assert_array_equal(first.numpy(), second.numpy())
    assert adamw.get_config()["weight_decay"] == 0.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdamW(0.1, -1.0), ValueError, "weight_decay must not be negative, got -1.0"),
        (lambda: SGDW(0.1, float("nan")), ValueError, "weight_decay must not be negative, got nan"),
        (lambda: contrib.AdamW(-0.5), ValueError, "weight_decay must not be negative, got -0.5"),
        (lambda: AdamW(0.1, decay_convention="torch"), ValueError, "'keras'.* or 'tfa'.* got 'torch'"),
        (lambda: AdamW(0.1, exclude_from_weight_decay="bias"), TypeError, "list of regular.* got 'bias'"),
        (
            lambda: AdamW(0.1, exclude_from_weight_decay=["("]),
            ValueError,
            "'[(]', which is no regular expression",
        ),
        (lambda: AdamW(0.1, decay_var_list=[3.0]), TypeError, "list of variables or of their names"),
        (lambda: AdamW(0.1, decay_var_list="w"), TypeError, "list of variables or of their names"),
        (lambda: extend_with_decoupled_weight_decay(AdamW), TypeError, "AdamW has a weight decay"),
        (lambda: extend_with_decoupled_weight_decay(contrib.LAMB), TypeError, "LAMB has a weight decay"),
        (lambda: extend_with_decoupled_weight_decay(3), TypeError, "derived from Optimizer, got 3"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_callable_decay_out_of_range_is_refused_before_anything_changes():
    w = Variable(1.0)
    optimizer = SGDW(0.1, lambda: -1.0)
    with pytest.raises(ValueError, match=r"weight_decay must not be negative, got -1\.0"):
        optimizer.apply_gradients([(1.0, w)])
    assert (float(w), optimizer.iterations) == (1.0, 0)


def test_contrib_slots_have_tensorflow_1_names():
    w = Variable(1.0, name="w")
    optimizer = contrib.AdamWOptimizer(0.01, 0.1)
    optimizer.apply_gradients([(1.0, w)])
    assert [v.name for v in optimizer.variables()] == ["beta1_power", "beta2_power", "w/AdamW", "w/AdamW_1"]
    assert optimizer.get_slot(w, "none") is None
    optimizer = contrib.LARSOptimizer(0.1)
    optimizer.apply_gradients([(1.0, w)])
    assert [v.name for v in optimizer.variables()] == ["w/LARSOptimizer"]


# The extension.


class Halving(Optimizer):
    """Has Keras' hooks instead of a rule: w -= lr * g / 2."""

    def __init__(self, learning_rate=0.5, **options):
        super().__init__(hyperparameters={"learning_rate": learning_rate}, **options)

    def _resource_apply_dense(self, grad, var, apply_state=None):
        var.assign_sub(apply_state[var.device, var.dtype]["lr_t"] * grad / 2)

    def _resource_apply_sparse(self, grad, var, indices, apply_state=None):
        var.value[indices] -= apply_state[var.device, var.dtype]["lr_t"] * grad / 2


class Doubling(Adam):
    """Has a rule, and a hook in front of it."""

    def _resource_apply_dense(self, grad, var, apply_state=None):
        return super()._resource_apply_dense(grad * 2, var)


@pytest.mark.parametrize(
    ("extended", "written"),
    [
        (lambda: extend_with_decoupled_weight_decay(Adam)(0.25, 0.1), lambda: contrib.AdamW(0.25, 0.1)),
        (
            lambda: extend_with_decoupled_weight_decay(SGD)(0.25, 0.1, momentum=0.9),
            lambda: contrib.SGDW(0.25, 0.1, 0.9),
        ),
        (
            lambda: extend_with_decoupled_weight_decay(tf1.AdamOptimizer)(0.25, 0.1),
            lambda: contrib.AdamWOptimizer(0.25, 0.1),
        ),
        (
            lambda: extend_with_decoupled_weight_decay(tf1.MomentumOptimizer)(0.25, 0.1, 0.9),
            lambda: contrib.MomentumWOptimizer(0.25, 0.1, 0.9),
        ),
    ],
)
def test_extended_classes_are_those_written_out(extended, written):
    random = np.random.default_rng(4)
    results = []
    for optimizer in (extended(), written()):
        dense, table = Variable(np.arange(5.0), name="dense"), Variable(np.ones((4, 2)), name="table")
        random = np.random.default_rng(4)
        for _ in range(3):
            slices = IndexedSlices(random.standard_normal((3, 2)), [2, 0, 2], (4, 2))
            optimizer.apply_gradients([(random.standard_normal(5), dense), (slices, table)])
        results.append((dense.numpy(), table.numpy()))
    for ours, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_an_extended_lazy_optimizer_leaves_other_rows_alone():
    table = Variable(np.full((3, 1), 8.0))
    optimizer = extend_with_decoupled_weight_decay(LazyAdam)(0.25, 0.5)
    optimizer.apply_gradients([(IndexedSlices([[1.0]], [1], (3, 1)), table)])
    np.testing.assert_allclose(table.numpy().ravel(), [8.0, 5.5, 8.0], rtol=1e-5)


class Hybrid(SGD):
    """The velocities of all rows go on, but only the listed rows of the variable move."""

    sparse = "hybrid"


def test_the_listed_rows_of_a_hybrid_optimizer_decay():
    table = Variable(np.full((3, 1), 8.0))
    optimizer = extend_with_decoupled_weight_decay(Hybrid)(0.25, 0.5, 0.5)
    for row in (0, 1):
        optimizer.apply_gradients([(IndexedSlices([[1.0]], [row], (3, 1)), table)])
    assert table.numpy().ravel().tolist() == [5.5, 5.5, 8.0]  # 8 - 2 - 0.5
    assert optimizer.get_slot(table, "momentum").numpy().ravel().tolist() == [-0.25, -0.5, 0.0]


def test_an_optimizer_with_hooks_instead_of_a_rule_is_extended():
    optimizer = extend_with_decoupled_weight_decay(Halving)(0.25, exclude_from_weight_decay=["bias"])
    w, bias, table = Variable(8.0, name="w"), Variable(8.0, name="bias"), Variable(np.full((3, 1), 8.0))
    slices = IndexedSlices([[4.0], [4.0]], [2, 2], (3, 1))
    optimizer.apply_gradients([(4.0, w), (4.0, bias), (slices, table)])
    assert (float(w), float(bias)) == (5.0, 7.0)  # 8 - 2 - 0.5*4/2
    assert table.numpy().ravel().tolist() == [8.0, 8.0, 4.0]


def test_an_optimizer_whose_hook_calls_its_rule_decays_once():
    w = Variable(8.0)
    extend_with_decoupled_weight_decay(Doubling)(0.25, 0.5).apply_gradients([(1.0, w)])
    assert float(w) == pytest.approx(5.5, abs=1e-5)


@elementwise
def with_a_share(value, gradient, *, learning_rate, decay_share):
    value = value - decay_share * value - learning_rate * gradient
    return value  # noqa: RET504


class WithAShare(Optimizer):
    """Has a decay in its rule already."""

    rule = with_a_share

    def __init__(self, learning_rate=0.1, decay_share=0.1, **options):
        given = {"learning_rate": learning_rate, "decay_share": decay_share}
        super().__init__(hyperparameters=given, **options)


def test_a_rule_with_a_share_of_its_own_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match="can't be put in front of with_a_share"):
        extend_with_decoupled_weight_decay(WithAShare)(0.1)


def test_extended_classes_keep_their_configuration():
    kind = extend_with_decoupled_weight_decay(SGD)
    optimizer = kind(0.25, 0.1, momentum=0.5, nesterov=True, exclude_from_weight_decay=["b"])
    again = kind.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert (again.weight_decay, again.nesterov, again.exclude_from_weight_decay) == (0.25, True, ["b"])
    assert "SGD" in kind.__doc__


def test_decay_alone_brings_weights_to_zero():
    w = Variable([3.0, -2.0])
    optimizer = AdamW(0.1, 1.0)
    for _ in range(100):
        optimizer.minimize(lambda: ops.reduce_sum(w * 0.0), var_list=[w])
    assert abs(w.numpy()).max() < 1e-4


EXTENDABLE = [
    name
    for name, kind in CLASSES.items()
    if not issubclass(kind, DecoupledWeightDecay | LAMB | LayerwiseMomentum | keras_new.Optimizer)
]


@pytest.mark.parametrize("name", EXTENDABLE)
def test_every_optimizer_can_be_extended(name):
    kind = extend_with_decoupled_weight_decay(CLASSES[name])
    settings = {
        key: REQUIRED[key]()
        for key, parameter in inspect.signature(CLASSES[name]).parameters.items()
        if parameter.default is parameter.empty and key in REQUIRED
    }
    decaying, plain = kind(0.25, **settings), CLASSES[name](**settings)
    random = np.random.default_rng(2)
    start, table = random.standard_normal(7), random.standard_normal((4, 3))
    first, second = Variable(start, name="a"), Variable(start, name="a")
    one, two = Variable(table, name="b"), Variable(table, name="b")
    for rows in ([0, 2, 0], [3], []):
        gradient, values = random.standard_normal(7), random.standard_normal((len(rows), 3))
        slices = IndexedSlices(values, np.array(rows, int), (4, 3))
        decaying.apply_gradients([(gradient, first), (slices, one)])
        second.value -= 0.25 * second.value
        two.value[sorted(set(rows))] *= 0.75
        plain.apply_gradients([(gradient, second), (slices, two)])
    np.testing.assert_array_equal(first.numpy(), second.numpy())
    np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-14)


def test_nothing_is_left_out_of_the_extension():
    assert {"SGD", "Nadam", "RMSprop", "Ftrl", "tf1.AdagradDAOptimizer", "contrib.LazyAdamOptimizer"} <= {
        *EXTENDABLE
    }
    assert all(CLASSES[name].rule is not None or name.endswith(("SGD", "RMSprop")) for name in EXTENDABLE)
