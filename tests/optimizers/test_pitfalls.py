"""What once trained wrongly without a word: memory layout, stale values, names, rows in an arena, hooks."""

import copy
import pickle

import numpy as np
import pytest
from every import CLASSES, make

from distopt import layers, ops, scopes
from distopt.aggregators import AllReduce
from distopt.elementwise import decayed, elementwise
from distopt.optimizers import SGD, Adam, LossScaleOptimizer, tf1
from distopt.regularizers import l2_regularizer
from distopt.schedules import ExponentialDecay, exponential_decay
from distopt.tape import GradientTape, gradients
from distopt.testing import world
from distopt.transforms import GradientNoise
from distopt.variables import Arena, IndexedSlices, Variable


@pytest.mark.parametrize("name", CLASSES)
def test_a_transposed_array_is_trained_like_its_copy(name):
    start = np.arange(6, dtype="f4").reshape(2, 3).T / 7 + 0.5
    found = []
    for array in (start, start.copy()):
        w = Variable(array, name="w")
        assert w.value.flags.c_contiguous
        optimizer = make(name)
        for step in range(3):
            optimizer.apply_gradients([(np.full((3, 2), 0.5 + step, "f4"), w)])
        found.append(w.numpy())
    np.testing.assert_array_equal(*found)
    assert not np.array_equal(found[0], start)


def test_a_value_put_in_by_hand_in_another_layout_is_trained():
    w = Variable(np.zeros((3, 2)))
    w.value = np.zeros((2, 3)).T
    SGD(1.0).apply_gradients([(np.ones((3, 2)), w)])
    assert w.numpy().tolist() == [[-1.0, -1.0]] * 3


@pytest.mark.parametrize("change", ["assign", "optimizer"])
def test_a_gradient_through_a_changed_variable_is_refused(change):
    w1, w2 = Variable([[2.0]], name="w1"), Variable([[3.0]], name="w2")
    with GradientTape(persistent=True) as tape:
        y = ops.reduce_sum(ops.matmul(ops.matmul(np.ones((1, 1), "f4"), w1), w2))
    if change == "assign":
        w2.assign([[5.0]])
    else:
        SGD(1.0).apply_gradients([(tape.gradient(y, w2), w2)])
    with pytest.raises(RuntimeError, match="variable 'w2' was changed after matmul read it"):
        tape.gradient(y, w1)


def test_a_gradient_that_needs_no_values_may_come_after_the_update():
    a, b = Variable([1.0]), Variable([2.0])
    with GradientTape(persistent=True) as tape:
        y = ops.reduce_sum(a + b)
    SGD(1.0).apply_gradients([(tape.gradient(y, a), a)])
    assert tape.gradient(y, b).tolist() == [1.0]


@pytest.mark.parametrize(
    "read",
    [ops.identity, ops.stop_gradient, lambda v: ops.reshape(v, shape=(4,)), ops.transpose, lambda v: v[0]],
)
def test_what_was_read_stays_when_the_variable_is_assigned(read):
    v = Variable(np.ones((2, 2)))
    before = read(v)
    v.assign(np.zeros((2, 2)))
    assert (before.numpy() == 1).all()


def test_gradients_are_arrays_of_their_own():
    a, b, c = Variable([1.0, 2.0]), Variable([3.0, 4.0]), Variable([5.0, 6.0])
    with GradientTape(persistent=True) as tape:
        y = ops.reduce_sum((a + b) * 2.0)
        z = ops.reduce_sum(c)
    first, second = tape.gradient(y, [a, b])
    first *= 10
    assert second.tolist() == [2.0, 2.0]
    third = tape.gradient(z, c)
    third /= 2  # one number spread over all was read-only
    assert third.tolist() == [0.5, 0.5]


def test_variables_of_one_name_cannot_be_saved():
    a, b = Variable([1.0]), Variable([2.0])
    optimizer = Adam(0.1)
    optimizer.apply_gradients([(np.ones(1), a), (np.ones(1), b)])
    with pytest.raises(ValueError, match="two variables are named 'Variable'"):
        optimizer.state()
    with pytest.raises(ValueError, match="two variables are named 'Variable'"):
        Adam(0.1).load_state({"iterations": np.int64(1)}, [a, b])


def test_a_refused_state_changes_nothing():
    w = Variable([1.0], name="w")
    optimizer = Adam(0.1)
    optimizer.apply_gradients([(np.ones(1), w)])
    state = {**optimizer.state(), "iterations": np.int64(99), "w/m": np.ones(7)}
    with pytest.raises(ValueError, match="'w/m' should have shape"):
        optimizer.load_state(state, [w])
    assert optimizer.step == 1
    del state["iterations"]
    with pytest.raises(ValueError, match="has no 'iterations'"):
        optimizer.load_state(state, [w])


def _rows(row):
    return IndexedSlices(np.ones((1, 1), "f4"), [row], (3, 1))


@pytest.mark.parametrize("aggregated", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_table_in_an_arena_is_updated_by_rows_too(streamed, aggregated):
    # Momentum 0.9, rate 0.1, rows 0, 1, 1: row 0 does not coast.
    def train(communicator):
        table = Variable(np.ones((3, 1), "f4"), name="table")
        Arena([table])
        optimizer = SGD(0.1, 0.9, gradient_aggregator=AllReduce(communicator, "sum") if aggregated else None)
        for row in (0, 1, 1):
            if streamed:
                optimizer.minimize(lambda row=row: ops.reduce_sum(ops.gather(table, indices=[row])), [table])
            else:
                optimizer.apply_gradients([(_rows(row), table)])
        return table.numpy().ravel()

    np.testing.assert_allclose(world(1, train)[0], [0.9, 0.71, 1.0], rtol=1e-6)


def test_rows_of_one_rank_and_the_whole_of_another_are_added_in_an_arena():
    def rank(communicator):
        table = Variable(np.zeros((3, 1), "f4"), name="table")
        other = Variable(np.zeros(2, "f4"), name="other")
        Arena([table, other])
        gradient = [_rows(1), np.full((3, 1), 2.0, "f4"), None][communicator.rank]
        optimizer = SGD(1.0, gradient_aggregator=AllReduce(communicator, "mean"))
        optimizer.apply_gradients([(gradient, table), (np.ones(2, "f4"), other)], examples=communicator.rank)
        return table.numpy().ravel().tolist(), other.numpy().tolist()

    # Divided by 0 + 1 + 2 examples.
    for table, other in world(3, rank):
        assert table == pytest.approx([-2 / 3, -1.0, -2 / 3])
        assert other == [-1.0, -1.0]


def test_a_constraint_refuses_rows_in_an_arena_too():
    table = Variable(np.ones((3, 1), "f4"), name="table", constraint=lambda value: value)
    Arena([table])
    with pytest.raises(RuntimeError, match="constraint function on a sparse variable"):
        SGD(0.1).apply_gradients([(_rows(1), table)])


@pytest.mark.parametrize("wrong", [lambda value: value[:1], lambda value: None])
def test_a_constraint_gives_a_value_of_the_same_shape(wrong):
    w = Variable([1.0, 2.0], name="w", constraint=wrong)
    with pytest.raises(ValueError, match="the constraint of variable 'w' returned"):
        SGD(0.1).apply_gradients([(np.ones(2), w)])


def _define(sign):
    if sign > 0:

        @elementwise
        def pitfall(value, gradient, *, rate):
            value = value + rate * gradient
            return value  # noqa: RET504

        return pitfall

    @elementwise
    def pitfall(value, gradient, *, rate):
        value = value - rate * gradient
        return value  # noqa: RET504

    return pitfall


def test_a_rule_defined_again_has_its_own_form_with_decay():
    for sign in (-1, 1):
        array = np.ones(1)
        decayed(_define(sign))(array, np.ones(1), rate=0.5, decay_share=0.0)
        assert array[0] == 1 + sign * 0.5


def test_a_ported_aggregation_hook_takes_the_gradients_alone():
    class Doubling(SGD):
        def _aggregate_gradients(self, grads_and_vars):
            return [(2 * gradient, variable) for gradient, variable in grads_and_vars]

    w = Variable(0.0)
    Doubling(1.0).apply_gradients([(np.float32(1.0), w)])
    assert float(w) == -2.0


def test_the_hook_before_aggregation_is_left_out_with_it():
    class Halving(SGD):
        def _transform_unaggregated_gradients(self, grads_and_vars):
            return [(gradient / 2, variable) for gradient, variable in grads_and_vars]

    w = Variable(0.0)
    optimizer = Halving(1.0)
    optimizer.apply_gradients([(np.float32(1.0), w)], experimental_aggregate_gradients=False)
    assert float(w) == -1.0
    optimizer.apply_gradients([(np.float32(1.0), w)])
    assert float(w) == -1.5


@pytest.mark.parametrize("make_optimizer", [SGD, tf1.GradientDescentOptimizer])
def test_a_variable_as_learning_rate_is_read_at_every_step(make_optimizer):
    rate, w = Variable(0.5, trainable=False), Variable(0.0)
    optimizer = make_optimizer(rate)
    optimizer.apply_gradients([(np.float32(1.0), w)])
    rate.assign(2.0)
    optimizer.apply_gradients([(np.float32(1.0), w)])
    assert (float(w), optimizer.learning_rate, optimizer.get_config()["learning_rate"]) == (-2.5, rate, 2.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_variables_and_optimizer_goes_on(copied):
    w = Variable([1.0], name="w")
    optimizer = SGD(0.1, 0.9)
    optimizer.apply_gradients([(np.ones(1), w)])
    other, twin = copied((w, optimizer))
    for o, v in ((optimizer, w), (twin, other)):
        o.apply_gradients([(np.ones(1), v)])
    np.testing.assert_array_equal(w.numpy(), other.numpy())
    Arena([w])
    with pytest.raises(TypeError, match="an arena and its variables can't be copied"):
        copied((w, optimizer))


def test_noise_goes_by_the_variable_and_not_by_its_place():
    a, b = Variable(np.zeros(2), name="a"), Variable(np.zeros(2), name="b")
    found = []
    for order in ((a, b), (b, a)):
        pairs = GradientNoise(1.0, seed=4)([(np.zeros(2), variable) for variable in order])
        found.append({variable.name: gradient.tolist() for gradient, variable in pairs})
    assert found[0] == found[1]


def test_flags_are_settled_by_the_first_update():
    w = Variable([1.0])
    optimizer = Adam(0.1)
    optimizer.apply_gradients([(np.ones(1), w)])
    optimizer.amsgrad = True
    optimizer.apply_gradients([(np.ones(1), w)])
    assert optimizer.get_slot_names() == ["m", "v"]


def test_an_error_in_an_update_leaves_no_old_numbers_behind():
    w = Variable([1.0], constraint=lambda value: 1 / 0)
    optimizer = SGD(0.1)
    with pytest.raises(ZeroDivisionError):
        optimizer.apply_gradients([(np.ones(1), w)])
    optimizer.learning_rate = 0.5
    assert optimizer._decayed_lr(np.float32) == 0.5


def test_a_dual_averaging_optimizer_comes_back_with_the_graphs_global_step():
    step = Variable(np.int64(0), trainable=False)
    config = tf1.AdagradDAOptimizer(ExponentialDecay(0.1, 1, 0.5), step).get_config()
    with scopes.Graph().as_default():
        with pytest.raises(ValueError, match="needs a global step"):
            tf1.AdagradDAOptimizer.from_config(config)
        scopes.get_or_create_global_step()
        assert tf1.AdagradDAOptimizer.from_config(config).get_config() == config
    assert tf1.AdagradDAOptimizer.from_config(config, {"global_step": step})._global_step is step


def test_a_loss_scale_passes_on_what_the_inner_optimizer_can_do():
    assert LossScaleOptimizer(Adam(0.1)).check("beta_1", 0.5) is None
    assert LossScaleOptimizer(SGD(0.1, 0.9)).hyperparameter("momentum") == 0.9


def test_recorded_gradients_may_be_applied():
    table, w = Variable(np.ones((2, 1))), Variable([2.0])
    with GradientTape():
        loss = ops.reduce_sum(ops.gather(table, indices=[1])) * ops.reduce_sum(w * w)
        found = gradients(loss, [table, w])  # Tensors, since the tape is open
        SGD(1.0).apply_gradients(zip(found, [table, w], strict=True))
    assert (table.numpy().ravel().tolist(), w.numpy().tolist()) == ([1.0, -3.0], [-2.0])


@pytest.mark.parametrize(
    ("examples", "error"), [(-4, ValueError), (float("nan"), ValueError), ("4", TypeError), (True, TypeError)]
)
def test_numbers_of_examples_that_cannot_be_are_refused(examples, error):
    def rank(communicator):
        w = Variable(1.0)
        optimizer = SGD(0.1, gradient_aggregator=AllReduce(communicator))
        with pytest.raises(error, match="examples must be"):
            optimizer.apply_gradients([(np.float32(1.0), w)], examples=examples)
        return float(w)

    assert world(1, rank) == [1.0]


def test_none_is_not_assigned():
    w = Variable(1.0, name="w")
    with pytest.raises(TypeError, match="the value to assign to variable 'w' is None"):
        w.assign(None)


def test_regularization_losses_add_up_as_in_every_tensorflow_1_script():
    with scopes.Graph().as_default():
        w = scopes.get_variable("w", initializer=[2.0, 4.0], regularizer=l2_regularizer(0.5))
        with GradientTape() as tape:
            total = ops.add_n(scopes.get_collection("regularization_losses"))
        assert float(total) == 0.5 * 0.5 * 20
        assert tape.gradient(total, w).tolist() == [1.0, 2.0]


def test_tensorflows_names_of_cross_entropies():
    # log(1 + e^x) - x z; and log(sum e^x) - x_label
    found = ops.nn.sigmoid_cross_entropy_with_logits(labels=[1.0, 0.0], logits=Variable([0.0, 2.0]))
    np.testing.assert_allclose(found.numpy(), [np.log(2), np.log1p(np.exp(2))], rtol=1e-6)
    logits = Variable([[1.0, 3.0]])
    found = ops.nn.softmax_cross_entropy_with_logits(labels=[[0.0, 1.0]], logits=logits)
    np.testing.assert_allclose(found.numpy(), [np.log1p(np.exp(-2))], rtol=1e-6)


def test_layers_say_what_their_input_has_to_be():
    with scopes.Graph().as_default():
        with pytest.raises(TypeError, match="dense needs floating-point input, got int64"):
            layers.Dense(2)(np.ones((1, 3), np.int64))
        with pytest.raises(TypeError, match=r"units must be an integer, got 2\.5"):
            layers.Dense(2.5)


def test_a_decayed_rate_is_a_number_where_one_is_asked_for():
    assert float(exponential_decay(1.0, 3, 1, 0.5)) == 0.125


def test_a_mean_is_warned_about_even_if_the_first_batch_was_one_example():
    def rank(communicator):
        w = Variable(np.ones(1), name="w")
        optimizer = SGD(0.1, gradient_aggregator=AllReduce(communicator))
        for size in (1, 4):
            own = np.ones(size)
            optimizer.minimize(lambda own=own: ops.reduce_mean(w * own), [w], examples=size)

    with pytest.warns(UserWarning, match="the loss is a mean over this rank's examples"):
        world(1, rank)


def test_a_subclass_of_sgd_may_have_a_rule_of_its_own():
    class Ascent(SGD):
        rule, slots = _define(1), {}

        def scalars(self, values, step):
            return {"rate": values["learning_rate"]}

    w = Variable(0.0)
    Ascent(0.5).apply_gradients([(np.float32(1.0), w)])
    assert float(w) == 0.5


def test_an_empty_matrix_is_no_trouble():
    w, empty = Variable(np.ones((2, 2)), name="w"), Variable(np.ones((0, 3)), name="empty")
    optimizer = make("Muon")
    optimizer.apply_gradients([(np.ones((2, 2)), w), (np.ones((0, 3)), empty)])
    assert optimizer.step == 1
