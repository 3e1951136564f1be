"""LAMB and LARS: rates by layer, from norms."""

import numpy as np
import pytest

from distopt.elementwise import elementwise
from distopt.optimizers import LAMB, LARS, Muon, contrib, layerwise
from distopt.schedules import PiecewiseConstantDecay
from distopt.variables import Arena, IndexedSlices, Variable


def lamb(w, gradients, lr=0.1, b1=0.9, b2=0.999, eps=1e-6, wd=0.0, adapts=True):
    """The recurrence of section 1.5, in float64."""
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + wd * w
        norms = np.linalg.norm(w), np.linalg.norm(u)
        ratio = norms[0] / norms[1] if adapts and min(norms) > 0 else 1.0
        w = w - lr * ratio * u
    return w


def lars(w, gradients, lr=0.1, mu=0.9, wd=1e-4, eeta=0.001, eps=0.0, nesterov=False):
    a = np.zeros_like(w)
    for g in gradients:
        norms = np.linalg.norm(w), np.linalg.norm(g)
        trust = eeta * norms[0] / (norms[1] + wd * norms[0] + eps) if min(norms) > 0 else 1.0
        step = lr * trust * (g + wd * w)
        a = mu * a + step
        w = w - (step + mu * a if nesterov else a)
    return w


def trained(optimizer, start, gradients, name="w"):
    w = Variable(start, name=name)
    for gradient in gradients:
        optimizer.apply_gradients([(gradient, w)])
    return w.numpy()


RANDOM = np.random.default_rng(8)
START = RANDOM.standard_normal((4, 3))
GRADIENTS = RANDOM.standard_normal((5, 4, 3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", [{}, {"wd": 0.1}, {"eps": 0.5, "lr": 0.01, "b1": 0.5, "b2": 0.75}])
def test_lamb_follows_its_recurrence(settings, dtype):
    names = {"lr": "learning_rate", "b1": "beta_1", "b2": "beta_2", "eps": "epsilon", "wd": "weight_decay"}
    optimizer = LAMB(**{"learning_rate": 0.1, **{names[key]: value for key, value in settings.items()}})
    ours = trained(optimizer, START.astype(dtype), GRADIENTS.astype(dtype))
    assert ours.dtype == dtype
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(ours, lamb(START, GRADIENTS, **settings), tolerance, tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"wd": 0.1, "eeta": 0.5}, {"eps": 2.0, "nesterov": True, "mu": 0.5}]
)
def test_lars_follows_its_recurrence(settings, dtype):
    names = {"mu": "momentum", "eps": "epsilon", "wd": "weight_decay"}
    optimizer = LARS(0.1, **{names.get(key, key): value for key, value in settings.items()})
    ours = trained(optimizer, START.astype(dtype), GRADIENTS.astype(dtype))
    assert ours.dtype == dtype
    tolerance = 2e-5 if dtype == np.float32 else 1e-12
    np.testing.assert_allclose(ours, lars(START, GRADIENTS, **settings), tolerance, tolerance)


def test_lamb_has_epsilon_beside_the_corrected_root():
    # First step: m^ = g, sqrt(v^) = |g|, so u = 2 / (2 + 2) whatever the betas; ratio = 4 / 0.5.
    w = trained(LAMB(0.25, 0.9, 0.999, epsilon=2.0), np.array([4.0]), [np.array([2.0])])
    assert w[0] == pytest.approx(4.0 - 0.25 * 8.0 * 0.5, rel=1e-7)


def test_lambs_decay_is_a_part_of_the_direction():
    # u = 1 + 0.5*4 = 3 (epsilon 0), ratio = 4/3: the step is lr * |w| whatever the decay.
    w = trained(LAMB(0.25, epsilon=0, weight_decay=0.5), np.array([4.0]), [np.array([2.0])])
    assert w[0] == pytest.approx(3.0, rel=1e-7)
    # Without the layer's rate: 4 - 0.25 * 3
    optimizer = LAMB(0.25, epsilon=0, weight_decay=0.5, exclude_from_layer_adaptation=["w"])
    assert trained(optimizer, np.array([4.0]), [np.array([2.0])])[0] == pytest.approx(3.25, rel=1e-7)


@pytest.mark.parametrize(
    ("settings", "decays", "adapts"),
    [
        ({"exclude_from_weight_decay": ["b"]}, False, False),  # the other list is this one
        ({"exclude_from_weight_decay": ["b"], "exclude_from_layer_adaptation": []}, False, True),
        ({"exclude_from_layer_adaptation": ["^e"]}, True, False),
        ({"exclude_from_weight_decay": ["^b"]}, True, True),
    ],
)
def test_lambs_exclusions_are_searches_in_names(settings, decays, adapts):
    ours = trained(LAMB(0.1, weight_decay=0.5, **settings), START, GRADIENTS, name="emb")
    expected = lamb(START, GRADIENTS, wd=0.5 if decays else 0.0, adapts=adapts)
    np.testing.assert_allclose(ours, expected, 1e-12, 1e-12)


@pytest.mark.parametrize("optimizer", [lambda: LAMB(0.5, epsilon=0), lambda: LARS(0.5, eeta=0.1)])
def test_weights_of_norm_zero_move_with_the_plain_rate(optimizer):
    w = trained(optimizer(), np.zeros(2), [np.array([1.0, -1.0])])
    assert w.tolist() == [-0.5, 0.5]


def test_a_gradient_of_norm_zero_moves_nothing_but_what_decays():
    assert trained(LAMB(0.5), np.array([3.0, 4.0]), np.zeros((2, 2))).tolist() == [3.0, 4.0]
    # LARS: trust is 1, so 3 - 0.5 * (0 + 0.5*3)
    ours = trained(LARS(0.5, weight_decay=0.5), np.array([3.0]), [np.zeros(1)])
    assert ours.tolist() == [2.25]


def test_larss_trust_ratio_takes_the_gradient_without_the_decay():
    # |w| = 5, |g| = 2, wd = 0.5: trust = 0.1*5 / (2 + 2.5) = 1/9; w -= 1/9 * (g + 0.5 w)
    ours = trained(LARS(1.0, weight_decay=0.5, eeta=0.1), np.array([3.0, 4.0]), [np.array([0.0, 2.0])])
    np.testing.assert_allclose(ours, [3 - 1.5 / 9, 4 - 4 / 9], rtol=1e-7)


def test_larss_accumulator_holds_steps_with_the_rate_they_had():
    rate = PiecewiseConstantDecay([0], [1.0, 0.0])
    w = Variable([3.0, 4.0])
    optimizer = LARS(rate, momentum=0.5, weight_decay=0.0, eeta=0.1)
    for _ in range(2):
        optimizer.apply_gradients([(np.array([0.0, 2.0], np.float32), w)])
    # a = 0.25 * 2 = 0.5, then 0.25 although the rate is 0 by now
    np.testing.assert_allclose(w.numpy(), [3.0, 3.25], rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_skips_variables_by_parts_of_their_names(nesterov):
    optimizer = LARS(0.1, weight_decay=0.5, skip_list=["bias", "norm"], nesterov=nesterov)
    ours = trained(optimizer, START, GRADIENTS, name="batch_norm/gamma")
    a, w = np.zeros_like(START), START
    for g in GRADIENTS:
        a = 0.9 * a + 0.1 * g
        w = w - (0.1 * g + 0.9 * a if nesterov else a)
    np.testing.assert_allclose(ours, w, 1e-7)
    # "b.as" is a part, not a regular expression.
    ours = trained(LARS(0.1, weight_decay=0.5, skip_list=["b.as"]), START, GRADIENTS, name="bias")
    np.testing.assert_allclose(ours, lars(START, GRADIENTS, wd=0.5), 1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: LARS(0.5, 0.5, 0.1, **o),
        lambda **o: contrib.LARSOptimizer(0.5, 0.5, 0.1, **o),
    ],
)
def test_lars_gives_sparse_rows_plain_momentum(make):
    # a = 0.5 a + g; w -= 0.5 a, with no trust ratio and no decay; other rows stay.
    table = Variable(np.full((3, 1), 8.0))
    optimizer = make()
    for scale in (1.0, 2.0):
        optimizer.apply_gradients([(IndexedSlices([[scale], [scale]], [1, 1], (3, 1)), table)])
    # g = 2, 4: a = 2, 5; w = 8 - 1 - 2.5
    assert table.numpy().ravel().tolist() == [8.0, 4.5, 8.0]
    assert optimizer.get_slot(table, "momentum").numpy().ravel().tolist() == [0.0, 5.0, 0.0]


def test_lamb_treats_slices_as_the_dense_gradient_with_zeros():
    sparse, dense = Variable(START), Variable(START)
    first, second = LAMB(0.1, weight_decay=0.1), LAMB(0.1, weight_decay=0.1)
    for row in (0, 2):
        gradient = np.zeros((4, 3))
        gradient[row] = 2.0
        first.apply_gradients([(IndexedSlices(np.ones((2, 3)), [row, row], (4, 3)), sparse)])
        second.apply_gradients([(gradient, dense)])
    np.testing.assert_array_equal(sparse.numpy(), dense.numpy())
    assert (sparse.numpy()[1] != START[1]).all()


@pytest.mark.parametrize("make", [lambda: LAMB(0.1, weight_decay=0.1), lambda: LARS(0.1, eeta=0.1)])
def test_every_variable_of_an_arena_is_a_layer(make):
    starts = [START.astype("f4"), 100 * START[0].astype("f4"), START[1].astype("f4")]
    variables = [Variable(start, name=f"v{n}") for n, start in enumerate(starts)]
    Arena(variables)
    optimizer = make()
    for n in range(3):
        gradients = [GRADIENTS[n].astype("f4"), GRADIENTS[n][0].astype("f4"), np.ones(3, "f4")]
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
    alone = make()
    w = Variable(starts[1], name="v1")
    for n in range(3):
        alone.apply_gradients([(GRADIENTS[n][0].astype("f4"), w)])
    np.testing.assert_array_equal(variables[1].numpy(), w.numpy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LAMB(beta_1=1.0), r"beta_1 must be in \[0, 1\), got 1.0"),
        (lambda: LAMB(weight_decay=-1), "weight_decay must not be negative"),
        (lambda: LAMB(epsilon=-1), "epsilon must not be negative"),
        (lambda: LARS(0.1, 1.5), r"`momentum` must be between \[0, 1\], got 1.5"),
        (lambda: LARS(0.1, eeta=-1), "eeta must not be negative"),
        (lambda: LARS(0.1, epsilon=-1), "epsilon must not be negative"),
        (lambda: contrib.LARSOptimizer(0.1, weight_decay=-1), "weight_decay must not be negative"),
        (lambda: contrib.LARSOptimizer(0.1, name=""), "specify the optimizer name"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lists_of_names_must_be_lists_of_strings():
    with pytest.raises(TypeError, match=r"exclude_from_weight_decay must be a list .* got 'b'"):
        LAMB(exclude_from_weight_decay="b")
    with pytest.raises(TypeError, match="exclude_from_layer_adaptation must be a list"):
        LAMB(exclude_from_layer_adaptation=[3])
    with pytest.raises(TypeError, match=r"skip_list must be a list of parts of .* got 'bias'"):
        LARS(0.1, skip_list="bias")


def test_norms_neither_overflow_nor_underflow():
    for size in (1e-30, 1e30):
        w = trained(LAMB(0.5, epsilon=0), np.float32([3 * size, 4 * size]), [np.float32([1.0, 1.0])])
        expected = np.array([3, 4]) * size - 0.5 * 5 * size / np.sqrt(2)
        np.testing.assert_allclose(w, expected, rtol=1e-6)


def test_scalars_of_a_layer_reach_the_rule_by_name():
    value, gradient = np.ones(2, np.float32), np.ones(2, np.float32)
    layerwise.call(two_rates, value, gradient, scalars={"second": 0.25}, per_layer={"first": np.float64(0.5)})
    assert value.tolist() == [0.25, 0.25]


class OnDevice(np.ndarray):
    """A number that may be computed with, but not looked at: what a GPU's norm is to the host."""

    def _looked_at(self, *_):
        raise AssertionError("the host read a value of the device")

    __float__ = __int__ = __bool__ = __index__ = item = tolist = _looked_at

    def __array_function__(self, *call):
        result = super().__array_function__(*call)
        return result.view(OnDevice) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize(
    "make",
    [lambda: LAMB(0.1, weight_decay=0.1), lambda: LARS(0.1), lambda: Muon(0.1)],
    ids=["LAMB", "LARS", "Muon"],
)
def test_no_norm_is_read_on_the_host(make, monkeypatch):
    def norm(values):
        return np.asarray(np.sqrt(np.square(values.astype(float)).sum())).view(OnDevice)

    expected = trained(make(), START, GRADIENTS)
    monkeypatch.setattr(layerwise, "norm", norm)
    np.testing.assert_allclose(trained(make(), START, GRADIENTS), expected, rtol=1e-12)
    with pytest.raises(AssertionError, match="the host read"):
        float(norm(START))


@elementwise
def two_rates(value, gradient, *, first, second):
    value = value - first * gradient - second * gradient
    return value  # noqa: RET504
