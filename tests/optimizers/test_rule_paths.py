"""Every optimizer's rule: blocked NumPy, numba and the plain Python function give the same bits.

The generated CUDA text is compared with the NumPy path in test_elementwise_cuda.py.
"""

import importlib
import itertools
import pkgutil

import numpy as np
import pytest
from every import CLASSES

import distopt.optimizers
from distopt.elementwise import elementwise, jitted

for _module in pkgutil.walk_packages(distopt.optimizers.__path__, "distopt.optimizers."):
    importlib.import_module(_module.name)  # fills the registry

VARIANTS = [
    (rule, dict(zip(rule.options, setting, strict=True)))
    for rule in elementwise.registry.values()
    if rule.function.__module__.startswith("distopt.optimizers")
    for setting in itertools.product((False, True), repeat=len(rule.options))
]
every_variant = pytest.mark.parametrize(
    ("rule", "options"),
    VARIANTS,
    ids=lambda value: getattr(value, "name", None) or "-".join(value) or "plain",
)


def arguments(rule, options, dtype):
    """Positive and negative values, zeros among them; slots that are roots' arguments are not negative."""
    random = np.random.default_rng(5)
    arrays = [random.standard_normal(501).astype(dtype) for _ in rule.arrays]
    for array in arrays:
        array[::50] = 0
    for place, name in enumerate(rule.arrays):
        if name in ("accumulator", "squared", "rms", "v", "vhat", "grown", "moved"):
            arrays[place] = np.abs(arrays[place]) + np.array(2, dtype)
    scalars = {name: 0.1 + 0.07 * place for place, name in enumerate(rule.scalars)}
    used = rule.uses(**options)
    return [a if n in used else None for n, a in zip(rule.arrays, arrays, strict=True)], scalars


def copies(arrays):
    return [None if array is None else array.copy() for array in arrays]


@every_variant
def test_the_numpy_path_has_the_bits_of_the_function(rule, options):
    given, scalars = arguments(rule, options, np.float64)
    found = copies(given)
    rule(*found, **scalars, **options, path="numpy")
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = rule.function(*given, **scalars, **options)
    results = dict(zip(rule.outputs, plain if isinstance(plain, tuple) else (plain,), strict=True))
    for name, before, after in zip(rule.arrays, given, found, strict=True):
        expected = results.get(name, before)
        if expected is not None:
            assert np.isfinite(expected).mean() > 0.9, name
            np.testing.assert_array_equal(after, expected, err_msg=name)


@every_variant
@pytest.mark.skipif(not jitted.usable(), reason="numba is missing or switched off")
def test_the_numba_path_has_the_bits_of_the_numpy_path(rule, options):
    if not rule.formula(**options).exact:
        pytest.skip("has a general power, which is left to NumPy")
    given, scalars = arguments(rule, options, np.float32)
    first, second = copies(given), copies(given)
    rule(*first, **scalars, **options, path="numpy")
    rule(*second, **scalars, **options, path="numba")
    for name, a, b in zip(rule.arrays, first, second, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_every_optimizer_with_a_rule_is_among_them():
    rules = {rule for rule, _ in VARIANTS}
    mine = {name for name in CLASSES if CLASSES[name].rule is not None}
    assert {name for name in mine if CLASSES[name].rule not in rules} == set()
    assert len(mine) >= 20


def test_only_a_general_power_is_not_exact():
    inexact = {
        (rule.name, *options.items()) for rule, options in VARIANTS if not rule.formula(**options).exact
    }
    assert inexact == {("ftrl", ("square_root", False))}
