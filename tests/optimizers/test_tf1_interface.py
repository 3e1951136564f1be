"""minimize, compute_gradients and apply_gradients of TensorFlow 1: conditions, order, errors."""

import ml_dtypes
import numpy as np
import pytest

from distopt import ops, scopes
from distopt.optimizers import SGD, tf1
from distopt.tape import GradientTape, Tensor
from distopt.variables import Arena, IndexedSlices, Variable


@pytest.fixture
def graph():
    with scopes.Graph().as_default():
        yield


def _step(value=0, dtype=np.int64):
    return Variable(value, trainable=False, dtype=dtype, name="global_step")


def test_minimize_returns_the_step_and_counts_it_after_the_update():
    w, step = Variable(1.0), _step(7)
    seen = []
    optimizer = tf1.GradientDescentOptimizer(lambda: seen.append(int(step.value)) or 0.5)
    assert optimizer.minimize(lambda: w * 4.0, global_step=step) is step
    assert (float(w), int(step.value), seen) == (-1.0, 8, [7])
    assert optimizer.minimize(lambda: w * 4.0) is None
    assert int(step.value) == 8


def test_a_float_global_step_is_counted_too():
    w, step = Variable(1.0), _step(0.0, np.float32)
    tf1.GradientDescentOptimizer(0.5).apply_gradients([(1.0, w)], step)
    assert float(step) == 1.0


def test_minimize_calls_compute_and_apply():
    w, other = Variable(3.0), Variable(5.0)
    optimizer = tf1.GradientDescentOptimizer(0.5)
    pairs = optimizer.compute_gradients(lambda: w * w, [w, other])
    assert [(g if g is None else float(g), v) for g, v in pairs] == [(6.0, w), (None, other)]
    assert float(w) == 3.0
    optimizer.apply_gradients(pairs)
    assert (float(w), float(other)) == (0.0, 5.0)


def test_variables_in_a_list_are_trained_trainable_or_not_nested_or_not():
    a, b = Variable(1.0, trainable=False), Variable(1.0)
    optimizer = tf1.GradientDescentOptimizer(1.0)
    optimizer.minimize(lambda: a * 2.0 + b * 3.0, var_list=[[a], (b,)])
    assert (float(a), float(b)) == (-1.0, -2.0)


def test_without_a_list_the_trainable_variables_of_the_loss_are_trained():
    a, b = Variable(1.0, trainable=False), Variable(1.0)
    tf1.GradientDescentOptimizer(1.0).minimize(lambda: a * b)
    assert (float(a), float(b)) == (1.0, 0.0)


def test_a_recorded_loss_takes_the_default_graphs_variables(graph):
    w = scopes.get_variable("w", initializer=2.0)
    unused = scopes.get_variable("unused", initializer=1.0)
    optimizer = tf1.GradientDescentOptimizer(0.25)
    with GradientTape():
        loss = w * w
    assert [v for _, v in optimizer.compute_gradients(loss)] == [w, unused]
    optimizer.minimize(loss)
    assert float(w) == 1.0


def test_grad_loss_multiplies_and_a_vector_loss_is_summed():
    # d(5w)/dw with upstream [42, -42], rate 3: w - [630, -630]
    w = Variable([1.0, 2.0])
    optimizer = tf1.GradientDescentOptimizer(3.0)
    optimizer.minimize(lambda: 5.0 * w, grad_loss=np.array([42.0, -42.0], "f4"))
    assert w.numpy().tolist() == [-629.0, 632.0]
    optimizer.minimize(lambda: w)
    assert w.numpy().tolist() == [-632.0, 629.0]


def test_numbers_lists_and_generators_are_gradients():
    a, b, c = Variable(1.0), Variable([1.0, 2.0]), Variable([1.0])
    pairs = ((g, v) for g, v in ((2, a), ([1, 2.5], b), (Variable([3.0]), c)))
    tf1.GradientDescentOptimizer(1.0).apply_gradients(pairs)
    assert (float(a), b.numpy().tolist(), c.numpy().tolist()) == (-1.0, [0.0, -0.5], [-2.0])


def test_slots_are_named_after_the_optimizer_and_made_for_what_has_a_gradient():
    w, none = Variable([1.0], name="w"), Variable([1.0], name="none")
    optimizer = tf1.AdamOptimizer(0.1)
    assert optimizer.get_slot_names() == []
    assert optimizer.get_slot(w, "m") is None
    optimizer.apply_gradients([(np.ones(1), w), (None, none)])
    assert optimizer.get_slot_names() == ["m", "v"]
    assert optimizer.get_slot(w, "m").name == "w/Adam"
    assert optimizer.get_slot(w, "v").name == "w/Adam_1"
    assert optimizer.get_slot(none, "m") is None
    assert optimizer.get_slot(w, "rms") is None
    names = [variable.name for variable in optimizer.variables()]
    assert names == ["beta1_power", "beta2_power", "w/Adam", "w/Adam_1"]
    assert not optimizer.get_slot(w, "m").trainable


def test_adams_powers_advance_with_every_apply_of_the_optimizer():
    # The second variable's first update is the optimizer's third: 0.1 * sqrt(1-b2^3)/(1-b1^3) *
    # sqrt(1-b2)^-1 * (1-b1) is 0.0639, not 0.1.
    first, second = Variable(1.0), Variable(1.0)
    optimizer = tf1.AdamOptimizer(0.1)
    optimizer.apply_gradients([(np.float32(1.0), first)])
    optimizer.apply_gradients([(np.float32(1.0), first)])
    optimizer.apply_gradients([(np.float32(1.0), second)])
    assert float(first) == pytest.approx(0.80000037, abs=2e-7)
    assert float(second) == pytest.approx(0.9361191, abs=2e-7)


def test_the_powers_belong_to_the_state():
    w = Variable([1.0], name="w")
    first, second = tf1.AdamOptimizer(0.1), tf1.AdamOptimizer(0.1)
    first.apply_gradients([(np.ones(1), w)])
    second.load_state(first.state(), [w])
    assert [float(p) for p in second._get_beta_accumulators()] == pytest.approx([0.81, 0.999**2])


_W = "a variable"


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([], ValueError, r"No variables provided\."),
        ([(None, _W)], ValueError, "No gradients provided for any variable"),
        ([("text", _W)], TypeError, "Gradient must be convertible to an array or IndexedSlices, or None"),
        ([(1.0, Tensor(np.ones(())))], NotImplementedError, "Trying to update a Tensor"),
        ([(1.0, np.ones(()))], NotImplementedError, r"Trying to optimize unsupported type array\(1"),
        ([[1.0, None]], NotImplementedError, "Trying to optimize unsupported type None"),
        (
            [(1.0, _W), (1.0, Variable(3, name="count"))],
            ValueError,
            "Invalid type int32 for variable 'count'",
        ),
        ([(np.complex64(1j), _W)], TypeError, "Gradient must be convertible .* got complex64"),
        ([(1.0, _W, 3)], TypeError, "expected pairs of"),
        ([_W], TypeError, "expected pairs of"),
        ([(np.ones(3), _W)], ValueError, r"has shape \(3,\)"),
    ],
)
def test_wrong_pairs_are_refused_and_nothing_changes(pairs, error, message):
    w, step = Variable(1.0, name="w"), _step()
    given = [tuple(w if part is _W else part for part in p) if p is not _W else w for p in pairs]
    optimizer = tf1.MomentumOptimizer(0.1, 0.9)
    with pytest.raises(error, match=message):
        optimizer.apply_gradients(given, step)
    assert (float(w), int(step.value), optimizer.get_slot(w, "momentum")) == (1.0, 0, None)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (3.0, RuntimeError, "should be a function when eager execution is enabled"),
        (Tensor(np.ones(())), RuntimeError, "should be a function when eager execution is enabled"),
        (lambda: Variable(2) + 3, ValueError, "Invalid type int"),
        (lambda: ops.cast(Variable(2.0), dtype=np.complex64), ValueError, "Invalid type complex"),
        (lambda: 3.0, ValueError, "Invalid type float for the loss"),
    ],
)
def test_wrong_losses_are_refused(loss, error, message):
    with pytest.raises(error, match=message):
        tf1.GradientDescentOptimizer(1.0).minimize(loss, var_list=[Variable(1.0)])


def test_integers_are_no_losses_and_no_upstream_gradients():
    w = Variable(1.0)
    optimizer = tf1.GradientDescentOptimizer(1.0)
    with pytest.raises(ValueError, match="Invalid type int64 for grad_loss"):
        optimizer.minimize(lambda: w * 2.0, grad_loss=np.array(3))
    with GradientTape():
        rounded = ops.cast(w * 2.0, dtype=np.int32)
    with pytest.raises(ValueError, match="Invalid type int32 for the loss"):
        optimizer.compute_gradients(rounded, [w])


@pytest.mark.parametrize("wrong", [np.ones(1), 3, None, "w"])
def test_only_variables_and_tensors_are_differentiated_by(wrong):
    w = Variable(1.0)
    for optimizer in (tf1.GradientDescentOptimizer(1.0), SGD(1.0)):
        with pytest.raises(ValueError, match="`var_list` must hold variables, got"):
            optimizer.compute_gradients(lambda: w * 2.0, [w, wrong])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_losses_may_have_every_floating_dtype(dtype):
    w = Variable(np.array(3.0, dtype))
    ((gradient, _),) = tf1.GradientDescentOptimizer(1.0).compute_gradients(
        lambda: w * w, [w], colocate_gradients_with_ops=True, grad_loss=np.array(2.0, dtype)
    )
    assert (float(gradient), gradient.dtype) == (12.0, dtype)


def test_without_any_trainable_variable_there_is_nothing_to_optimize():
    fixed = Variable(1.0, trainable=False)
    with pytest.raises(ValueError, match=r"No variables to optimize\."):
        tf1.GradientDescentOptimizer(1.0).minimize(lambda: fixed * 2.0)


def test_no_variables_and_no_gradients_are_errors_of_minimize_only():
    w, apart = Variable(1.0), Variable(1.0, name="apart")
    optimizer = tf1.GradientDescentOptimizer(1.0)
    with pytest.raises(ValueError, match=r"No variables to optimize\."):
        optimizer.compute_gradients(lambda: w * 2.0, [])
    message = "^No gradients provided for any variable, check your graph .* 'apart'. The loss does not depend"
    with pytest.raises(ValueError, match=message):
        optimizer.minimize(lambda: w * 2.0, var_list=[apart])
    assert optimizer.compute_gradients(lambda: w * 2.0, [apart]) == [(None, apart)]


def test_a_tensor_may_be_differentiated_by_but_not_updated():
    w = Variable(3.0)
    with GradientTape():
        inner = w * 2.0
        loss = inner * inner
    optimizer = tf1.GradientDescentOptimizer(1.0)
    pairs = optimizer.compute_gradients(loss, [inner])
    assert float(pairs[0][0]) == 12.0
    with pytest.raises(NotImplementedError, match="Trying to update a Tensor"):
        optimizer.apply_gradients(pairs)


def test_no_name_is_an_error():
    with pytest.raises(ValueError, match="Must specify the optimizer name"):
        tf1.GradientDescentOptimizer(0.1, name="")
    assert tf1.GradientDescentOptimizer(0.1).get_name() == "GradientDescent"


def test_constraints_follow_dense_updates_and_refuse_sparse_ones():
    w = Variable([[1.0], [-1.0]], constraint=lambda value: np.maximum(value, 0), name="w")
    optimizer = tf1.GradientDescentOptimizer(1.0)
    optimizer.apply_gradients([(np.array([[3.0], [-3.0]]), w)])
    assert w.numpy().tolist() == [[0.0], [2.0]]
    with pytest.raises(RuntimeError, match="Cannot use a constraint function on a sparse variable"):
        optimizer.apply_gradients([(IndexedSlices([[1.0]], [0], (2, 1)), w)])


def test_momentum_rescales_its_history_when_the_rate_changes():
    # a = 1, w = -1; a = 1.5, w = -1 - 0.1*1.5
    w = Variable(0.0)
    optimizer = tf1.MomentumOptimizer(1.0, 0.5)
    optimizer.apply_gradients([(1.0, w)])
    optimizer.learning_rate = 0.1
    optimizer.apply_gradients([(1.0, w)])
    assert float(w) == pytest.approx(-1.15)


def test_one_optimizer_serves_arenas_and_loose_variables_in_one_call():
    member, loose = Variable([1.0], name="member"), Variable([1.0], name="loose")
    Arena([member])
    optimizer = tf1.MomentumOptimizer(1.0, 0.5)
    for _ in range(2):
        optimizer.apply_gradients([(np.ones(1), member), (np.ones(1), loose)])
    assert member.numpy() == loose.numpy() == [-1.5]
