"""Every primitive's gradient against finite differences, in float64, found by introspection."""

import numpy as np
import pytest
from ops_cases import CASES

import distopt.ops  # noqa: F401  (fills the registry)
from distopt.tape import GradientTape, primitives
from distopt.variables import IndexedSlices, Variable

_ALL = [
    pytest.param(name, inputs, options, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, (inputs, options) in enumerate(cases)
]


def test_every_primitive_has_a_case():
    library = {name for name, p in primitives.items() if p.__module__.startswith("distopt.")}
    assert library == set(CASES)


def test_every_primitive_has_a_gradient():
    assert [name for name, primitive in primitives.items() if primitive.backward is None] == []


@pytest.mark.parametrize(("name", "inputs", "options"), _ALL)
def test_gradient_agrees_with_finite_differences(name, inputs, options):
    random = np.random.default_rng(1)
    operands = [Variable(i) if isinstance(i, np.ndarray) else i for i in inputs]
    variables = [o for o in operands if isinstance(o, Variable)]
    with GradientTape() as tape:
        output = primitives[name](*operands, **options)
    weights = random.standard_normal(output.shape)  # one random projection checks all outputs
    gradients = tape.gradient(output, variables, output_gradients=[weights])

    for variable, gradient in zip(variables, gradients, strict=True):
        dense = gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient
        assert np.shape(dense) == variable.shape
        direction = random.standard_normal(variable.shape)
        expected = _directional_derivative(name, operands, options, variable, direction, weights)
        found = float(np.sum(dense * direction))
        assert found == pytest.approx(expected, rel=2e-6, abs=2e-7)


def _directional_derivative(name, operands, options, variable, direction, weights, step=1e-5):
    start = variable.numpy()
    values = []
    for sign in (1, -1):
        variable.assign(start + sign * step * direction)
        values.append(float(np.sum(weights * primitives[name](*operands, **options).numpy())))
    variable.assign(start)
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize(("name", "inputs", "options"), _ALL)
def test_gradient_written_into_an_arena_is_the_same(name, inputs, options):
    from distopt.variables import Arena

    operands = [Variable(i, name=f"v{n}") if isinstance(i, np.ndarray) else i for n, i in enumerate(inputs)]
    variables = [o for o in operands if isinstance(o, Variable)]
    with GradientTape(persistent=True) as tape:
        output = primitives[name](*operands, **options)
    separate = tape.gradient(output, variables)
    Arena(variables)
    with GradientTape() as tape:
        output = primitives[name](*operands, **options)
    streamed = {id(v): g for g, v in tape.gradients(output, variables)}

    for variable, gradient in zip(variables, separate, strict=True):
        if isinstance(gradient, IndexedSlices):  # rows stay rows
            rows = streamed[id(variable)]
            np.testing.assert_allclose(rows.to_dense(), gradient.to_dense(), rtol=1e-12, atol=1e-12)
            continue
        assert streamed[id(variable)] is variable.gradient
        np.testing.assert_allclose(variable.gradient, gradient, rtol=1e-12, atol=1e-12)
