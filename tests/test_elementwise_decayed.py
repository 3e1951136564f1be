"""Weight decay in front of any rule: the bits of a pass of its own, in one pass."""

import itertools

import numpy as np
import pytest

from distopt.elementwise import decayed, elementwise, maximum
from distopt.optimizers.adam import adam
from distopt.optimizers.gradient_descent import gradient_descent, momentum, velocity
from distopt.optimizers.lion import lion


@elementwise
def to_the_mean(value, gradient, mean, *, rate, frozen: bool = False):
    mean = mean + rate * (gradient - mean)
    if not frozen:
        value = maximum(mean, 0)
    return value, mean


@elementwise
def moments_only(value, gradient, m, *, rate):
    m = m + rate * (value + gradient)
    return (m,)


RULES = [gradient_descent, momentum, velocity, adam, lion, to_the_mean]
CASES = [
    (rule, dict(zip(rule.options, setting, strict=True)))
    for rule in RULES
    for setting in itertools.product((False, True), repeat=len(rule.options))
]


def shrunk(value, share):
    """The decay by itself, each operation rounded to the compute type."""
    wide = value.astype(np.float32) if value.dtype == np.float16 else value
    return wide - wide.dtype.type(share) * wide


def inputs(rule, options, dtype, shape):
    random = np.random.default_rng(5)
    used = {*rule.uses(**options), rule.arrays[0]}
    return [
        abs(random.standard_normal(shape)).astype(dtype) + dtype(0.1) if name in used else None
        for name in rule.arrays
    ]


def scalars(rule):
    return {name: 0.1 + 0.07 * place for place, name in enumerate(rule.scalars)}


@pytest.mark.parametrize("path", ["numpy", "numba"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rule", "options"), CASES, ids=lambda given: getattr(given, "name", str(given)))
def test_a_decayed_rule_has_the_bits_of_a_decay_followed_by_the_rule(rule, options, dtype, path):
    first = inputs(rule, options, dtype, 1003)
    second = [None if array is None else array.copy() for array in first]
    decayed(rule)(*first, decay_share=0.25, **scalars(rule), **options, path=path)
    second[0] = shrunk(second[0], 0.25)
    rule(*second, **scalars(rule), **options, path=path)
    for ours, wanted in zip(first, second, strict=True):
        if wanted is not None:
            np.testing.assert_array_equal(ours, wanted)


def test_half_precision_decays_in_float32_and_is_rounded_once():
    value, gradient = np.array([0.1, 1000.0], np.float16), np.array([1e-3, 3.0], np.float16)
    expected = (shrunk(value, 1e-3) - np.float32(0.1) * gradient.astype(np.float32)).astype(np.float16)
    decayed(gradient_descent)(value, gradient, learning_rate=0.1, decay_share=1e-3)
    np.testing.assert_array_equal(value, expected)


def test_only_the_listed_rows_of_a_table_decay():
    value = np.full((4, 2), 8.0)
    gradient = np.ones((2, 2))
    decayed(gradient_descent).rows(np.array([3, 1]), value, gradient, learning_rate=0.5, decay_share=0.25)
    assert value[:, 0].tolist() == [8.0, 5.5, 8.0, 5.5]  # 8 - 2 - 0.5


def test_a_value_that_is_overwritten_or_kept_is_handled():
    value, mean = np.array([8.0]), np.array([2.0])
    rule = decayed(to_the_mean)
    rule(value, np.array([4.0]), mean, rate=0.5, decay_share=0.25)
    assert (value[0], mean[0]) == (3.0, 3.0)
    value[:] = 8.0
    rule(value, np.array([4.0]), mean, rate=0.5, decay_share=0.25, frozen=True)
    assert (value[0], mean[0]) == (6.0, 3.5)


def test_the_plain_function_of_a_decayed_rule_computes_the_same():
    values = [np.array([4.0]), np.array([1.0]), np.array([2.0])]
    function = decayed(momentum).function
    value, accumulator = function(
        *values, learning_rate=0.5, momentum=0.5, use_nesterov=False, decay_share=0.25
    )
    assert (value[0], accumulator[0]) == (2.0, 2.0)  # a = 0.5*2 + 1; w = 4 - 1 - 0.5*2


def test_there_is_one_decayed_rule_and_it_is_registered():
    rule = decayed(adam)
    assert rule is decayed(adam)
    assert elementwise.registry["adam_with_decay"] is rule
    assert rule.scalars == (*adam.scalars, "decay_share")
    assert rule.options == adam.options
    assert "with_decay" in rule.cuda_source("float32", amsgrad=True)


def test_rules_that_have_a_decay_or_no_value_are_refused():
    with pytest.raises(ValueError, match=r"in front of adam_with_decay.*no scalar 'decay_share'"):
        decayed(decayed(adam))
    with pytest.raises(ValueError, match=r"moments_only.*must update 'value'"):
        decayed(moments_only)
