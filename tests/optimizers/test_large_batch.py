"""What holds for every optimizer made for large batches."""

import functools

import numpy as np
import pytest

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.backend import Device
from distopt.data.digits import load
from distopt.models import digits
from distopt.optimizers import LAMB, LARS, SGDW, AdamW, LazyAdam, Lion, Muon, contrib
from distopt.replica import Batch, Replica
from distopt.schedules import CosineDecay
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

BIAS = ["bias", "b$"]
OPTIMIZERS = {
    "AdamW": lambda **o: AdamW(0.003, 0.1, exclude_from_weight_decay=BIAS, **o),
    "AdamW, tfa": lambda **o: AdamW(0.003, 1e-4, amsgrad=True, decay_convention="tfa", **o),
    "SGDW": lambda **o: SGDW(0.05, 0.01, 0.9, nesterov=True, exclude_from_weight_decay=BIAS, **o),
    "SGDW, plain": lambda **o: SGDW(0.1, 1e-3, decay_convention="tfa", **o),
    "LazyAdam": lambda **o: LazyAdam(0.003, **o),
    "LAMB": lambda **o: LAMB(0.01, weight_decay=0.01, exclude_from_weight_decay=BIAS, **o),
    "LARS": lambda **o: LARS(0.1, eeta=0.1, skip_list=["bias", "b"], nesterov=True, **o),
    "Lion": lambda **o: Lion(0.001, weight_decay=0.1, exclude_from_weight_decay=BIAS, **o),
    "Muon": lambda **o: Muon(0.02, weight_decay=0.01, adam_learning_rate=0.003, exclude=["logits"], **o),
    "AdamWOptimizer": lambda **o: contrib.AdamWOptimizer(1e-4, 0.003, exclude_from_weight_decay=BIAS, **o),
    "MomentumWOptimizer": lambda **o: contrib.MomentumWOptimizer(1e-4, 0.05, 0.9, use_nesterov=True, **o),
    "LazyAdamOptimizer": lambda **o: contrib.LazyAdamOptimizer(0.003, **o),
    "NadamOptimizer": lambda **o: contrib.NadamOptimizer(0.003, **o),
    "AdaMaxOptimizer": lambda **o: contrib.AdaMaxOptimizer(0.003, **o),
    "LARSOptimizer": lambda **o: contrib.LARSOptimizer(0.1, eeta=0.1, skip_list=["b"], **o),
    "addons.AdamW": lambda **o: contrib.AdamW(1e-4, 0.003, **o),
    "addons.SGDW": lambda **o: contrib.SGDW(1e-4, 0.05, 0.9, exclude_from_weight_decay=BIAS, **o),
}
every = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)

# Between the decaying ones is one that doesn't decay, so that an arena falls into several runs.
SHAPES = {"one/w": (3, 5), "one/b": (5,), "gain": (), "two/w": (5, 70), "two/bias": (70,)}


def model(dtype=np.float32):
    random = np.random.default_rng(6)
    return [Variable(random.standard_normal(s).astype(dtype), name=n) for n, s in SHAPES.items()]


def gradients(steps, dtype=np.float32):
    random = np.random.default_rng(7)
    return [[random.standard_normal(s).astype(dtype) for s in SHAPES.values()] for _ in range(steps)]


def test_every_class_is_in_the_table():
    classes = {type(make()) for make in OPTIMIZERS.values()}
    public = {
        getattr(contrib, name) for name in contrib.__all__ if name != "extend_with_decoupled_weight_decay"
    }
    assert public <= classes
    assert {AdamW, SGDW, LazyAdam, LAMB, LARS, Lion, Muon} <= classes


@every
def test_an_arena_trains_as_loose_variables_do_bit_for_bit(make):
    loose, in_arena = model(), model()
    Arena(in_arena)
    first, second = make(), make()
    for given in gradients(3):
        first.apply_gradients(zip(given, loose, strict=True))
        second.apply_gradients(zip(given, in_arena, strict=True))
    for a, b in zip(loose, in_arena, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@every
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_are_kept_and_differ_by_rounding_only(make, dtype):
    exact, rounded = model(np.float64), model(dtype)
    first, second = make(), make()
    for given in gradients(3, np.float64):
        first.apply_gradients(zip(given, exact, strict=True))
        second.apply_gradients(zip([np.asarray(g, dtype) for g in given], rounded, strict=True))
    tolerance = {2: 0.02, 4: 1e-4, 8: 0}[np.dtype(dtype).itemsize]
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == dtype
        np.testing.assert_allclose(b.numpy().astype(float), a.numpy(), tolerance, tolerance)


@every
def test_state_round_trips(make):
    straight, stopped = model(), model()
    first, second = make(), make()
    given = gradients(4)
    for step in given:
        first.apply_gradients(zip(step, straight, strict=True))
    for step in given[:2]:
        second.apply_gradients(zip(step, stopped, strict=True))
    resumed, third = model(), make()
    for new, old in zip(resumed, stopped, strict=True):
        new.assign(old.numpy())
    Arena(resumed)
    third.load_state(second.state(), resumed)
    for step in given[2:]:
        third.apply_gradients(zip(step, resumed, strict=True))
    for a, b in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    fourth = make()
    fourth.apply_gradients(zip(given[0], model(), strict=True))
    fourth.set_weights(third.get_weights())
    for a, b in zip(fourth.get_weights(), third.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@every
def test_configuration_round_trips(make):
    optimizer = make()
    optimizer.learning_rate = CosineDecay(0.01, 100)
    config = optimizer.get_config()
    again = type(optimizer).from_config(config)
    assert again.get_config() == config
    ours, theirs = model(), model()
    for given in gradients(2):
        optimizer.apply_gradients(zip(given, ours, strict=True))
        again.apply_gradients(zip(given, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@every
def test_one_rank_and_four_ranks_give_the_same_bits(make):
    # Gradients of whole numbers: every order of summation has the same sum, and what is left is ours.
    random = np.random.default_rng(9)
    given = [[random.integers(-9, 9, (4, *s)).astype("f4") for s in SHAPES.values()] for _ in range(3)]

    def train(ranks, communicator):
        variables = model()
        Arena(variables)
        optimizer = make(gradient_aggregator=AllReduce(communicator))
        for step in given:
            mine = [np.asarray(g[communicator.rank :: ranks].sum(0)) for g in step]
            optimizer.apply_gradients(zip(mine, variables, strict=True), examples=4 // ranks)
        return [v.numpy() for v in variables]

    alone = world(1, functools.partial(train, 1))[0]
    for rank in world(4, functools.partial(train, 4)):
        for a, b in zip(rank, alone, strict=True):
            np.testing.assert_array_equal(a, b)


@every
def test_empty_slices_are_no_error(make):
    table = Variable(np.ones((3, 2)), name="table/w")
    optimizer = make()
    empty = IndexedSlices(np.zeros((0, 2)), np.zeros(0, int), (3, 2))
    optimizer.apply_gradients([(empty, table)])
    assert optimizer.step == 1
    # Nothing to go by yet, so all that may have happened is decay.
    assert (np.ptp(table.numpy()), table.numpy().max() <= 1.0) == (0.0, True)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_weights(make, bad):
    w = Variable(np.ones((2, 3), np.float32), name="w")
    gradient = np.ones((2, 3), np.float32)
    gradient[1, 1] = bad
    optimizer = make()
    for _ in range(3):
        optimizer.apply_gradients([(gradient, w)])
    if not isinstance(optimizer, Lion) or np.isnan(bad):  # Lion steps by signs, and infinity has one
        assert not np.isfinite(w.numpy()[1, 1])


@every
def test_a_convex_problem_is_solved(make):
    target = np.random.default_rng(3).standard_normal((4, 6)).astype("f4")
    w = Variable(np.ones((4, 6)), name="w", dtype=np.float32)
    optimizer = make()
    if "weight_decay" in optimizer.get_config():
        optimizer.weight_decay = 0.0

    def loss():
        return ops.reduce_sum(ops.square(w - target)) * 0.5

    start = float(loss().value)
    optimizer.learning_rate = CosineDecay(10 * optimizer.learning_rate, 800)
    for _ in range(800):
        optimizer.minimize(loss, var_list=[w])
    assert float(loss().value) < 0.02 * start


@functools.cache
def handwritten():
    data = load("train")
    return data.images.astype("f4") / 16 - 0.5, data.labels


# The others are these with other signatures.
@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if not name.endswith("Optimizer") and "." not in name]
)
def test_the_digits_network_learns(name):
    images, labels = handwritten()
    replica = Replica(digits.network, images.shape[1:], Device("cpu", 0), seed=1)
    optimizer = OPTIMIZERS[name]()
    losses = []
    for step in range(100):
        chosen = np.arange(32 * step, 32 * step + 32) % len(labels)
        tape, loss, _ = replica.forward(Batch(images[chosen], labels[chosen]))
        losses.append(float(loss.value) / 32)
        optimizer.apply_gradients([(g / 32, v) for g, v in tape.gradients(loss, replica.variables)])
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_contrib_nadam_takes_nesterovs_direction():
    # m = 0.1*2, v = 0.001*4, rate 0.1*sqrt(0.001)/0.1, direction 0.9*0.2 + 0.1*2 = 0.38
    w = Variable([1.0])
    contrib.NadamOptimizer(0.1, epsilon=0.0).apply_gradients([(np.array([2.0]), w)])
    assert w.numpy()[0] == pytest.approx(1.0 - 0.1 * 0.38 / 2.0 / 0.1, rel=1e-6)


def test_contrib_nadam_moves_the_listed_rows_and_decays_the_moments_of_all():
    table = Variable(np.ones((2, 1)))
    optimizer = contrib.NadamOptimizer(0.1)
    optimizer.apply_gradients([(IndexedSlices([[2.0]], [0], (2, 1)), table)])
    before = table.numpy()[0, 0]
    optimizer.apply_gradients([(IndexedSlices([[2.0]], [1], (2, 1)), table)])
    assert table.numpy()[0, 0] == before
    np.testing.assert_allclose(optimizer.get_slot(table, "m").numpy(), [[0.18], [0.2]], rtol=1e-6)


def test_contrib_adamax_keeps_one_power_and_updates_rows():
    # m = 0.1*2, v = 2, rate 0.1/(1 - 0.9): w -= 1 * 0.2 / 2
    table = Variable(np.ones((2, 1)))
    optimizer = contrib.AdaMaxOptimizer(0.1, epsilon=0.0)
    optimizer.apply_gradients([(IndexedSlices([[2.0]], [1], (2, 1)), table)])
    np.testing.assert_allclose(table.numpy(), [[1.0], [0.9]], rtol=1e-6)
    assert [w.name for w in optimizer.variables()] == [
        "Variable/AdaMax",
        "Variable/AdaMax_1",
        "beta1_power",
    ]
    assert float(optimizer.variables()[-1]) == pytest.approx(0.81)
