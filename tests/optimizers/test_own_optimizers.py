"""Optimizers of one's own: by a rule, or ported from Keras with its hooks."""

import numpy as np
import pytest

from distopt.elementwise import elementwise, sign
from distopt.optimizers import SGD, Adam, Optimizer, optimize_loss, tf1
from distopt.schedules import ExponentialDecay
from distopt.scopes import Graph, new_variable
from distopt.variables import Arena, IndexedSlices, Variable


@elementwise
def signum(value, gradient, momentum, *, learning_rate, beta):
    momentum = beta * momentum + (1 - beta) * gradient
    value = value - learning_rate * sign(momentum)
    return value, momentum


class Signum(Optimizer):
    rule, slots = signum, {"momentum": 0.0}

    def __init__(self, learning_rate=0.01, beta=0.9, **options):
        super().__init__(hyperparameters={"learning_rate": learning_rate, "beta": beta}, **options)


class PortedMomentum(Optimizer):
    """As people write it for tf.keras.optimizers.Optimizer."""

    def __init__(self, learning_rate=0.01, mu=0.5, name="PortedMomentum", **kwargs):
        super().__init__(name, **kwargs)
        self._set_hyper("learning_rate", kwargs.get("lr", learning_rate))
        self._set_hyper("decay", self._initial_decay)
        self._set_hyper("mu", mu)
        self.calls = []

    def _create_slots(self, var_list):
        for var in var_list:
            self.add_slot(var, "velocity", initializer="ones")

    def _prepare_local(self, var_device, var_dtype, apply_state):
        super()._prepare_local(var_device, var_dtype, apply_state)
        apply_state[var_device, var_dtype]["mu"] = self._get_hyper("mu", var_dtype)

    def _resource_apply_dense(self, grad, var, apply_state=None):
        numbers = (apply_state or {}).get((var.device, var.dtype)) or self._fallback_apply_state(
            var.device, var.dtype
        )
        velocity = self.get_slot(var, "velocity")
        velocity.assign(numbers["mu"] * velocity.value + grad)
        var.assign_sub(numbers["lr_t"] * velocity.value)

    def _resource_apply_sparse(self, grad, var, indices):
        self.calls.append(indices.tolist())
        var.value[indices] -= self._decayed_lr(var.dtype) * grad

    def get_config(self):
        config = super().get_config()
        config.update({"mu": self._serialize_hyperparameter("mu")})
        return config


def test_a_rule_of_ones_own_works_on_dense_sparse_and_arena_variables():
    dense, table, member = Variable([1.0, -1.0]), Variable(np.ones((3, 2))), Variable([2.0], name="member")
    Arena([member])
    optimizer = Signum(0.5)
    rows = IndexedSlices([[2.0, -2.0]], [1], (3, 2))
    optimizer.apply_gradients([(np.array([3.0, -0.1]), dense), (rows, table), (np.array([1.0]), member)])
    assert dense.numpy().tolist() == [0.5, -0.5]
    assert table.numpy().tolist() == [[1.0, 1.0], [0.5, 1.5], [1.0, 1.0]]
    assert member.numpy().tolist() == [1.5]
    assert float(optimizer.get_slot(member, "momentum").numpy()[0]) == pytest.approx(0.1)


def test_a_rules_hyperparameters_are_numbers_schedules_and_callables():
    w = Variable(0.0, dtype="f8")
    optimizer = Signum(ExponentialDecay(1.0, 1, 0.5), beta=lambda: 0.0)
    for _ in range(3):  # 1 + 1/2 + 1/4
        optimizer.apply_gradients([(1.0, w)])
    assert float(w) == -1.75
    optimizer.lr, optimizer.beta = 4.0, 0.0
    optimizer.apply_gradients([(-1.0, w)])
    assert float(w) == 2.25
    copy = Signum.from_config(optimizer.get_config())
    assert (copy.get_name(), copy.lr, copy.beta) == ("Signum", 4.0, 0.0)


def test_keras_hooks_are_called_with_the_steps_numbers():
    # v = 0.5*1 + 2 = 2.5, w = 1 - 0.1*2.5 = 0.75; then lr 0.1/(1+1*1): v = 3.25, w = 0.75 - 0.1625
    w = Variable(1.0, dtype="f8")
    optimizer = PortedMomentum(0.1, decay=1.0)
    optimizer.apply_gradients([(2.0, w)])
    assert float(w) == pytest.approx(0.75)
    optimizer.apply_gradients([(2.0, w)])
    assert float(w) == pytest.approx(0.5875)
    assert [weight.name for weight in optimizer.weights] == [
        "PortedMomentum/iter",
        "PortedMomentum/Variable/velocity",
    ]
    assert optimizer.get_config() == {
        "name": "PortedMomentum",
        "learning_rate": 0.1,
        "decay": 1.0,
        "mu": 0.5,
    }
    assert PortedMomentum.from_config({"lr": 0.25}).learning_rate == 0.25


def test_the_sparse_hook_gets_every_row_once_in_the_order_of_appearance():
    table = Variable(np.zeros((4, 1)))
    optimizer = PortedMomentum(1.0)
    optimizer.apply_gradients([(IndexedSlices([[1.0], [2.0], [4.0]], [3, 0, 3], (4, 1)), table)])
    assert optimizer.calls == [[3, 0]]
    assert table.numpy().ravel().tolist() == [-2.0, 0.0, 0.0, -5.0]


def test_hooks_without_apply_state_are_called_without_it():
    class Plain(Optimizer):
        def _resource_apply_dense(self, grad, var):
            var.assign_sub(grad)

        def _resource_apply_sparse(self, grad, var, indices):
            var.value[indices] -= grad

    w, table = Variable(1.0), Variable(np.zeros((2, 1)))
    slices = IndexedSlices([[1.0], [2.0]], [1, 1], (2, 1))
    Plain("Plain").apply_gradients([(np.float32(3.0), w), (slices, table)])
    assert float(w) == -2.0
    assert table.numpy().ravel().tolist() == [0.0, -3.0]


def test_ported_slots_are_saved_and_restored():
    w = Variable([1.0, 2.0], name="w")
    first = PortedMomentum(0.1)
    first.apply_gradients([(np.ones(2), w)])
    state = first.state()
    assert sorted(state) == ["iterations", "w/velocity"]
    second = PortedMomentum(0.1)
    second.load_state(state, [w])
    np.testing.assert_array_equal(second.get_slot(w, "velocity").numpy(), [1.5, 1.5])
    assert second.iterations == 1


def test_a_subclass_may_change_the_sparse_half_of_a_rule_only():
    class RowsOfAdam(Adam):
        def _resource_apply_sparse(self, grad, var, indices, apply_state=None):
            var.value[indices] -= grad

    dense, table = Variable([1.0]), Variable(np.zeros((2, 1)))
    optimizer = RowsOfAdam(0.1)
    optimizer.apply_gradients([(np.ones(1), dense), (IndexedSlices([[3.0]], [1], (2, 1)), table)])
    assert dense.numpy()[0] == pytest.approx(0.9)
    assert table.numpy().ravel().tolist() == [0.0, -3.0]


def test_an_optimizer_without_rule_and_hooks_says_what_it_needs():
    w = Variable([1.0])
    with pytest.raises(NotImplementedError, match="has neither a `rule` nor `_resource_apply_dense`"):
        Optimizer("Empty", hyperparameters={"learning_rate": 0.1}).apply_gradients([(np.ones(1), w)])


def test_the_hook_for_unaggregated_gradients_comes_before_aggregation():
    seen = []

    class Halved(Signum):
        def _transform_unaggregated_gradients(self, grads_and_vars):
            seen.append("unaggregated")
            return [(g / 2, v) for g, v in grads_and_vars]

    def aggregator(pairs):
        seen.append(("aggregator", [float(g) for g, _ in pairs]))
        return pairs

    def transformer(pairs):
        seen.append("transformer")
        return pairs

    w, without = Variable(1.0), Variable(1.0)
    optimizer = Halved(1.0, gradient_aggregator=aggregator, gradient_transformers=[transformer])
    optimizer.apply_gradients([(np.float32(4.0), w), (None, without)])
    assert seen == ["unaggregated", ("aggregator", [2.0]), "transformer"]


class PortedTf1(tf1.Optimizer):
    """As people write it for tf.train.Optimizer."""

    def __init__(self, lr=0.1, use_locking=False, name="PortedTf1"):
        super().__init__(use_locking, name)
        self._lr = lr
        self.log = []

    def _prepare(self):
        self._lr_t = self._call_if_callable(self._lr)
        self.log.append("prepare")

    def _create_slots(self, var_list):
        self._create_non_slot_variable(0.5, "power", var_list[0])
        for var in var_list:
            self._zeros_slot(var, "m", self._name)
            self._get_or_make_slot(var, np.ones(var.shape, var.dtype), "n", self._name)

    def _apply_dense(self, grad, var):
        m, n = self.get_slot(var, "m"), self.get_slot(var, "n")
        m_t = m.assign(0.5 * m + grad)
        n_t = n.assign(n + 1)
        return [var.assign_sub(self._lr_t * m_t), n_t]

    def _resource_apply_dense(self, grad, var):
        raise AssertionError("the hook for TensorFlow 1's own variables counts")

    def _apply_sparse(self, grad, var):
        self.log.append((grad.indices.tolist(), grad.values.ravel().tolist()))
        var.value[grad.indices] -= self._lr_t * grad.values
        return "sparse"

    def _finish(self, update_ops, name_scope):
        self.log.append(("finish", len(update_ops), update_ops[-1], name_scope))
        power = self._get_non_slot_variable("power")
        power.assign(power * 0.5)


def test_an_optimizer_written_for_tensorflow_1_runs_with_its_hooks():
    # m = 2, w = 1 - 0.1*2 = 0.8; then m = 0.5*2 + 2 = 3, w = 0.8 - 0.3 = 0.5
    w, table, counter = Variable(1.0, name="w", dtype="f8"), Variable(np.zeros((4, 1))), Variable(0)
    optimizer = PortedTf1(lambda: 0.1)
    slices = IndexedSlices([[10.0], [20.0], [40.0]], [3, 0, 3], (4, 1))
    for value in (0.8, 0.5):
        optimizer.apply_gradients([(2.0, w), (slices, table)], counter)
        assert float(w) == pytest.approx(value)
    np.testing.assert_allclose(table.numpy().ravel(), [-4.0, 0.0, 0.0, -10.0])
    assert optimizer.log == ["prepare", ([3, 0], [50.0, 20.0]), ("finish", 2, "sparse", "PortedTf1")] * 2
    assert (float(optimizer.get_slot(w, "n")), int(counter.value)) == (3.0, 2)
    assert optimizer.get_slot_names() == ["m", "n"]
    assert [optimizer.get_slot(w, name).name for name in "mn"] == ["w/PortedTf1", "w/PortedTf1_1"]
    assert float(optimizer._get_non_slot_variable("power")) == 0.125


def test_hooks_for_resource_variables_serve_tensorflow_1_too():
    class Plain(tf1.Optimizer):
        def __init__(self):
            super().__init__(False, "Plain")

        def _resource_apply_dense(self, grad, var):
            var.assign_sub(grad)

        def _resource_apply_sparse(self, grad, var, indices):
            assert indices.tolist() == [1]
            var.value[indices] -= grad

    w, table = Variable([1.0]), Variable(np.zeros((2, 1)))
    slices = IndexedSlices([[1.0], [2.0]], [1, 1], (2, 1))
    Plain().apply_gradients([(np.array([3.0]), w), (slices, table)])
    assert w.numpy().tolist() == [-2.0]
    assert table.numpy().ravel().tolist() == [0.0, -3.0]


def test_a_subclass_of_a_tensorflow_1_optimizer_keeps_its_rule_where_it_has_no_hook():
    finished = []

    class Doubled(tf1.AdamOptimizer):
        def _apply_dense(self, grad, var):
            return super()._apply_dense(2 * grad, var)

        def _finish(self, update_ops, name_scope):
            finished.append(len(update_ops))

    w, table = Variable([1.0], dtype="f8"), Variable(np.zeros((2, 1)))
    optimizer = Doubled(0.1)
    optimizer.apply_gradients([(np.array([3.0]), w), (IndexedSlices([[3.0]], [1], (2, 1)), table)])
    assert optimizer.get_slot(w, "m").numpy()[0] == pytest.approx(0.6)  # 0.1 * (2 * 3)
    assert optimizer.get_slot(table, "m").numpy().ravel().tolist() == pytest.approx([0.0, 0.3])
    np.testing.assert_allclose(table.numpy().ravel(), [0.0, -0.1], rtol=1e-5)
    assert finished == [1]
    assert [float(p) for p in optimizer._powers] == pytest.approx([0.81, 0.998001])


def test_a_tensorflow_1_optimizer_without_rule_and_hooks_says_what_it_needs():
    with pytest.raises(NotImplementedError, match="has neither a `rule` nor"):
        tf1.Optimizer(False, "Empty").apply_gradients([(np.ones(1), Variable([1.0]))])


def test_minimize_uses_compute_gradients_where_it_is_overridden():
    class Tripled(tf1.GradientDescentOptimizer):
        def compute_gradients(self, *arguments, **named):
            return [(3 * g, v) for g, v in super().compute_gradients(*arguments, **named)]

    class Halved(SGD):
        def _compute_gradients(self, loss, var_list, grad_loss=None, tape=None):
            pairs = super()._compute_gradients(loss, var_list, grad_loss, tape)
            return [(g / 2, v) for g, v in pairs]

    w = Variable(1.0, dtype="f8")
    Tripled(0.5).minimize(lambda: w * 2.0, var_list=[w])  # 1 - 0.5 * 3 * 2
    assert float(w) == -2.0
    Halved(0.5).minimize(lambda: w * 2.0, [w], 4.0)  # -2 - 0.5 * (2 * 4) / 2
    assert float(w) == -4.0


def test_an_optimizer_written_for_tensorflow_1_serves_a_training_step():
    # m = 2, w = 1 - 0.1*2; PortedTf1's _create_slots looks at its first variable
    with Graph().as_default():
        w = new_variable(1.0, name="w")
        train_op = optimize_loss(lambda: w * 2.0, None, None, PortedTf1(0.1))
        train_op()
    assert float(w) == pytest.approx(0.8)
