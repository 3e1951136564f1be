"""What holds for every optimizer class, whichever there are."""

import inspect
import json

import numpy as np
import pytest
from every import CLASSES, SHAPES, make, rates, remade, shares, slots, variables

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.schedules import ExponentialDecay
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

every = pytest.mark.parametrize("name", CLASSES)

SOLVED_ANEW = ["AdagradDA", "Ftrl"]
"""What knows the initial weights by later changes only, so that a first gradient of zero makes them 0."""

EMPTY_SLICES = {
    "rows": [
        "SGD",
        "Adagrad",
        "Adadelta",
        "Ftrl",
        "Adamax",
        "RMSprop with momentum",
        "tf1.GradientDescentOptimizer",
        "tf1.MomentumOptimizer",
        "tf1.AdagradOptimizer",
        "tf1.AdagradDAOptimizer",
        "tf1.AdadeltaOptimizer",
        "tf1.FtrlOptimizer",
        "tf1.RMSPropOptimizer",
        "tf1.ProximalGradientDescentOptimizer",
        "tf1.ProximalAdagradOptimizer",
        "keras_new.Adagrad",
    ],
    "all": [
        "Adam",
        "tf1.AdamOptimizer",
        "keras_new.SGD",
        "keras_new.Adam",
        "keras_new.Adadelta",
        "keras_new.Adamax",
        "keras_new.Nadam",
        "keras_new.RMSprop",
        "keras_new.Ftrl",
    ],
    "hybrid": ["RMSprop", "Nadam"],
}
"""What a gradient without rows does: nothing; what dense zeros do; or that to the slots only."""


def gradients(step, dtype="f4"):
    random = np.random.default_rng(step)
    return [random.standard_normal(shape).astype(dtype) for shape in SHAPES]


def train(optimizer, own, steps):
    for step in steps:
        optimizer.apply_gradients(zip(gradients(step, own[0].dtype), own, strict=True))
    return own


def same(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.name)


@every
def test_it_converges_on_a_convex_problem(name):
    goal = np.array([[1.0, -0.5], [0.25, -1.0], [0.5, 0.75]], np.float32)
    w = Variable(np.full((3, 2), 2.0, np.float32), name="w")
    optimizer = make(name, **rates(name))
    first = float(np.square(w.numpy() - goal).sum())
    for _ in range(600):
        optimizer.minimize(lambda: ops.reduce_sum(ops.square(w - goal)) * 0.5, var_list=[w])
    assert float(np.square(w.numpy() - goal).sum()) < 0.02 * first


@every
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_it_keeps_shapes_and_dtypes(name, dtype):
    own = variables(dtype)
    before = [w.numpy() for w in own]
    optimizer = make(name, **rates(name))
    train(optimizer, own, range(3))
    for w, old in zip(own, before, strict=True):
        assert (w.shape, w.dtype) == (old.shape, np.dtype(dtype))
        assert np.isfinite(w.numpy()).all()
        assert not np.array_equal(w.numpy(), old)
        for value in slots(optimizer, w).values():
            assert (value.shape, value.dtype) == (w.shape, np.dtype(dtype))


@every
@pytest.mark.parametrize("how", ["state", "weights"])
def test_its_state_and_configuration_give_the_same_trajectory(name, how):
    first = make(name)
    own = train(first, variables(), range(3))
    second = remade(first, name)
    others = variables(start=[w.numpy() for w in own])
    if how == "state":
        second.load_state(first.state(), others)
    else:
        second.apply_gradients([(np.zeros(w.shape, "f4"), w) for w in others])  # makes the slots
        second.set_weights(first.get_weights())
        for w, value in zip(others, own, strict=True):
            w.assign(value)
    assert second.iterations == 3
    same(train(first, own, range(3, 6)), train(second, others, range(3, 6)))
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@every
def test_its_configuration_survives_json_and_names_its_arguments(name):
    optimizer = make(name)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert config["name"] == optimizer.get_name()
    assert config["learning_rate"] == optimizer.learning_rate
    assert remade(optimizer, name).get_config() == optimizer.get_config()


@every
def test_schedules_and_callables_are_learning_rates(name):
    if name == "Nadam":
        with pytest.raises(ValueError, match="does not support LearningRateSchedules"):
            make(name, learning_rate=ExponentialDecay(0.1, 1, 0.5))
        return
    schedule, halves = ExponentialDecay(0.125, 1, 0.5), iter([0.125, 0.0625, 0.03125])
    scheduled = make(name, learning_rate=schedule)
    asked = make(name, learning_rate=lambda: next(halves))
    same(train(scheduled, variables(), range(3)), train(asked, variables(), range(3)))
    assert remade(scheduled, name).learning_rate.get_config() == schedule.get_config()


@every
def test_zero_gradients_move_nothing_but_by_decay(name):
    own = variables("f8")
    before = [w.numpy() for w in own]
    optimizer = make(name)
    optimizer.apply_gradients([(np.zeros(w.shape), w) for w in own])
    for w, old in zip(own, before, strict=True):
        if name.rpartition(".")[2].removesuffix("Optimizer") in SOLVED_ANEW:
            np.testing.assert_array_equal(w.numpy(), 0.0)
            continue
        shares = w.numpy() / old
        np.testing.assert_allclose(shares, shares.flat[0], rtol=1e-12)
        decay = optimizer.get_config().get("weight_decay")
        assert 0.98 < shares.flat[0] <= 1.0 if decay else shares.flat[0] == 1.0


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in EMPTY_SLICES for name in EMPTY_SLICES[kind]]
)
def test_a_gradient_without_rows_does_what_the_table_says(kind, name):
    pair = []
    for _ in range(2):
        table = Variable(np.linspace(-1, 1, 6).reshape(3, 2), name="table")
        name, _, momentum = name.partition(" with ")
        optimizer = make(name, **({momentum: 0.5} if momentum else {}))
        optimizer.apply_gradients([(np.arange(6.0).reshape(3, 2) - 2, table)])
        pair.append((optimizer, table))
    (optimizer, table), (other, dense) = pair
    before, held = table.numpy(), slots(optimizer, table)
    optimizer.apply_gradients([(IndexedSlices(np.zeros((0, 2)), np.zeros(0, np.int64), (3, 2)), table)])
    assert optimizer.iterations == 2
    other.apply_gradients([(np.zeros((3, 2)), dense)])
    moved = dense.numpy() if kind == "all" else before
    np.testing.assert_array_equal(table.numpy(), moved)
    expected = held if kind == "rows" else slots(other, dense)
    for slot, value in slots(optimizer, table).items():
        np.testing.assert_array_equal(value, expected[slot], err_msg=slot)


def test_the_table_of_empty_slices_is_complete():
    stated = {name.partition(" with ")[0] for names in EMPTY_SLICES.values() for name in names}
    older = {name for name in CLASSES if not name.startswith("contrib.")}
    large_batch = {"AdamW", "LAMB", "LARS", "LazyAdam", "Lion", "Muon", "SGDW"}  # in a file of their own
    assert {name for name in older if name.rpartition(".")[2] not in large_batch} == stated


@every
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_an_arena_and_loose_variables_have_the_same_bits(name, dtype):
    loose, together = variables(dtype), variables(dtype)
    Arena(together)
    first, second = make(name), make(name)
    same(train(first, loose, range(4)), train(second, together, range(4)))
    for a, b in zip(loose, together, strict=True):
        held, other = slots(first, a), slots(second, b)
        assert held.keys() == other.keys()
        for slot, value in held.items():
            np.testing.assert_array_equal(value, other[slot], err_msg=slot)


@every
@pytest.mark.parametrize("arena", [False, True])
def test_four_ranks_have_the_bits_of_one(name, arena):
    def rank(communicator):
        own = variables()
        if arena:
            Arena(own)
        optimizer = make(name, gradient_aggregator=AllReduce(communicator, "sum"))
        for step in range(4):
            pairs = zip(shares(step, communicator.size, communicator.rank), own, strict=True)
            optimizer.apply_gradients(pairs)
        return [w.numpy() for w in own]

    (alone,) = world(1, rank)
    for found in world(4, rank):
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_array_equal(a, b)


@every
def test_its_doc_says_what_its_arguments_are(name):
    lineage = CLASSES[name].__mro__
    definer = next(i for i, cls in enumerate(lineage) if "__init__" in vars(cls))
    text = "".join(cls.__doc__ for cls in lineage[: definer + 1])  # "those of X" goes up to X
    named = [
        key
        for key, parameter in inspect.signature(CLASSES[name]).parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
    ]
    assert [key for key in named if f"{key}:" not in text] == []
