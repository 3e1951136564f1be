"""Muon against NumPy's singular values and an independent computation."""

import numpy as np
import pytest

from distopt.optimizers import AdamW, Muon
from distopt.optimizers.muon import orthogonalized
from distopt.variables import Arena, IndexedSlices, Variable

RANDOM = np.random.default_rng(3)


def matrix(rows, columns, smallest=0.05):
    """A matrix whose singular values lie between `smallest` and 1, and its U V^T."""
    u, _, vt = np.linalg.svd(RANDOM.standard_normal((rows, columns)), full_matrices=False)
    return u * np.linspace(1.0, smallest, min(rows, columns)) @ vt, u @ vt


def by_svd(d):
    """Newton-Schulz on the singular values: the matrix polynomial is one of them alone."""
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    s = s / (np.sqrt((d**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt


SHAPES = [(8, 8), (40, 12), (12, 40), (1, 9), (9, 1), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_five_steps_bring_singular_values_near_one(shape, scale):
    given, exact = matrix(*shape)
    ours = orthogonalized((scale * given).astype("f4"))
    assert ours.shape == shape
    assert ours.dtype == np.float32
    values = np.linalg.svd(ours, compute_uv=False)
    assert values.min() > 0.67
    assert values.max() < 1.21
    # The directions are those of U V^T: with the same sizes the inner product would be the rank.
    assert (ours * exact).sum() / min(shape) == pytest.approx(values.mean(), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_is_that_of_the_singular_values(shape):
    given, _ = matrix(*shape)
    np.testing.assert_allclose(orthogonalized(given), by_svd(given), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(orthogonalized(given.astype("f4")), by_svd(given), rtol=2e-3, atol=2e-4)


def test_orthogonalising_leaves_its_argument_and_zeros_alone():
    given = np.eye(3, dtype="f4") * 2
    orthogonalized(given)
    assert given.tolist() == (np.eye(3) * 2).tolist()
    assert orthogonalized(np.zeros((3, 2), "f4")).tolist() == np.zeros((3, 2)).tolist()
    assert orthogonalized(np.zeros((0, 2), "f4")).shape == (0, 2)


def test_a_transpose_is_orthogonalised_to_the_transpose():
    given, _ = matrix(10, 4)
    np.testing.assert_array_equal(orthogonalized(given.T), orthogonalized(given).T)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("scale", "factor"), [("original", 3**0.5), ("match_rms_adamw", 0.2 * 12**0.5), ("none", 1.0)]
)
def test_matrices_follow_the_recurrence(nesterov, scale, factor):
    start, _ = matrix(4, 12)
    w = Variable(start, name="kernel")
    optimizer = Muon(0.02, 0.9, nesterov=nesterov, weight_decay=0.5, scale=scale)
    expected, m = start, np.zeros((4, 12))
    for _ in range(3):
        gradient = RANDOM.standard_normal((4, 12))
        optimizer.apply_gradients([(gradient, w)])
        m = 0.9 * m + gradient
        step = by_svd(gradient + 0.9 * m if nesterov else m)
        expected = expected - 0.02 * 0.5 * expected - 0.02 * factor * step
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(optimizer.get_slot(w, "m").numpy(), m, rtol=1e-12)
    assert optimizer.get_slot_names() == ["m"]


def test_only_more_outputs_than_inputs_enlarge_the_original_scale():
    for shape, factor in (((2, 8), 2.0), ((8, 2), 1.0)):
        w = Variable(np.zeros(shape))
        gradient, _ = matrix(*shape)
        Muon(1.0).apply_gradients([(gradient, w)])
        np.testing.assert_allclose(w.numpy(), -factor * by_svd(gradient), rtol=2e-6)


def test_kernels_of_convolutions_are_matrices_of_outputs_by_the_last_axis():
    gradient, _ = matrix(18, 5)
    kernel, flat = Variable(np.zeros((3, 3, 2, 5))), Variable(np.zeros((18, 5)))
    Muon(0.1).apply_gradients([(gradient.reshape(3, 3, 2, 5), kernel), (gradient, flat)])
    np.testing.assert_array_equal(kernel.numpy().reshape(18, 5), flat.numpy())
    values = np.linalg.svd(kernel.numpy().reshape(18, 5) / 0.1, compute_uv=False)
    assert 0.67 < values.min() < values.max() < 1.21


@pytest.mark.parametrize(
    "exclude", [["^embed", "logits"], lambda v: v.name in ("embedding", "logits/kernel")]
)
@pytest.mark.parametrize("arena", [False, True])
def test_other_variables_are_adamws(exclude, arena):
    shapes = {"embedding": (6, 4), "kernel": (4, 4), "bias": (4,), "gain": (), "logits/kernel": (4, 3)}
    starts = {name: RANDOM.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    variables = {name: Variable(start, name=name) for name, start in starts.items()}
    twins = {name: Variable(start, name=name) for name, start in starts.items()}
    if arena:
        Arena(list(variables.values()))
    muon = Muon(0.02, weight_decay=0.1, adam_learning_rate=0.01, exclude=exclude)
    adamw = AdamW(0.01, 0.1, beta_2=0.95)
    for _ in range(3):
        gradients = {name: RANDOM.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
        muon.apply_gradients([(gradients[name], v) for name, v in variables.items()])
        adamw.apply_gradients([(gradients[name], v) for name, v in twins.items()])
    for name in shapes:
        same = (variables[name].numpy() == twins[name].numpy()).all()
        assert same == (name != "kernel"), name
    assert [muon.orthogonalizes(v) for v in variables.values()] == [False, True, False, False, False]
    with pytest.raises(KeyError, match="no slot 'v' for variable 'kernel'"):
        muon.get_slot(variables["kernel"], "v")


def test_the_rates_are_set_and_scheduled_apart():
    kernel, bias = Variable(np.zeros((2, 2)), name="kernel"), Variable(np.zeros(2), name="bias")
    optimizer = Muon(1.0, adam_learning_rate=lambda: 0.5)
    optimizer.learning_rate = 0.0
    optimizer.apply_gradients([(np.eye(2), kernel), (np.ones(2), bias)])
    assert kernel.numpy().tolist() == [[0, 0], [0, 0]]
    np.testing.assert_allclose(bias.numpy(), -0.5, rtol=1e-5)


def test_what_is_excluded_from_decay_does_not_decay():
    names = ["a/kernel", "b/kernel", "a/bias", "b/bias"]
    variables = [Variable(np.full((2, 2) if "k" in n else (2,), 8.0), name=n) for n in names]
    optimizer = Muon(0.5, weight_decay=0.5, adam_learning_rate=0.25, exclude_from_weight_decay=["^b"])
    optimizer.apply_gradients([(np.zeros(v.shape), v) for v in variables])
    assert [v.numpy().ravel()[0] for v in variables] == [6.0, 8.0, 7.0, 8.0]


def test_slices_are_the_dense_gradient_with_zeros():
    sparse, dense = Variable(np.ones((4, 3))), Variable(np.ones((4, 3)))
    gradient = np.zeros((4, 3))
    gradient[1] = [2.0, 4.0, -2.0]
    Muon(0.1).apply_gradients([(IndexedSlices([[1, 2, -1.0]] * 2, [1, 1], (4, 3)), sparse)])
    Muon(0.1).apply_gradients([(gradient, dense)])
    np.testing.assert_array_equal(sparse.numpy(), dense.numpy())
    assert sparse.numpy()[0].tolist() == [1.0, 1.0, 1.0]


def test_the_slots_of_an_arena_hold_m_of_both_kinds():
    variables = [Variable(np.zeros((2, 2), "f4"), name="kernel"), Variable(np.zeros(3, "f4"), name="bias")]
    Arena(variables)
    optimizer = Muon(0.1)
    optimizer.apply_gradients([(np.eye(2, dtype="f4"), variables[0]), (np.ones(3, "f4"), variables[1])])
    assert sorted(optimizer.state()) == ["bias/m", "bias/v", "iterations", "kernel/m"]
    np.testing.assert_array_equal(optimizer.state()["kernel/m"], np.eye(2))
    np.testing.assert_allclose(optimizer.state()["bias/m"], 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Muon(momentum=1.5), ValueError, r"between \[0, 1\], got 1.5"),
        (lambda: Muon(adam_beta_1=1.0), ValueError, r"beta_1 must be in \[0, 1\), got 1.0"),
        (lambda: Muon(adam_learning_rate=-1), ValueError, "adam_learning_rate must not be negative"),
        (lambda: Muon(scale="big"), ValueError, "scale must be one of 'original'.* got 'big'"),
        (lambda: Muon(ns_steps=0), ValueError, "ns_steps must be 1 or more, got 0"),
        (lambda: Muon(exclude="bias"), TypeError, "exclude must be a list of regular .* got 'bias'"),
        (lambda: Muon(decay=0.1), TypeError, "Unexpected keyword argument .* decay"),
        (lambda: Muon(exclude=lambda v: True).get_config(), TypeError, "give regular expressions"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
