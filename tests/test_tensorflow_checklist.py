"""What TensorFlow's optimizers do, feature by feature: the checklist of the specification, a row a test.

The tests are in the order of the checklist and named after its rows. Numbers come from arithmetic or were
recorded from TensorFlow. The tests of single modules say more about each; this one says nothing is missing.
"""

import math

import numpy as np
import pytest
from checklist_of_ranks import clipped_sum, expected, trained
from recorded import cases, recorded, replay

from distopt import losses, ops, optimizers, regularizers, schedules, scopes, transforms
from distopt.aggregators import Aggregator, AllReduce, Ticket, combine_replicas
from distopt.communicators import LocalCommunicator
from distopt.optimizers import SGD, Adagrad, Adam, ExponentialMovingAverage, contrib, optimize_loss, tf1
from distopt.tape import AggregationMethod, GradientTape, gradients
from distopt.testing import world
from distopt.variables import IndexedSlices, Variable


@pytest.fixture(autouse=True)
def graph():
    with scopes.Graph(seed=0).as_default() as graph:
        yield graph


def _replay(case):
    """Replay a recorded case of TensorFlow 1 or Keras with a fresh optimizer of ours."""
    make = getattr(tf1 if case["style"] == "tf1" else optimizers, case["optimizer"])
    if make is not tf1.AdagradDAOptimizer:
        return replay(case, make(**case["kwargs"]))
    step = Variable(np.int64(0), trainable=False, name="global_step")
    optimizer = make(global_step=step, **case["kwargs"])
    return replay(case, optimizer, lambda pairs: optimizer.apply_gradients(pairs, step))


def _replay_all(*parts, at_least):
    """Replay all recorded cases of both dialects whose name has one of these parts."""
    found = [c for s in ("tf1", "keras_v2") for c in cases(s) if any(p in c["name"] for p in parts)]
    assert len(found) >= at_least
    for case in found:
        _replay(case)


def _after(optimizer, *given, start=1.0, shape=()):
    """Return a float64 variable after updates by these gradients."""
    w = Variable(np.full(shape, start, np.float64), name="w")
    for gradient in given:
        optimizer.apply_gradients([(gradient, w)])
    return w


def _rows(values, indices, rows=3):
    shape = (rows, 1)
    return IndexedSlices(np.array(values, np.float64).reshape(-1, 1), np.array(indices, np.int64), shape)


# Rules, section 1.


def test_every_optimizer_dense():
    _replay_all("/dense_", "upstream/", at_least=80)


def test_epsilon_placement():
    _replay_all("/dense_tiny/", "/dense_zeros/", at_least=15)
    # g = 3, accumulator 7 + 9 = 16: TF1's Adagrad has no epsilon, Keras' has it outside of the root.
    assert float(_after(tf1.AdagradOptimizer(1.0, 7.0), 3.0)) == 1 - 3 / 4
    assert float(_after(Adagrad(1.0, 7.0, epsilon=2.0), 3.0)) == 1 - 3 / 6
    # RMSProp, mean square 4: inside, and for Keras without momentum outside.
    assert float(_after(tf1.RMSPropOptimizer(1.0, decay=0.0, epsilon=5.0), 2.0)) == 1 - 2 / 3
    assert float(_after(optimizers.RMSprop(1.0, rho=0.0, epsilon=5.0), 2.0)) == pytest.approx(1 - 2 / 7)


def test_rmsprop_initial_rms():
    # With decay 0.75 and g = 2: 0.75 * 1 + 0.25 * 4 against 0.25 * 4.
    first, keras = tf1.RMSPropOptimizer(0.5, decay=0.75), optimizers.RMSprop(0.5, rho=0.75)
    w, v = _after(first, 2.0), _after(keras, 2.0)
    assert (float(first.get_slot(w, "rms")), float(keras.get_slot(v, "rms"))) == (1.75, 1.0)
    assert float(w) == pytest.approx(1 - 1 / math.sqrt(1.75))
    assert float(v) == pytest.approx(1 - 1.0, abs=1e-6)


def test_sparse_laziness():
    _replay_all("/sparse_rare/", "/sparse_unique/", at_least=30)
    # Row 0 has a gradient in the first update only. Adam goes on moving it; the others leave it alone.
    for optimizer, moves in ((tf1.AdamOptimizer(0.1), True), (Adam(0.1), True), (SGD(0.1, 0.9), False)):
        w = _after(optimizer, _rows([1.0], [0]), shape=(3, 1))
        before = w.numpy()[0]
        optimizer.apply_gradients([(_rows([1.0], [1]), w)])
        assert (w.numpy()[0] != before) == moves


def test_duplicates():
    _replay_all("/sparse_dups/", "/sparse_unsorted_dups/", at_least=30)
    repeated = _after(Adagrad(1.0, 0.0), _rows([1.0, 5.0, 2.0], [2, 1, 2]), shape=(3, 1))
    summed = _after(Adagrad(1.0, 0.0), _rows([5.0, 3.0], [1, 2]), shape=(3, 1))
    np.testing.assert_array_equal(repeated.numpy(), summed.numpy())


def test_empty_sparse():
    _replay_all("/sparse_empty_some/", at_least=5)
    assert _after(SGD(1.0), _rows([], []), shape=(3, 1)).numpy().ravel().tolist() == [1.0, 1.0, 1.0]


def test_momentum_against_keras_when_the_rate_changes():
    # TF1: a = 1, then 1.5; w = -1 - 0.1 * 1.5. Keras: a = -1, then -0.5 - 0.1; w = -1.6.
    found = []
    for optimizer in (tf1.MomentumOptimizer(1.0, 0.5), SGD(1.0, 0.5)):
        w = _after(optimizer, 1.0, start=0.0)
        optimizer.learning_rate = 0.1
        optimizer.apply_gradients([(1.0, w)])
        found.append(float(w))
    assert found == pytest.approx([-1.15, -1.6])


def test_adam_t():
    # TF1's powers advance with every apply of the optimizer, Keras' t is iterations + 1; the recorded
    # numbers are those of two operations on one optimizer, the second run once after two of the first.
    for optimizer in (tf1.AdamOptimizer(0.1), Adam(0.1, epsilon=1e-8)):
        first, second = Variable(1.0), Variable(1.0)
        for w in (first, first, second):
            optimizer.apply_gradients([(np.float32(1.0), w)])
        assert [float(first), float(second)] == pytest.approx([0.80000037, 0.9361191], abs=2e-6)


def test_ftrl_zero_first_gradient():
    for optimizer in (tf1.FtrlOptimizer(0.1), optimizers.Ftrl(0.1)):
        assert float(_after(optimizer, 0.0, start=5.0)) == 0.0


def test_adagrad_da_ignores_w0():
    # tf.train's own test: 0.1, 0.2 with the accumulator 0.1 and the rate 3.
    for start in (0.0, 1.0, -7.0):
        step = Variable(np.int64(0), trainable=False)
        w = _after(tf1.AdagradDAOptimizer(3.0, step), np.array([0.1, 0.2]), start=start, shape=(2,))
        np.testing.assert_allclose(w.numpy(), [-0.904534, -1.603567], rtol=1e-6)


# Computing and applying gradients, sections 2 and 3.


def test_none_gradients():
    first, keras = tf1.MomentumOptimizer(1.0, 0.5), SGD(1.0, 0.5)
    for optimizer in (first, keras):
        w, none = Variable(1.0, name="w"), Variable(1.0, name="none")
        optimizer.apply_gradients([(1.0, w), (None, none)])
        assert (float(w), float(none)) == (0.0, 1.0)
        assert [v for v in optimizer.variables() if "none" in v.name] == []
        with pytest.raises(ValueError, match="No gradients provided for any variable"):
            optimizer.apply_gradients([(None, w), (None, none)])
    assert first.get_slot(none, "momentum") is None
    with pytest.raises(KeyError):
        keras.get_slot(none, "momentum")
    assert keras.apply_gradients([]) == 1  # nothing happens, and nothing is counted
    with pytest.raises(ValueError, match="No variables provided"):
        first.apply_gradients([])


def test_global_step(graph):
    step, w = scopes.get_or_create_global_step(), Variable(1.0)
    seen = []
    optimizer = tf1.GradientDescentOptimizer(lambda: seen.append((int(step.value), float(w))) or 0.5)
    assert optimizer.apply_gradients([(1.0, w)], step) is step
    optimizer.apply_gradients([(1.0, w)])
    assert optimizer.minimize(lambda: w * 1.0, global_step=step) is step
    assert (int(step.value), seen) == (2, [(0, 1.0), (1, 0.5), (1, 0.0)])


class _Events(Aggregator):
    """Notes each gradient as it comes."""

    def __init__(self, events):
        super().__init__()
        self.events = events

    def reduce(self, pairs, ticket=None):
        reduced = []
        for gradient, variable in pairs:
            self.events.append(f"reduce {variable.name}")
            reduced.append((gradient, variable))
        return reduced


def test_gate_gradients(monkeypatch):
    events, original = [], ops.dense.backward
    monkeypatch.setattr(ops.dense, "backward", lambda *a: events.append("backward") or original(*a))
    found = {}
    for gate in (tf1.Optimizer.GATE_NONE, tf1.Optimizer.GATE_OP, tf1.Optimizer.GATE_GRAPH):
        events.clear()
        own = {
            name: Variable(
                np.full(shape, 0.5),
                name=name,
                constraint=lambda value, name=name: events.append(f"apply {name}") or value,
            )
            for name, shape in (("w1", (2, 2)), ("b1", (2,)), ("w2", (2, 1)), ("b2", (1,)))
        }
        w1, b1, w2, b2 = own.values()
        optimizer = tf1.GradientDescentOptimizer(0.1, gradient_aggregator=_Events(events))
        optimizer.minimize(
            lambda w1=w1, b1=b1, w2=w2, b2=b2: ops.reduce_sum(
                ops.dense(ops.dense(np.ones((3, 2)), w1, b1), w2, b2)
            ),
            gate_gradients=gate,
        )
        found[gate] = ([v.numpy().tolist() for v in own.values()], list(events))
    values = [value for value, _ in found.values()]
    assert values[0] == values[1] == values[2]
    apply = [f"apply {name}" for name in ("w2", "b2", "w1", "b1")]
    last, first = ["reduce w2", "reduce b2"], ["reduce w1", "reduce b1"]
    for gate in (0, 1):
        assert found[gate][1] == ["backward", *last, "backward", *first, *apply]
    assert found[2][1] == ["backward", "backward", *last, *first, *apply]  # a barrier
    for wrong in (3, -1, "GATE_OP"):
        with pytest.raises(ValueError, match=r"GATE_NONE, Optimizer\.GATE_OP, Optimizer\.GATE_GRAPH"):
            optimizer.compute_gradients(lambda: w1 * 1.0, [w1], gate_gradients=wrong)


def test_aggregation_method():
    v = Variable(1.0)
    optimizer = tf1.GradientDescentOptimizer(1.0)

    def loss():
        return v + 2.0 * v + 3.0 * v + 4.0 * v

    for method in (None, 0, 1, 2, AggregationMethod.DEFAULT, AggregationMethod.EXPERIMENTAL_TREE):
        ((gradient, _),) = optimizer.compute_gradients(loss, [v], aggregation_method=method)
        assert float(gradient) == 10.0
    for one_path in (loss, lambda: 3.0 * v):
        with pytest.raises(ValueError, match="Invalid aggregation_method specified: 7"):
            optimizer.minimize(one_path, var_list=[v], aggregation_method=7)


def test_grad_loss_and_grad_ys():
    w = Variable([1.0, 2.0])
    tf1.GradientDescentOptimizer(3.0).minimize(lambda: 5.0 * w, grad_loss=np.array([42.0, -42.0], "f4"))
    assert w.numpy().tolist() == [-629.0, 632.0]
    x = Variable(2.0)
    with GradientTape():
        y, z = x * x, x * 5.0
        assert [float(gradients([y, z], x, ys)[0]) for ys in (None, [None, 100.0], [10.0, 100.0])] == [
            9.0,
            504.0,
            540.0,
        ]


def test_tape():
    x, fixed, count = Variable(2.0), Variable(3.0, trainable=False), Variable(3)
    with GradientTape() as tape:
        y = x * x * fixed * count
    assert float(tape.gradient({"a": [y]}, {"x": [x]})["x"][0]) == 36.0
    with pytest.raises(RuntimeError, match="A non-persistent GradientTape can only be used"):
        tape.gradient(y, x)
    with GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch([fixed, count])
        y = x * fixed * count
        assert tape.gradient(y, [x, fixed, count]) == [None, 6.0, None]
        with tape.stop_recording():
            hidden = fixed * 2.0
        assert float(tape.gradient([y, y * 2.0], fixed, output_gradients=[None, 10.0])) == 126.0
        assert float(tape.gradient(hidden, fixed, unconnected_gradients="zero")) == 0.0
        tape.reset()
        assert tape.gradient(fixed * 2.0, fixed) is None  # no longer watched


# Ranks, section 3.


def test_clip_after_sum():
    assert world(2, clipped_sum) == [2.0, 2.0]  # clipped before the sum it would be 3


def test_aggregator_off():
    def rank(communicator):
        w = Variable(0.0)
        optimizer = SGD(1.0, clipvalue=0.5, gradient_aggregator=AllReduce(communicator, "sum"))
        pairs = [(np.float32(0.1 + communicator.rank), w)]
        optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        return float(w)

    assert world(2, rank) == [pytest.approx(-0.1), -0.5]


def test_identity_aggregator():
    def rank(communicator):
        return float(_after(SGD(1.0, gradient_aggregator=list), 3.0 + 2 * communicator.rank, start=0.0))

    assert world(2, rank) == [-3.0, -5.0]


def test_sparse_across_ranks():
    def rank(communicator):
        optimizer = Adagrad(
            1.0, initial_accumulator_value=0.0, gradient_aggregator=AllReduce(communicator, "sum")
        )
        w = _after(optimizer, _rows([1.0 + communicator.rank], [0]), shape=(3, 1))
        return optimizer.get_slot(w, "accumulator").numpy().ravel().tolist()

    assert world(2, rank) == [[9.0, 0.0, 0.0]] * 2  # (1 + 2)^2, and not 1 + 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_n_ranks_equal_one_rank_on_the_big_batch(ranks):
    found = world(ranks, trained)
    np.testing.assert_allclose(found[0], expected(), rtol=1e-9)
    for other in found:
        np.testing.assert_array_equal(other, found[0])


def test_reduce_mean_trap():
    def gradient(loss_of):
        def rank(communicator):
            w, own = Variable(np.float64(0.0)), np.array([1.0, 2.0]) + 2 * communicator.rank
            optimizer = SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum"))
            optimizer.minimize(lambda: loss_of(w * own, communicator), [w])
            return -float(w)

        return world(2, rank)

    with pytest.warns(UserWarning, match="the loss is a mean over this rank's examples"):
        assert gradient(lambda each, _: ops.reduce_mean(each)) == [5.0, 5.0]
    assert gradient(lambda each, ranks: losses.compute_average_loss(each, communicator=ranks)) == [2.5, 2.5]


# Keras' state, section 3.4.


def test_hyperparameter_set_callable_and_schedule():
    schedule = schedules.PiecewiseConstantDecay([0, 1], [1.0, 10.0, 100.0])
    optimizer, calls = SGD(schedule), []
    w = _after(optimizer, 1.0, 1.0, 1.0, start=0.0)  # steps 0, 1, 2
    assert (float(w), optimizer.lr) == (-111.0, schedule)
    for rate, read in (
        (0.5, 0.5),
        (lambda: calls.append(None) or 0.25, 0.25),
        (2.0, 2.0),
    ):
        optimizer.lr = rate
        w.assign(0.0)
        optimizer.apply_gradients([(1.0, w)])
        assert (float(w), optimizer.learning_rate) == (-read, read)
    assert len(calls) == 2  # at the update and when it was read
    with pytest.raises(AttributeError):
        _ = optimizer.rho
    # 1 / (1 + 0.5 * iterations), iterations from 0
    assert float(_after(SGD(1.0, decay=0.5), 1.0, 1.0, 1.0, start=0.0)) == pytest.approx(-1 - 1 / 1.5 - 1 / 2)


def test_momentum_set_from_0_later():
    optimizer = SGD(1.0)
    optimizer.momentum = 0.9
    assert float(_after(optimizer, 1.0, 1.0, start=0.0)) == -2.0
    assert optimizer.get_slot_names() == []


def test_epsilon_0():
    keras = (Adam, Adagrad, optimizers.Adadelta, optimizers.Adamax, optimizers.Nadam, optimizers.RMSprop)
    for make in keras:
        assert make(epsilon=0).epsilon == make(epsilon=None).epsilon == 1e-7


def test_constraint():
    for optimizer in (tf1.GradientDescentOptimizer(1.0), SGD(1.0)):
        w = Variable([[1.0], [-1.0]], constraint=lambda value: np.maximum(value, 0), name="w")
        optimizer.apply_gradients([(np.array([[3.0], [-3.0]]), w)])
        assert w.numpy().tolist() == [[0.0], [2.0]]
        with pytest.raises(RuntimeError, match="Cannot use a constraint function on a sparse variable"):
            optimizer.apply_gradients([(IndexedSlices([[1.0]], [0], (2, 1)), w)])


def test_weights_order_and_set_weights_errors():
    a, b = Variable([1.0], name="a"), Variable([2.0], name="b")
    orders = {
        optimizers.Ftrl: ["a/accumulator", "a/linear", "b/accumulator", "b/linear"],
        optimizers.Nadam: ["momentum_cache", "a/m", "b/m", "a/v", "b/v"],
        Adam: ["a/m", "b/m", "a/v", "b/v"],
    }
    for make, names in orders.items():
        optimizer = make(0.1)
        optimizer.apply_gradients([(np.ones(1), a), (np.ones(1), b)])
        found = [weight.name.removeprefix(f"{make.__name__}/") for weight in optimizer.weights]
        assert found == ["iter", *names]
    weights = optimizer.get_weights()
    with pytest.raises(ValueError, match="weight list of length 1"):
        optimizer.set_weights(weights[:1])
    with pytest.raises(ValueError, match="not compatible with provided weight shape"):
        optimizer.set_weights([*weights[:-1], np.ones(2)])
    with pytest.raises(RuntimeError, match="Cannot set `iterations`"):
        optimizer.iterations = 3


def test_clip_global_norm_inf():
    for bad in (np.inf, -np.inf, np.nan):
        pairs = [(np.array([bad, 1.0]), "a"), (np.array([2.0]), "b"), (None, "c")]
        (first, _), (second, _), (none, _) = transforms.clip_by_global_norm(pairs, 1.0)
        assert np.isnan(first).all()
        assert np.isnan(second).all()
        assert none is None


# optimize_loss, noise, adaptive clipping: section 4.


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSProp", "clip .1", "mult then clip", "no incr"])
def test_optimize_loss(name):
    (case,) = [case for case in recorded()["optimize_loss"] if case["name"] == name]
    variable, step = scopes.get_variable("test", initializer=10.0), scopes.get_or_create_global_step()
    options = {
        "clip .1": {"clip_gradients": 0.1},
        "mult then clip": {"clip_gradients": 10.0, "gradient_multipliers": {"test:0": 7.0}},
        "no incr": {"increment_global_step": False},
    }.get(name, {})
    kind = name if name in optimizers.OPTIMIZER_CLS_NAMES else "SGD"
    train_op = optimize_loss(lambda x: abs(variable * x), step, 0.1, kind, **options)
    for number, x in enumerate(case["x_feeds"]):
        np.testing.assert_allclose(float(train_op(x)), case["returned"][number], rtol=2e-4)
        np.testing.assert_allclose(variable.numpy(), case["var_after"][number], rtol=2e-4)
        assert int(step.value) == case["global_step"][number]


_REFUSED = [
    ({"loss": None}, ValueError),
    ({"loss": lambda: Variable([1.0]) * 2.0}, ValueError),
    ({"global_step": Variable(0.0)}, TypeError),
    ({"global_step": Variable([0])}, TypeError),
    ({"learning_rate": -0.1}, ValueError),
    ({"learning_rate": 1}, ValueError),
    ({"learning_rate": np.float32(0.1)}, ValueError),
    ({"learning_rate": lambda: 0.1}, ValueError),
    ({"learning_rate": None}, ValueError),
    ({"learning_rate": None, "optimizer": SGD}, ValueError),
    ({"summaries": ["weights"]}, ValueError),
    ({"learning_rate_decay_fn": lambda rate, step: rate}, ValueError),
    ({"optimizer": "sgd"}, ValueError),
    ({"optimizer": lambda rate: 3}, ValueError),
    ({"optimizer": 3}, ValueError),
    ({"clip_gradients": 1}, ValueError),
    ({"clip_gradients": np.float32(1.0)}, ValueError),
    ({"clip_gradients": "1.0"}, ValueError),
]


@pytest.mark.parametrize(("wrong", "error"), _REFUSED)
def test_optimize_loss_errors(wrong, error):
    variable = Variable(1.0)
    given = {"loss": lambda: abs(variable), "global_step": None, "learning_rate": 0.1, "optimizer": "SGD"}
    with pytest.raises(error):
        optimize_loss(**{**given, **wrong})()
    assert float(variable) == 1.0


def test_noise():
    zeros = [(np.zeros(200_000, np.float32), None), (None, None), (_rows([0.0], [1]), None)]
    (dense, _), (none, _), (rows, _) = transforms.GradientNoise(0.5)(zeros)
    assert np.abs(dense).max() <= 2 * 0.5
    assert dense.std() == pytest.approx(0.8796 * 0.5, rel=0.01)
    assert none is None
    assert np.count_nonzero(rows) == rows.size == 3


@pytest.mark.parametrize("case", recorded()["adaptive_clipping"], ids=lambda case: case["name"])
def test_adaptive_clipping(case):
    clip = transforms.adaptive_clipping_fn(**case["kwargs"])
    for given, wanted in zip(case["grads"], case["clipped"], strict=True):
        ((clipped, _),) = clip([(np.array(given, np.float32), None)])
        np.testing.assert_allclose(clipped, wanted, rtol=2e-5)


# Schedules and moving averages: sections 5 and 6.

_SCHEDULES = [case for api in ("tf1", "keras") for case in recorded()[f"lr_schedules_{api}"]]


@pytest.mark.parametrize("case", _SCHEDULES, ids=lambda case: case["name"])
def test_schedules(case):
    make = getattr(schedules, case["name"])
    for number, wanted in zip(case["steps"], case["values"], strict=True):
        if case["name"][0].isupper():
            found = make(**case["kwargs"])(number)
        else:
            argument = "x" if case["name"] == "piecewise_constant" else "global_step"
            found = make(**{argument: number}, **case["kwargs"])()
        # TensorFlow computes in float32: the phase of a late cosine has an error of 2e-7.
        assert found == pytest.approx(wanted, rel=case["rtol"], abs=max(case["atol"], 2e-7))


@pytest.mark.parametrize("name", ["plain", "num_updates_low", "tensor debias"])
def test_ema(name):
    (case,) = [case for case in recorded()["ema"] if case["name"] == name]
    updates, w = [0], Variable(np.array([10.0, 20.0], np.float32), name="w")
    average = ExponentialMovingAverage(
        **case["kwargs"], num_updates=(lambda: updates[0]) if "num" in name else None
    )
    named, found = "debias" in name, []
    average.track([("w", np.zeros(2, np.float32)) if named else w])
    for value in case["values"]:
        if not named:
            w.assign(value)
        average.apply([("w", np.array(value, np.float32)) if named else w])
        found.append(average.average("w" if named else w).numpy())
        updates[0] += 1
    np.testing.assert_allclose(found, case["average_initial_then_after_each"][1:], rtol=2e-6)


# Furniture of graphs: section 6.


def test_collection_regex_prefix():
    with scopes.name_scope("tower_1"):
        one = scopes.new_variable(1.0, name="a")
    with scopes.name_scope("tower_10"):
        ten = scopes.new_variable(1.0, name="a")
    scopes.add_to_collection("variables", "an item without a name")
    assert scopes.get_collection("variables", "tower_1") == [one, ten]
    assert scopes.get_collection("variables", "tower_1/") == [one]


def test_scope_reuse_errors_and_no_unreuse():
    with scopes.variable_scope("a"):
        w = scopes.get_variable("w", [2])
        with pytest.raises(ValueError, match="already exists, disallowed"):
            scopes.get_variable("w", [2])
    with scopes.variable_scope("a", reuse=True):
        with pytest.raises(ValueError, match="does not exist"):
            scopes.get_variable("v", [2])
        with pytest.raises(ValueError, match="shape"):
            scopes.get_variable("w", [3])
        with pytest.raises(ValueError, match="dtype"):
            scopes.get_variable("w", [2], np.float64)
    with scopes.variable_scope("", reuse=True), scopes.variable_scope("a", reuse=False) as scope:
        assert scope.reuse is True
        assert scopes.get_variable("w", [2]) is w
    with scopes.variable_scope("a", reuse=scopes.AUTO_REUSE):
        assert scopes.get_variable("w", [2]) is w


def test_regularizers():
    value = np.array([1.0, -2.0])
    assert regularizers.l2_regularizer(0.1)(value) == pytest.approx(0.25)
    assert regularizers.l2(0.1)(value) == pytest.approx(0.5)  # Keras has no half
    assert regularizers.l1_regularizer(0.1)(value) == pytest.approx(0.3)
    for wrong in (1, -0.5):
        with pytest.raises(ValueError, match=str(wrong)):
            regularizers.l2_regularizer(wrong)


@scopes.add_arg_scope
def _layer(a, b=1, c=2):
    return a, b, c


def test_arg_scope():
    with scopes.arg_scope([_layer], b=10) as captured:
        with scopes.arg_scope([_layer], c=20):
            assert _layer(0) == (0, 10, 20)  # merged
            with scopes.arg_scope(captured):
                assert _layer(0) == (0, 10, 2)  # replaced
        with pytest.raises(TypeError, match="multiple values"):
            _layer(0, 5)
    assert _layer(0) == (0, 1, 2)


# Towers and large batches.


def test_average_gradients():
    # Towers are replicas: their sum over the number of towers, for the first tower's variables.
    def averaged(*towers):
        reduce = AllReduce(LocalCommunicator(), "mean").reduce
        return reduce(combine_replicas(towers), Ticket(examples=len(towers)))

    def variables():
        return [Variable(np.zeros((3, 1)), name=name) for name in ("a", "b", "none")]

    first, second = variables(), variables()
    both = averaged(
        zip([np.full((3, 1), 1.0), _rows([2.0], [1]), None], first, strict=True),
        zip([np.full((3, 1), 5.0), _rows([4.0, 6.0], [1, 2]), None], second, strict=True),
    )
    (dense, a), (rows, b), (none, c) = both
    assert [a, b, c] == first
    assert dense.ravel().tolist() == [3.0, 3.0, 3.0]
    assert isinstance(rows, IndexedSlices)
    assert rows.to_dense().ravel().tolist() == [0.0, 3.0, 3.0]
    assert none is None
    # Two towers of two examples are one of four.
    x = np.array([1.0, 2.0, 3.0, 4.0])

    def tower(own):
        w = Variable(np.float64(3.0), name="w")
        return SGD(1.0).compute_gradients(lambda: ops.reduce_mean(ops.square(w * own)), [w])

    ((towers, _),) = averaged(tower(x[:2]), tower(x[2:]))
    assert float(towers) == float(averaged(tower(x))[0][0]) == 2 * 3.0 * 7.5


@pytest.mark.parametrize(
    "case",
    [
        *cases("tf1_contrib_opt", "LARSOptimizer", "AdamWOptimizer"),
        *cases("tfa_0.23", "LAMB", "AdamW"),
        *cases("keras_new_2.15", "AdamW"),
    ],
    ids=lambda case: case["name"],
)
def test_lars_lamb_adamw(case):
    module = optimizers if case["style"] == "keras_new_2.15" else contrib
    replay(case, getattr(module, case["optimizer"])(**case["kwargs"]))
