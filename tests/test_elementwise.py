"""Elementwise rules on a CPU: what they compute and refuse, and that all paths agree."""

import importlib.util
import math
import random
import subprocess
import sys
import textwrap
import threading
import tracemalloc

import numpy as np
import pytest

from distopt.elementwise import (
    elementwise,
    exp,
    isfinite,
    jitted,
    log,
    maximum,
    sign,
    sqrt,
    where,
)

PATHS = ["numpy", *(["numba"] if jitted.usable() else [])]


@elementwise
def example_adam(value, gradient, m, v, *, learning_rate, beta_1, beta_2, epsilon=1e-7):
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w -= lr m / (sqrt(v) + eps)."""
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * gradient * gradient
    value = value - learning_rate * m / (sqrt(v) + epsilon)
    return value, m, v


@elementwise
def example_momentum(value, gradient, velocity, *, learning_rate, decay, nesterov: bool = False):
    velocity = decay * velocity + gradient
    direction = gradient + decay * velocity if nesterov else velocity
    value -= learning_rate * direction
    return value, velocity


@elementwise
def example_shrink(value, gradient, *, learning_rate, l1, guarded: bool = False):
    moved = value - learning_rate * gradient
    if guarded:
        moved = where(isfinite(gradient) & ~(gradient == 7), moved, value)
    value = where(abs(moved) > l1, sign(moved) * maximum(abs(moved) - l1, 0), 0.0)
    return (value,)


@elementwise
def example_amsgrad(value, gradient, v, largest, *, learning_rate, amsgrad: bool):
    v = v + gradient**2
    if amsgrad:
        largest = maximum(largest, v)
        value = value - learning_rate * gradient * largest**-0.5
    else:
        value = value - learning_rate * gradient * v**-0.5
    return value, v, largest


ADAM = {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.999}


def arrays_for(rule, size, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(dtype) ** (2 if name in "mv" else 1) for name in rule.arrays]


def expected_by_function(rule, arrays, **settings):
    """The formula as a plain Python function, on whole arrays, scalars rounded first."""
    dtype = arrays[0].dtype.type
    rounded = {k: v if isinstance(v, bool) else dtype(v) for k, v in settings.items()}
    with np.errstate(all="ignore"):
        results = rule.function(*[a.copy() for a in arrays], **rounded)
    return dict(zip(rule.outputs, results if isinstance(results, tuple) else (results,), strict=True))


def assert_bits_equal(actual, expected):
    __tracebackhide__ = True
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("path", PATHS)
def test_two_adam_steps_equal_the_recurrence_in_double_precision(path):
    arrays = [np.array([x], np.float64) for x in (1.0, 0.5, 0.0, 0.0)]
    w, m, v = 1.0, 0.0, 0.0
    for gradient in (0.5, -2.0):
        arrays[1][0] = gradient
        example_adam(*arrays, **ADAM, epsilon=1e-8, path=path)
        m = 0.9 * m + (1 - 0.9) * gradient
        v = 0.999 * v + (1 - 0.999) * gradient * gradient
        w = w - 0.01 * m / (math.sqrt(v) + 1e-8)
    assert [arrays[0][0], arrays[2][0], arrays[3][0]] == [w, m, v]


@pytest.mark.parametrize(("nesterov", "expected"), [(False, [-1.5, 2.5]), (True, [-2.25, 2.5])])
@pytest.mark.parametrize("path", PATHS)
def test_momentum_follows_its_static_option(path, nesterov, expected):
    value, gradient, velocity = (np.array([x], np.float32) for x in (1.0, 2.0, 1.0))
    settings = {"learning_rate": 1.0, "decay": 0.5, "nesterov": nesterov, "path": path}
    example_momentum(value, gradient, velocity, **settings)  # velocity 0.5 + 2
    assert [value[0], velocity[0]] == expected
    assert gradient[0] == 2.0


@pytest.mark.parametrize("path", PATHS)
def test_shrinking_cuts_small_values_to_zero_and_keeps_signs(path):
    value = np.array([3.0, -3.0, 0.5, -0.5, 1.0, 0.0], np.float32)
    example_shrink(value, np.zeros_like(value), learning_rate=1.0, l1=1.0, path=path)
    np.testing.assert_array_equal(value, [2.0, -2.0, 0.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("path", PATHS)
def test_where_can_guard_elements(path):
    value = np.full(4, 5.0, np.float32)
    gradient = np.array([1.0, np.inf, np.nan, 7.0], np.float32)
    settings = {"learning_rate": 1.0, "l1": 0.0, "path": path}
    example_shrink(value, gradient, **settings, guarded=True)
    np.testing.assert_array_equal(value, [4.0, 5.0, 5.0, 5.0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 7, 32_768, 32_769, 100_003])
def test_adam_has_the_bits_of_the_plain_function(path, dtype, size):
    arrays = arrays_for(example_adam, size, dtype)
    expected = expected_by_function(example_adam, arrays, **ADAM)
    example_adam(*arrays, **ADAM, path=path)
    for name, array in zip(example_adam.arrays, arrays, strict=True):
        if name != "gradient":
            assert_bits_equal(array, expected[name])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values_pass_through_without_a_warning(path, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -tiny, 1.0, 3e38], dtype)
    value, gradient = (grid.ravel().copy() for grid in np.meshgrid(special, special))
    velocity = value[::-1].copy()
    settings = {"learning_rate": 0.5, "decay": 0.9, "nesterov": True}
    expected = expected_by_function(example_momentum, [value, gradient, velocity], **settings)
    example_momentum(value, gradient, velocity, **settings, path=path)
    assert_bits_equal(value, expected["value"])
    assert_bits_equal(velocity, expected["velocity"])
    assert np.isnan(value).any()
    assert np.isinf(value).any()
    assert (np.abs(velocity[velocity != 0]) < np.finfo(dtype).tiny).any()


@pytest.mark.parametrize("path", PATHS)
def test_sign_and_maximum_treat_nan_and_tiny_numbers_as_numpy_does(path):
    @elementwise
    def example_signs(value, other, highest, lowest):
        highest = maximum(value, other)
        lowest = -maximum(-value, -other)
        value = sign(value)
        return value, highest, lowest

    special = np.array([np.nan, np.inf, -np.inf, 0.0, 1e-45, -1e-45, 2.5], np.float32)
    value, other = (grid.ravel().copy() for grid in np.meshgrid(special, special))
    highest, lowest = np.empty_like(value), np.empty_like(value)
    signs, highs, lows = np.sign(value), np.maximum(value, other), np.minimum(value, other)
    example_signs(value, other, highest, lowest, path=path)
    assert_bits_equal(value, signs)
    assert_bits_equal(highest, highs)
    assert_bits_equal(lowest, lows)


def test_float16_is_computed_in_float32_and_rounded_once():
    arrays = arrays_for(example_adam, 40_000, np.float16)
    wide = [array.astype(np.float32) for array in arrays]
    example_adam(*wide, **ADAM, path="numpy")
    example_adam(*arrays, **ADAM)
    for array, reference in zip(arrays, wide, strict=True):
        assert_bits_equal(array, reference.astype(np.float16))


def test_scalars_are_rounded_to_the_dtype_of_the_arrays():
    value, gradient, velocity = (
        np.zeros(1, np.float32),
        np.ones(1, np.float32),
        np.zeros(1, np.float32),
    )
    example_momentum(value, gradient, velocity, learning_rate=0.1, decay=0.0)
    assert value[0] == -np.float32(0.1)
    assert value.dtype == np.float32


@pytest.mark.parametrize("path", PATHS)
def test_an_array_that_the_option_does_not_use_can_be_none(path):
    assert example_amsgrad.uses(amsgrad=False) == ("value", "gradient", "v")
    assert example_amsgrad.uses(amsgrad=True) == ("value", "gradient", "v", "largest")
    value, gradient, v = np.array([1.0]), np.array([2.0]), np.array([0.0])
    example_amsgrad(value, gradient, v, None, learning_rate=0.25, amsgrad=False, path=path)
    assert [value[0], v[0]] == [0.75, 4.0]
    with pytest.raises(TypeError, match=r"largest is None, but with {'amsgrad': True}"):
        example_amsgrad(value, gradient, v, None, learning_rate=0.25, amsgrad=True)


@pytest.mark.parametrize("path", PATHS)
def test_returned_arrays_can_change_places(path):
    @elementwise
    def example_rotate(a, b, c, d):
        old = a
        a = b
        b = c
        c = old
        d = old
        return a, b, c, d

    a, b, c, d = (np.full(5, x, np.float32) for x in (1, 2, 3, 4))
    example_rotate(a, b, c, d, path=path)
    assert [a[0], b[0], c[0], d[0]] == [2, 3, 1, 1]
    assert "b0" in example_rotate.python_source("float32", "numpy")  # a circle needs one place more


def test_any_number_of_dimensions_works_and_read_arrays_may_be_strided():
    value = np.ones((3, 4, 5), np.float32)
    gradient = np.arange(120, dtype=np.float32).reshape(3, 4, 10)[..., ::2]
    velocity = np.zeros((3, 4, 5), np.float32)
    example_momentum(value, gradient, velocity, learning_rate=1.0, decay=0.5)
    np.testing.assert_array_equal(velocity, gradient)
    np.testing.assert_array_equal(value, 1 - gradient)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_arrays_are_arrays_too(shape):
    value, gradient, velocity = (np.ones(shape, np.float32) for _ in range(3))
    example_momentum(value, gradient, velocity, learning_rate=1.0, decay=1.0)
    np.testing.assert_array_equal(velocity, np.full(shape, 2.0))
    np.testing.assert_array_equal(value, np.full(shape, -1.0))


@pytest.mark.parametrize("path", PATHS)
def test_rows_change_as_if_they_were_arrays_of_their_own_and_others_stay(path):
    rng = np.random.default_rng(3)
    table, m, v = (rng.random((1000, 3, 50)).astype(np.float32) for _ in range(3))
    indices = rng.permutation(1000)[:400]
    gradient = rng.standard_normal((400, 3, 50)).astype(np.float32)
    expected = expected_by_function(example_adam, [table[indices], gradient, m[indices], v[indices]], **ADAM)
    before = {"value": table.copy(), "m": m.copy(), "v": v.copy()}
    example_adam.rows(indices, table, gradient, m, v, **ADAM, path=path)
    others = np.setdiff1d(np.arange(1000), indices)
    for name, array in (("value", table), ("m", m), ("v", v)):
        assert_bits_equal(array[indices], expected[name])
        assert_bits_equal(array[others], before[name][others])


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_vector_are_its_elements(path):
    table, velocity = np.zeros(5, np.float32), np.zeros(5, np.float32)
    indices = np.array([4, 1], np.int32)
    gradient = np.array([2.0, 3.0], np.float32)
    settings = {"learning_rate": 1.0, "decay": 0.0, "path": path}
    example_momentum.rows(indices, table, gradient, velocity, **settings)
    np.testing.assert_array_equal(table, [0, -3, 0, 0, -2])
    example_momentum.rows(indices[:0], table, gradient[:0], velocity, **settings)
    np.testing.assert_array_equal(velocity, [0, 3, 0, 0, 2])


def test_wrong_rows_are_refused_and_nothing_changes():
    table, velocity = np.zeros((4, 2), np.float32), np.zeros((4, 2), np.float32)
    gradient = np.ones((2, 2), np.float32)

    def update(*indices, dtype=np.int64, gradient=gradient):
        rows = np.array(indices, dtype)
        example_momentum.rows(rows, table, gradient, velocity, learning_rate=1, decay=1)

    with pytest.raises(IndexError, match="index 4 is outside tables of 4 rows"):
        update(0, 4)
    with pytest.raises(IndexError, match="index -1 is outside"):
        update(-1, 0)
    with pytest.raises(ValueError, match="row 3 is named twice"):
        update(3, 3)
    with pytest.raises(TypeError, match="1-D array of integers, got ndarray of float64"):
        update(0, 1, dtype=np.float64)
    with pytest.raises(ValueError, match=r"gradient has shape \(2, 3\), expected \(2, 2\)"):
        update(0, 1, gradient=np.ones((2, 3), np.float32))
    assert not table.any()
    assert not velocity.any()


def test_scalars_can_come_from_a_control_array():
    arrays = arrays_for(example_adam, 1000, np.float32)
    copies = [array.copy() for array in arrays]
    control = np.array([0.01, 0.9, 0.999, 1e-7], np.float32)  # in the order of example_adam.scalars
    example_adam(*arrays, **ADAM)
    example_adam(*copies, control=control)
    for array, copy in zip(arrays, copies, strict=True):
        assert_bits_equal(array, copy)
    with pytest.raises(TypeError, match="learning_rate, beta_1, beta_2 are given by keyword and"):
        example_adam(*arrays, **ADAM, control=control)
    with pytest.raises(ValueError, match=r"as float32 in shape \(4,\), got float64 in \(4,\)"):
        example_adam(*arrays, control=control.astype(np.float64))


def frozen(array):
    array.flags.writeable = False
    return array


F4 = np.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": None}, TypeError, "learning_rate must be a number, got NoneType"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number, got bool"),
        ({"lr": 0.1}, TypeError, r"no scalar or option 'lr' \(given 0.1\); it takes learning_rate"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ({"path": "gpu"}, ValueError, "'auto', 'numpy' or 'numba', got 'gpu'"),
        ({"arrays": 2}, TypeError, r"takes 3 arrays \(value, gradient, velocity\), got 2"),
        (
            {"gradient": [1.0, 2.0]},
            TypeError,
            r"gradient must be a NumPy .* got list: \[1.0, 2.0\]",
        ),
        (
            {"gradient": np.ones(3, F4)},
            ValueError,
            r"gradient has shape \(3,\), but value has \(2,\)",
        ),
        ({"gradient": np.ones(2)}, ValueError, "gradient is float64, but value is float32"),
        ({"velocity": np.ones(4, F4)[::2]}, ValueError, r"velocity is updated .* strides \(8,\)"),
        ({"velocity": frozen(np.ones(2, F4))}, ValueError, "velocity is .* read-only"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_with_its_value(change, error, message):
    arrays = {name: np.ones(2, np.float32) for name in example_momentum.arrays}
    arrays |= {name: change.pop(name) for name in example_momentum.arrays if name in change}
    chosen = list(arrays.values())[: change.pop("arrays", 3)]
    with pytest.raises(error, match=message):
        example_momentum(*chosen, **{"learning_rate": 0.1, "decay": 0.9, **change})


def test_missing_scalars_integers_and_shared_memory_are_refused():
    one = np.ones(2, np.float32)
    with pytest.raises(TypeError, match=r"needs learning_rate by keyword; given: {'decay': 1}"):
        example_momentum(one, one.copy(), one.copy(), decay=1)
    with pytest.raises(ValueError, match="value and gradient share memory"):
        example_momentum(one, one, one.copy(), learning_rate=1, decay=1)
    whole = [np.ones(2, np.int32) for _ in range(3)]
    with pytest.raises(ValueError, match="must be float16, float32, float64, got int32"):
        example_momentum(*whole, learning_rate=1, decay=1)


def test_a_read_only_gradient_is_fine():
    for path in PATHS:
        value, velocity = np.ones(2, np.float32), np.ones(2, np.float32)
        gradient = frozen(np.ones(2, np.float32))
        example_momentum(value, gradient, velocity, learning_rate=1, decay=1, path=path)
        np.testing.assert_array_equal(velocity, [2.0, 2.0])


def define(folder, text, name="formula"):
    """Import a module with the given text, as if it had been written by hand."""
    number = len(list(folder.iterdir()))
    path = folder / f"formulas_{number}.py"
    path.write_text("from distopt.elementwise import *\n\n" + textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        elementwise.registry.pop(name, None)
    return getattr(module, name)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("for i in range(3): a = a + 1", r"'for i in range\(3\):' \(For\) isn't allowed"),
        ("a = a if a > 0 else 0.0", "condition 'a > 0' isn't made of static options nesterov; "),
        ("a = a + unknown", "the name 'unknown' has no value here; known are a, b, rate"),
        ("a = a * nesterov", "the static option 'nesterov' can't be used as a number"),
        ("a = a * (a > 0)", r"'a \* \(a > 0\)' needs a number where it has a comparison"),
        ("a = where(b, a, b)", r"'where\(b, a, b\)' needs a comparison where it has a number"),
        ("a = a ** b", r"the exponent in 'a \*\* b' differs from element to element"),
        ("a = sum(a)", r"'sum\(a\)' \(Call\) isn't allowed; .* calls of abs, exp"),
        ("a = sqrt(a, b)", "sqrt takes 1 arguments, got 2"),
        ("a = a[0]", r"'a\[0\]' \(Subscript\) isn't allowed"),
        ("a = a @ b", r"'a @ b' \(BinOp\) isn't allowed"),
        ("a = 0 < a < 1", r"'0 < a < 1' \(Compare\) isn't allowed"),
        ("a = a / (1 - 1) * (1 / 0)", "'1 / 0' divides by zero"),
        ("a = a * 1e999", "'1e309' is inf; a constant must be finite"),
        ("a, b = b, a", r"'a, b = \(?b, a\)?' \(Assign\) isn't allowed"),
        ("sqrt = a", "'sqrt' is a function and can't be assigned"),
        ("nesterov = a", "'nesterov' is a static option and can't be assigned"),
        ("a = 'text'", r"\(Constant\) isn't allowed"),
        ("a = a > 0", "'a' was set to a comparison; use where"),
        ("return rate", "'return rate' must give back, once each"),
        ("return a, a", r"'return \(a, a\)' must give back, once each"),
        ("return", "'return' must give back"),
    ],
)
def test_a_formula_that_cant_be_generated_names_line_and_construct(tmp_path, line, problem):
    text = f"""
        @elementwise
        def formula(a, b, *, rate, nesterov: bool = False):
            b = b + rate
            {line}
            return a
    """
    with pytest.raises(SyntaxError, match=problem) as caught:
        define(tmp_path, text)
    wanted = 8 if "set to a comparison" in problem else 7
    assert str(caught.value).endswith(f"(formulas_0.py, line {wanted})")
    assert caught.value.text.strip() == ("return a" if wanted == 8 else line)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def formula(a):\n    a = a + 1", "it has no return statement"),
        ("def formula(a):\n    return a", "it changes no array"),
        ("def formula(*a):\n    return a", r"'\*a' isn't allowed"),
        ("def formula(*, rate):\n    return rate", "it has no arrays"),
        ("def formula(a=1):\n    return a", "an array can't have a default value"),
        ("def formula(a, *, b='x'):\n    return a", "default \"'x'\" must be a number"),
        ("def formula(a, *, b: bool = 0):\n    return a", "default '0' must be True or False"),
        ("def formula(a, *, path):\n    return a", "a parameter can't be named 'path'"),
        (
            "def formula(a, b, *, c: bool):\n    a = b + 1\n    if c:\n        return a\n"
            "    b = a + 1\n    return b",
            "the options change which arrays are returned",
        ),
    ],
)
def test_a_wrong_signature_is_refused(tmp_path, text, problem):
    with pytest.raises(SyntaxError, match=problem):
        define(tmp_path, "@elementwise\n" + text)


def test_a_function_without_source_is_refused():
    scope = {}
    exec("def formula(a):\n    a = a + 1\n    return a", scope)
    with pytest.raises(ValueError, match="the source of 'formula' can't be read"):
        elementwise(scope["formula"])


def test_the_registry_knows_each_rule_once(tmp_path):
    assert elementwise.registry["example_adam"] is example_adam
    text = "@elementwise\ndef example_adam(a):\n    a = a + 1\n    return a"
    with pytest.raises(ValueError, match="there is a rule 'example_adam' in test_elementwise"):
        define(tmp_path, text)
    assert elementwise.registry["example_adam"] is example_adam


def test_a_rule_describes_itself():
    rule = example_momentum
    assert (rule.name, rule.arrays) == ("example_momentum", ("value", "gradient", "velocity"))
    assert (rule.scalars, rule.options) == (("learning_rate", "decay"), ("nesterov",))
    assert (rule.outputs, rule.defaults) == (("value", "velocity"), {"nesterov": False})
    assert example_adam.__doc__.startswith("m = b1 m")
    assert repr(rule) == "<elementwise rule example_momentum(value, gradient, velocity)>"


def random_formula(rng):
    """Write a formula of random operations over four arrays, some scalars and what came before."""
    numbers = ["a", "b", "c", "d", "rate", "decay", "low"]
    lines = []
    for step in range(rng.randint(2, 12)):
        x, y, z = (rng.choice(numbers) for _ in range(3))
        choices = [f"{x} {operator} {y}" for operator in "+-*/"] + [
            f"-{x}",
            f"sqrt(abs({x}))",
            f"sign({x})",
            f"maximum({x}, {y}) + minimum({x}, {z})",
            f"where({x} > {y}, {y}, {z})",
            f"where(({x} <= {y}) & ~isnan({z}) | isfinite({x}), {z}, {x} * {z})",
            f"{x}**2 - {y}",
            f"({x} + {y}) * ({x} + {y}) + {z}**-1",
        ]
        target = rng.choice(["a", "b", "c", "d", f"t{step}"])
        lines.append(f"{target} = {rng.choice(choices)}")
        numbers.append(target)
    lines += ["a = a + 0.25", "c = c - b"]  # so that something changes, whatever came before
    returned = rng.sample(["b", "d"], rng.randint(0, 2))
    body = "\n    ".join([*lines, f"return {', '.join(['a', 'c', *returned])}"])
    return f"@elementwise\ndef formula(a, b, c, d, *, rate, decay, low=-2.0):\n    {body}\n"


def check_random_formula(rule, dtype, path):
    size = 33_000  # one block and a bit
    arrays = [np.random.default_rng(n).standard_normal(size).astype(dtype) for n in range(4)]
    arrays[0][:7] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 1e-40]
    arrays[1][3:10] = [np.nan, 0.0, -0.0, np.inf, 0.0, 1e-40, -np.inf]
    given = {name: arrays["abcd".index(name)].copy() for name in rule.arrays}
    expected = expected_by_function(rule, list(given.values()), rate=0.1, decay=1.5, low=-2.0)
    rule(*given.values(), rate=0.1, decay=1.5, path=path)
    for name, array in given.items():
        wanted = np.asarray(expected.get(name, arrays["abcd".index(name)]), dtype)
        assert_bits_equal(array, np.broadcast_to(wanted, size))


@pytest.mark.parametrize("seed", range(60))
def test_random_formulas_have_the_bits_of_the_plain_function_in_numpy(tmp_path, seed):
    rule = define(tmp_path, random_formula(random.Random(seed)))
    check_random_formula(rule, np.dtype(["float32", "float64"][seed % 2]), "numpy")


@pytest.mark.parametrize("seed", range(100, 106))
def test_random_formulas_have_the_bits_of_the_plain_function_in_numba(tmp_path, seed):
    pytest.importorskip("numba")
    rule = define(tmp_path, random_formula(random.Random(seed)))
    check_random_formula(rule, np.dtype(["float32", "float64"][seed % 2]), "numba")


@pytest.mark.parametrize("path", PATHS)
def test_exp_log_and_general_powers_are_close_to_double_precision(path):
    @elementwise
    def example_curve(value, other, *, power):
        other = exp(-abs(value)) * log(other) + other**power + value**4 - value**3
        return (other,)

    value = np.linspace(-3, 3, 1001).astype(np.float32)
    other = np.linspace(0.1, 5, 1001).astype(np.float32)
    x, y = value.astype(np.float64), other.astype(np.float64)
    example_curve(value, other, power=-0.3, path=path)
    expected = np.exp(-np.abs(x)) * np.log(y) + y**-0.3 + x**4 - x**3
    np.testing.assert_allclose(other, expected, rtol=3e-6, atol=3e-7)
    assert not example_curve.formula().exact


def test_numba_is_taken_from_a_size_on_and_can_be_switched_off(monkeypatch):
    pytest.importorskip("numba")

    @elementwise
    def example_decay(value, *, rate):
        value *= rate
        return value

    formula, f4 = example_decay.formula(), np.dtype(np.float32)
    example_decay(np.ones(1000, f4), rate=0.5)
    assert not jitted.is_compiled(formula, f4)
    monkeypatch.setenv("DISTOPT_NUMBA", "0")
    example_decay(np.ones(300_000, f4), rate=0.5)
    assert not jitted.is_compiled(formula, f4)
    with pytest.raises(ValueError, match="'numba' can't run on float32: numba is missing, broken"):
        example_decay(np.ones(10, f4), rate=0.5, path="numba")
    monkeypatch.delenv("DISTOPT_NUMBA")
    value = np.ones(300_000, f4)
    example_decay(value, rate=0.5)
    assert jitted.is_compiled(formula, f4)
    assert value.min() == value.max() == 0.5


def test_blocked_numpy_allocates_no_arrays_after_the_first_call():
    arrays = arrays_for(example_adam, 500_000, np.float32)
    example_adam(*arrays, **ADAM, path="numpy")
    tracemalloc.start()
    example_adam(*arrays, **ADAM, path="numpy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000  # one block is 131,072 bytes


@pytest.mark.parametrize("path", PATHS)
def test_threads_can_apply_one_rule_at_a_time_each(path):
    groups = [arrays_for(example_adam, 200_000, np.float32, seed) for seed in range(4)]
    expected = [expected_by_function(example_adam, arrays, **ADAM) for arrays in groups]

    def apply(arrays):
        example_adam(*arrays, **ADAM, path=path)

    threads = [threading.Thread(target=apply, args=(arrays,)) for arrays in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for arrays, wanted in zip(groups, expected, strict=True):
        assert_bits_equal(arrays[0], wanted["value"])


def test_importing_loads_neither_numba_nor_cupy():
    code = "import sys, distopt.elementwise; print([m for m in ('numba', 'cupy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
