"""Every primitive's second derivative against differences of the first, in float64, by introspection."""

import numpy as np
import pytest
from ops_cases import CASES

from distopt import ops
from distopt.ops.composed_stages import composed_stage
from distopt.ops.kernels.pooling import MaxPool
from distopt.regularizers import Regularizer, l1_regularizer, l2_regularizer, sum_regularizer
from distopt.tape import GradientTape, Tensor, primitive, primitives
from distopt.variables import IndexedSlices, Variable, value_of

_ALL = [
    pytest.param(name, inputs, options, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, (inputs, options) in enumerate(cases)
]


@pytest.mark.parametrize(("name", "inputs", "options"), _ALL)
def test_second_derivative_agrees_with_differences_of_the_first(name, inputs, options):
    random = np.random.default_rng(2)
    operands = [Variable(i) if isinstance(i, np.ndarray) else i for i in inputs]
    variables = [o for o in operands if isinstance(o, Variable)]
    weights = random.standard_normal(primitives[name](*operands, **options).shape)
    directions = [random.standard_normal(v.shape) for v in variables]

    with GradientTape() as outer:
        with GradientTape() as inner:
            output = primitives[name](*operands, **options)
            # A curved loss, so that linear primitives have second derivatives too.
            loss = ops.reduce_sum(weights * output * output)
        first = inner.gradient(loss, variables)
    _assert_close(first, _first(name, operands, options, variables, weights))
    second = outer.gradient(
        first, variables, [_of_rows(f, d) for f, d in zip(first, directions, strict=True)]
    )

    for variable, found in zip(variables, second, strict=True):
        step = random.standard_normal(variable.shape)
        expected = _difference(name, operands, options, variable, step, directions, weights)
        assert float(np.sum(_dense(found, variable) * step)) == pytest.approx(expected, rel=2e-6, abs=2e-7)


def _first(name, operands, options, variables, weights):
    with GradientTape() as tape:
        output = primitives[name](*operands, **options)
    return tape.gradient(output, variables, [2 * weights * output.value])


def _difference(name, operands, options, variable, step, directions, weights, size=1e-5):
    variables = [o for o in operands if isinstance(o, Variable)]
    start = variable.numpy()
    values = []
    for sign in (1, -1):
        variable.assign(start + sign * size * step)
        found = _first(name, operands, options, variables, weights)
        values.append(
            sum(np.sum(_dense(g, v) * d) for g, v, d in zip(found, variables, directions, strict=True))
        )
    variable.assign(start)
    return float(values[0] - values[1]) / (2 * size)


def _dense(gradient, variable):
    gradient = value_of(gradient)
    if gradient is None:
        return np.zeros(variable.shape)
    return gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient


def _of_rows(gradient, direction):
    """Return the direction for the rows that a gradient has."""
    return direction[gradient.indices] if isinstance(gradient, IndexedSlices) else direction


def _assert_close(found, expected):
    for one, other in zip(found, expected, strict=True):
        one, other = (g.to_dense() if isinstance(g, IndexedSlices) else g for g in (value_of(one), other))
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, p in primitives.items() if p.composition is not None])
def test_a_composed_form_computes_what_the_primitive_computes(name):
    for inputs, options in CASES[name]:
        composed = primitives[name].composition(*(i if i is None else Tensor(i) for i in inputs), **options)
        expected = primitives[name](*inputs, **options).numpy()
        assert composed.shape == expected.shape
        np.testing.assert_allclose(composed.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power", [2, 2.0, 3.0])
def test_all_derivatives_of_a_power_are_finite_at_zero(power):
    x = Variable(0.0)
    with GradientTape(persistent=True) as tape:
        y, found = x**power, []
        for _ in range(3):
            y = tape.gradient(y, x)
            found.append(float(y))
    assert found == ([0.0, 2.0, 0.0] if power == 2 else [0.0, 0.0, 6.0])


def test_one_operand_in_two_places_of_a_composed_primitive():
    x = Variable(np.array([[1.0, 2.0], [3.0, 4.0]]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = ops.reduce_sum(ops.dense(x, x, np.zeros(2)))
        dy = inner.gradient(y, x)
    # y = sum of x @ x, so dy/dx[i, j] = sum of row j + sum of column i, and the sum of that is 4 sum(x).
    assert value_of(dy).tolist() == [[7.0, 11.0], [9.0, 13.0]]
    assert outer.gradient(dy, x).tolist() == [[4.0, 4.0], [4.0, 4.0]]


def test_second_derivative_of_a_sum_of_regularizers():
    x = Variable(np.array([1.0, -2.0]))
    regularizer = sum_regularizer([l1_regularizer(0.5), l2_regularizer(0.25)])
    with GradientTape() as outer:
        with GradientTape() as inner:
            penalty = ops.regularization_loss(x, regularizer=regularizer)
        first = inner.gradient(penalty, x)
    assert value_of(first).tolist() == [0.75, -1.0]
    assert outer.gradient(first, x).tolist() == [0.25, 0.25]


def test_a_regularizer_of_ones_own_is_named_where_its_second_derivative_is_not_known():
    class Cubes(Regularizer):
        def loss(self, value):
            return (value**3).sum()

        def gradient(self, value, out=None):
            return 3 * value**2

        def get_config(self):
            return {}

    x = Variable(2.0)
    with GradientTape():
        with GradientTape() as inner:
            penalty = ops.regularization_loss(x, regularizer=Cubes())
        with pytest.raises(TypeError, match="not for Cubes; write its penalty"):
            inner.gradient(penalty, x)


def test_a_stage_of_ones_own_is_named_where_its_second_derivative_is_not_known():
    class Own:
        pass

    with pytest.raises(TypeError, match="through the stage Own need its composed form: register"):
        composed_stage(Own(), np.zeros((1, 2, 2, 1)), ())
    with pytest.raises(TypeError, match="the stage type"):
        composed_stage(MaxPool, np.zeros((1, 2, 2, 1)), ())


@pytest.fixture
def own_primitive():
    """Make primitives that leave the registry after the test."""
    before = set(primitives)
    yield primitive
    for name in set(primitives) - before:
        del primitives[name]


def test_a_formula_for_arrays_alone_is_named_when_a_second_derivative_is_asked_for(own_primitive):
    @own_primitive
    def sine(context, x):
        return np.sin(x)

    @sine.gradient
    def _(context, upstream):
        return (upstream * np.cos(context.inputs[0]),)

    x = Variable(np.array([0.5]))
    with GradientTape() as tape:
        y = sine(x)
    assert tape.gradient(y, x) == pytest.approx([np.cos(0.5)])
    with GradientTape(), GradientTape() as inner:
        y = sine(x)
        with pytest.raises(TypeError, match="the gradient of primitive 'sine' can't be differentiated again"):
            inner.gradient(y, x)


@pytest.mark.parametrize("convert", [np.asarray, lambda x: np.where(True, x, 0)])
def test_a_formula_that_would_lose_the_second_derivative_in_silence_is_refused(own_primitive, convert):
    @own_primitive
    def doubled(context, x):
        return 2 * x

    @doubled.gradient
    def _(context, upstream):
        return (2 * convert(upstream),)

    x = Variable(np.array([0.5]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = ops.square(doubled(x))
        with pytest.raises(TypeError, match="'doubled' makes a NumPy array of a Tensor"):
            inner.gradient(y, x)
    assert np.asarray(y).tolist() == [1.0]
    assert outer.gradient(y, x).tolist() == [4.0]


def test_a_primitive_of_ones_own_with_a_composed_form_has_second_derivatives(own_primitive):
    @own_primitive
    def cube(context, x):
        return np.power(x, 3)

    @cube.gradient
    def _(context, upstream):
        return (3 * upstream * np.square(context.inputs[0]),)

    @cube.composed
    def _(x):
        return x * x * x

    x = Variable(np.array([2.0]))
    with GradientTape() as outer:
        with GradientTape() as inner:
            y = cube(x)
        dy = inner.gradient(y, x)
    assert dy.numpy().tolist() == [12.0]
    assert outer.gradient(dy, x).tolist() == [12.0]


def test_without_an_outer_tape_the_formula_computes_with_arrays(own_primitive):
    seen = []

    @own_primitive
    def seeing(context, x):
        return x * x

    @seeing.gradient
    def _(context, upstream):
        seen.append((type(upstream), type(context.inputs[0]), type(context.output)))
        return (2 * upstream * context.inputs[0],)

    x = Variable(np.array([2.0]))
    with GradientTape() as tape:
        y = seeing(x)
        assert type(tape.gradient(y, x)) is np.ndarray
    with GradientTape(watch_accessed_variables=False), GradientTape() as inner:
        y = seeing(x)
        assert type(inner.gradient(y, x)) is np.ndarray
    with GradientTape(), GradientTape() as inner:
        y = seeing(x)
        assert type(next(inner.gradients(y, [x]))[0]) is np.ndarray
    assert seen == [(np.ndarray, np.ndarray, np.ndarray)] * 3
