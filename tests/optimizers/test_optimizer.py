import numpy as np
import pytest

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.communicators import connect
from distopt.optimizers import SGD, Adam, tf1
from distopt.schedules import PiecewiseConstantDecay
from distopt.tape import GradientTape
from distopt.variables import Arena, IndexedSlices, Variable

RULES = {
    "gradient_descent": lambda **o: SGD(0.1, **o),
    "momentum": lambda **o: SGD(0.1, 0.9, **o),
    "nesterov": lambda **o: SGD(0.1, 0.9, nesterov=True, **o),
    "accumulator": lambda **o: tf1.MomentumOptimizer(0.1, 0.9, **o),
    "adam": lambda **o: Adam(0.1, **o),
}


def _classic():
    x, y = Variable(5.0, name="x"), Variable(3.0, name="y")
    return x, y, lambda: x**2 + x * y + 3


def test_classic_example_gives_3_7_and_2_5():
    x, y, loss = _classic()
    optimizer = SGD(0.1)
    pairs = optimizer.compute_gradients(loss, [x, y])
    assert [float(g) for g, _ in pairs] == [13.0, 5.0]
    assert optimizer.apply_gradients(pairs) == 1
    assert (float(x), float(y)) == (pytest.approx(3.7), pytest.approx(2.5))


def test_minimize_takes_a_recorded_loss():
    x, y, loss = _classic()
    optimizer = SGD(0.1)
    with GradientTape() as tape:
        z = loss()
    assert optimizer.minimize(z, [x, y], tape=tape) == 1
    assert (float(x), float(y)) == (pytest.approx(3.7), pytest.approx(2.5))
    with pytest.raises(ValueError, match="`tape` is required"):
        optimizer.minimize(z, [x, y])
    with pytest.raises(TypeError, match="callable or a Tensor"):
        optimizer.minimize(3.0, [x])
    with pytest.raises(ValueError, match="No variables to optimize"):
        optimizer.minimize(loss, [])


def test_momentum_follows_its_recurrence():
    # a1 = 2, w = 1 - 0.1*2 = 0.8; a2 = 0.5*2 + 4 = 5, w = 0.8 - 0.5 = 0.3
    w = Variable(1.0)
    optimizer = tf1.MomentumOptimizer(0.1, 0.5)
    optimizer.apply_gradients([(2.0, w)])
    optimizer.apply_gradients([(4.0, w)])
    assert float(w) == pytest.approx(0.3)
    assert float(optimizer.get_slot(w, "momentum")) == 5.0
    # Nesterov: w -= lr*(g + mu*a): 1 - 0.1*(2 + 1) = 0.7; 0.7 - 0.1*(4 + 2.5) = 0.05
    w = Variable(1.0)
    optimizer = tf1.MomentumOptimizer(0.1, 0.5, use_nesterov=True)
    optimizer.apply_gradients([(2.0, w)])
    optimizer.apply_gradients([(4.0, w)])
    assert float(w) == pytest.approx(0.05)


def test_adam_follows_its_recurrence():
    w = Variable(np.array([1.0, -2.0]))
    optimizer = Adam(0.1, 0.9, 0.99, 1e-3)
    m = v = 0.0
    expected = np.array([1.0, -2.0])
    for step, g in enumerate((np.array([0.5, -1.0]), np.array([-0.25, 2.0])), 1):
        optimizer.apply_gradients([(g, w)])
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        rate = 0.1 * np.sqrt(1 - 0.99**step) / (1 - 0.9**step)
        expected = expected - rate * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(optimizer.get_slot(w, "m").numpy(), m, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_an_arena_and_loose_variables_train_alike(rule):
    random = np.random.default_rng(3)
    start = [random.standard_normal(s).astype("f4") for s in ((3, 5), (), (70,))]
    loose = [Variable(s, name=f"v{i}") for i, s in enumerate(start)]
    in_arena = [Variable(s, name=f"v{i}") for i, s in enumerate(start)]
    Arena(in_arena)
    first, second = RULES[rule](), RULES[rule]()
    for _ in range(3):
        gradients = [random.standard_normal(s.shape).astype("f4") for s in start]
        first.apply_gradients(zip(gradients, loose, strict=True))
        second.apply_gradients(zip(gradients, in_arena, strict=True))
    for a, b in zip(loose, in_arena, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("rule", RULES)
def test_entering_an_arena_keeps_the_slots(rule):
    results = []
    for enters in (False, True):
        w = Variable(np.ones(4), name="w")
        optimizer = RULES[rule]()
        optimizer.apply_gradients([(np.arange(4.0), w)])
        if enters:
            Arena([w])
        optimizer.apply_gradients([(np.ones(4), w)])
        results.append(w.numpy())
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_leave_fresh_values_unchanged(rule):
    w = Variable([1.0, -2.0])
    RULES[rule]().apply_gradients([(np.zeros(2), w)])
    assert w.numpy().tolist() == [1.0, -2.0]


@pytest.mark.parametrize("rule", RULES)
def test_training_converges_on_a_quadratic(rule):
    w = Variable([3.0, -2.0])
    optimizer = RULES[rule]()
    for _ in range(300):
        optimizer.minimize(lambda: ops.reduce_sum(ops.square(w - 1.0)) * 0.5, var_list=[w])
    np.testing.assert_allclose(w.numpy(), [1.0, 1.0], atol=2e-3)


@pytest.mark.parametrize("rule", ["gradient_descent", "momentum", "nesterov"])
def test_sparse_rows_are_updated_as_dense_ones_and_others_left_alone(rule):
    start = np.arange(8.0).reshape(4, 2)
    sparse, dense = Variable(start, name="s"), Variable(start[[1, 3]], name="d")
    first, second = RULES[rule](), RULES[rule]()
    for scale in (1.0, -2.0):
        values = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) * scale
        first.apply_gradients([(IndexedSlices(values, [3, 1, 3], (4, 2)), sparse)])
        second.apply_gradients([(np.array([values[1], values[0] + values[2]]), dense)])
    np.testing.assert_allclose(sparse.numpy()[[1, 3]], dense.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(sparse.numpy()[[0, 2]], start[[0, 2]])


def test_adam_moves_rows_without_gradient_too():
    # As TensorFlow: exactly the dense rule with zeros in the other rows.
    start = np.ones((3, 2))
    sparse, dense = Variable(start), Variable(start)
    first, second = Adam(0.1), Adam(0.1)
    for row in (0, 1):
        gradient = np.zeros((3, 2))
        gradient[row] = 2.0
        first.apply_gradients([(IndexedSlices(gradient[[row]], [row], (3, 2)), sparse)])
        second.apply_gradients([(gradient, dense)])
    np.testing.assert_array_equal(sparse.numpy(), dense.numpy())
    assert sparse.numpy()[0, 0] < 0.9 - 1e-3  # row 0 went on moving at step 2


def test_constraint_comes_after_the_update_and_refuses_sparse_gradients():
    w = Variable([[1.0], [-1.0]], constraint=lambda value: np.maximum(value, 0), name="w")
    SGD(1.0).apply_gradients([(np.array([[3.0], [-3.0]]), w)])
    assert w.numpy().tolist() == [[0.0], [2.0]]
    with pytest.raises(RuntimeError, match="constraint function on a sparse variable: 'w'"):
        SGD(1.0).apply_gradients([(IndexedSlices([[1.0]], [0], (2, 1)), w)])


def test_variables_without_gradient_are_skipped_and_get_no_slot():
    a, b = Variable(1.0, name="a"), Variable(1.0, name="b")
    optimizer = SGD(0.1, 0.9)
    optimizer.apply_gradients([(1.0, a), (None, b)])
    assert float(b) == 1.0
    assert optimizer.get_slot_names() == ["momentum"]
    with pytest.raises(KeyError, match="no slot 'momentum' for variable 'b'"):
        optimizer.get_slot(b, "momentum")
    with pytest.raises(KeyError, match="no slot 'm' for"):
        optimizer.get_slot(a, "m")
    with pytest.raises(ValueError, match="No gradients provided for any variable: 'a', 'b'"):
        optimizer.apply_gradients([(None, a), (None, b)])
    assert optimizer.apply_gradients([]) == 1


def test_a_variable_given_twice_is_updated_twice():
    w = Variable(1.0, name="w")
    Arena([w])
    SGD(1.0).apply_gradients([(1.0, w), (2.0, w)])
    assert float(w) == -2.0


def test_wrong_pairs_are_refused():
    w = Variable([1.0, 2.0], name="w")
    optimizer = SGD(0.1)
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\)"):
        optimizer.apply_gradients([(np.ones(3), w)])
    with pytest.raises(TypeError, match="convertible to an array"):
        optimizer.apply_gradients([("text", w)])
    with pytest.raises(TypeError, match="expected pairs of"):
        optimizer.apply_gradients([w])
    with pytest.raises(TypeError, match="applied to Variables, got ndarray"):
        optimizer.apply_gradients([(1.0, np.ones(1))])
    assert optimizer.iterations == 0


def test_hyperparameters_are_numbers_schedules_or_callables_and_can_be_set():
    w = Variable(10.0)
    optimizer = SGD(PiecewiseConstantDecay([0], [1.0, 0.5]))
    optimizer.apply_gradients([(1.0, w)])
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == 8.5
    optimizer.learning_rate = lambda: 2.0
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == 6.5
    optimizer.lr = 0.25
    assert optimizer.learning_rate == 0.25
    with pytest.raises(AttributeError, match="no attribute or hyperparameter 'rho'"):
        _ = optimizer.rho


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(-0.1), "learning_rate must not be negative, got -0.1"),
        (lambda: SGD(float("nan")), "learning_rate must not be negative, got nan"),
        (lambda: SGD(0.1, 1.5), r"`momentum` must be between \[0, 1\], got 1.5"),
        (lambda: Adam(0.1, beta_1=1.0), r"beta_1 must be in \[0, 1\), got 1.0"),
        (lambda: Adam(0.1, epsilon=-1.0), "epsilon must not be negative"),
        (lambda: Adam(0.1, clipnorm=1.0, global_clipnorm=1.0), "both clipnorm and global_clipnorm"),
        (lambda: Adam(0.1, clipvalue=-1.0), "-1"),
        (lambda: Adam(0.1, name=""), "specify the optimizer name"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_callable_rate_out_of_range_is_refused_before_anything_changes():
    w = Variable(1.0)
    optimizer = SGD(lambda: -1.0)
    with pytest.raises(ValueError, match=r"got -1\.0"):
        optimizer.apply_gradients([(1.0, w)])
    assert (float(w), optimizer.iterations) == (1.0, 0)


def test_clips_and_transformers_see_aggregated_gradients_in_order():
    w = Variable([0.0, 0.0])
    seen = []

    def double(pairs):
        return [(2 * g, v) for g, v in pairs]

    def note(pairs):
        seen.append([g.tolist() for g, _ in pairs])
        return pairs

    optimizer = SGD(1.0, gradient_aggregator=double, gradient_transformers=[note, note], clipvalue=3.0)
    optimizer.apply_gradients([(np.array([1.0, 4.0]), w)])
    assert seen == [[[2.0, 3.0]], [[2.0, 3.0]]]
    optimizer.apply_gradients([(np.array([1.0, 4.0]), w)], experimental_aggregate_gradients=False)
    assert w.numpy().tolist() == [-3.0, -6.0]


def test_averaging_needs_the_number_of_examples():
    w = Variable(1.0)
    with connect("local") as communicator:
        optimizer = SGD(0.1, gradient_aggregator=AllReduce(communicator))
        with pytest.raises(ValueError, match="pass examples="):
            optimizer.apply_gradients([(1.0, w)])
        optimizer.apply_gradients([(np.float32(4.0), w)], examples=8)
        assert float(w) == pytest.approx(0.95)


def test_state_round_trips_and_refuses_what_does_not_fit():
    variables = [Variable(np.ones(3), name="a"), Variable(np.ones(2), name="b")]
    first = Adam(0.1)
    first.apply_gradients([(np.arange(3.0), variables[0])])
    state = first.state()
    assert sorted(state) == ["a/m", "a/v", "iterations"]
    second = Adam(0.1)
    second.load_state(state, variables)
    assert second.iterations == 1
    np.testing.assert_array_equal(second.get_slot(variables[0], "m").numpy(), first.state()["a/m"])
    with pytest.raises(ValueError, match="belong to none"):
        SGD(0.1, 0.9).load_state(state, variables)
    with pytest.raises(ValueError, match=r"'a/m' should have shape \(3,\), found \(4,\)"):
        Adam(0.1).load_state({**state, "a/m": np.zeros(4)}, variables)


@pytest.mark.parametrize("wrong", [{"gradient_aggregator": 5}, {"gradient_transformers": ["clip"]}])
def test_aggregators_and_transformers_must_be_callable(wrong):
    with pytest.raises(TypeError, match="must be callables, pairs -> pairs; got"):
        SGD(0.1, **wrong)
