"""The step of optimize_loss: loss, global step, update operations, variables, and what is kept."""

import numpy as np
import pytest
from losses_of_steps import graph, make_loss

from distopt import initializers, layers, ops, schedules, scopes, summaries
from distopt.optimizers import optimize_loss
from distopt.scopes import Graph, GraphKeys, get_variable
from distopt.tape import GradientTape, Tensor
from distopt.transforms import adaptive_clipping_fn
from distopt.variables import Variable

__all__ = ["graph"]


@pytest.mark.parametrize("loss", [None, lambda: None])
def test_no_loss_is_an_error(loss):
    with pytest.raises(ValueError, match="None values not supported"):
        optimize_loss(loss, None, 0.1, "SGD")()


def test_a_loss_with_axes_is_an_error():
    variable = Variable([1.0, 2.0])
    with pytest.raises(ValueError, match="Shape must be rank 0 but is rank 1"):
        optimize_loss(lambda: variable * 2.0, None, 0.1, "SGD")()
    with GradientTape():
        loss = variable * 2.0
    with pytest.raises(ValueError, match="Shape must be rank 0 but is rank 1"):
        optimize_loss(loss, None, 0.1, "SGD")
    np.testing.assert_array_equal(variable.numpy(), [1.0, 2.0])


@pytest.mark.parametrize("loss", [3.0, np.float32(3), Tensor(np.float32(3)), Variable(3.0)])
def test_a_constant_loss_is_an_error(loss):
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        optimize_loss(loss, None, 0.1, "SGD")


def test_a_loss_of_integers_is_an_error():
    variable = Variable(3)
    with pytest.raises(ValueError, match="Invalid type int32"):
        optimize_loss(lambda: variable * 2, None, 0.1, "SGD")()


def test_a_tensor_loss_serves_exactly_one_step():
    variable, step, _ = make_loss()
    with GradientTape():
        loss = variable * 5.0
    train_op = optimize_loss(loss, step, 0.1, "SGD")
    assert float(train_op()) == 50.0
    assert float(variable) == pytest.approx(9.5)
    with pytest.raises(RuntimeError, match="pass a callable"):
        train_op()
    assert float(variable) == pytest.approx(9.5)
    assert int(step.value) == 1


def test_a_variable_may_be_the_loss():
    variable = Variable(2.0)
    returned = optimize_loss(lambda: variable, None, 0.5, "SGD")()
    assert (float(returned), float(variable)) == (2.0, 1.5)


def test_arguments_of_the_step_go_to_the_loss():
    variable = Variable(2.0)
    train_op = optimize_loss(lambda x, *, y: variable * x * y, None, 0.1, "SGD")
    assert float(train_op(3.0, y=4.0)) == 24.0


def test_model_code_with_get_variable_finds_its_variables_in_every_step(graph):
    def loss(x):
        with scopes.variable_scope("layer"):
            return abs(get_variable("w", initializer=10.0) * x)

    train_op = optimize_loss(loss, None, 0.1, "SGD")
    assert [float(train_op(5.0)) for _ in range(3)] == pytest.approx([50.0, 47.5, 45.0])
    assert list(graph.variables) == ["OptimizeLoss/learning_rate", "layer/w"]


def test_it_works_inside_a_step_that_is_open(graph):
    variable, step, loss = make_loss()
    train_op = optimize_loss(loss, step, 0.1, "SGD")
    with graph.step():
        train_op(5.0)
        train_op(5.0)
    assert float(variable) == pytest.approx(9.0)


# The global step.


def test_without_a_global_step_the_graphs_is_counted():
    _, step, loss = make_loss()
    train_op = optimize_loss(loss, None, 0.1, "SGD")
    train_op(5.0)
    assert train_op.global_step is step
    assert int(step.value) == 1


def test_without_any_global_step_none_is_made():
    variable = Variable(10.0)
    train_op = optimize_loss(lambda: abs(variable), None, 0.1, "SGD")
    train_op()
    assert train_op.global_step is None
    assert scopes.get_global_step() is None


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (Variable(0.0), TypeError, "does not have integer type"),
        (Variable([0]), TypeError, "is not scalar"),
        (Tensor(np.float32(0)), TypeError, "does not have integer type"),
        (Tensor(np.zeros(1, np.int64)), TypeError, "is not scalar"),
        (Tensor(np.int64(0)), AttributeError, "assign_add"),
        (3, TypeError, "is not a Variable"),
    ],
)
def test_global_steps_that_are_refused(step, error, message):
    variable = Variable(10.0)
    with pytest.raises(error, match=message):
        optimize_loss(lambda: abs(variable), step, 0.1, "SGD")


def test_a_tensor_may_be_the_global_step_where_it_is_not_counted():
    variable = Variable(10.0)
    train_op = optimize_loss(
        lambda: abs(variable),
        Tensor(np.int64(3)),
        1.0,
        "SGD",
        learning_rate_decay_fn=lambda rate, step: schedules.exponential_decay(rate, step, 1, 0.5),
        increment_global_step=False,
    )
    train_op()
    assert float(variable) == 10 - 0.125


# Update operations.


def test_update_operations_run_in_order_after_the_loss_and_before_the_update(graph):
    variable, step, _ = make_loss()
    events = []

    def loss(x):
        events.append("loss")
        return abs(variable * x)

    for name in ("first", "second"):
        graph.add_to_collection(
            GraphKeys.UPDATE_OPS, lambda name=name: events.append((name, float(variable), int(step.value)))
        )
    train_op = optimize_loss(loss, step, 1.0, "SGD")
    train_op(1.0)
    train_op(1.0)
    assert events == [
        "loss",
        ("first", 10.0, 0),
        ("second", 10.0, 0),
        "loss",
        ("first", 9.0, 1),
        ("second", 9.0, 1),
    ]


def test_given_update_operations_replace_the_collection_and_an_empty_list_means_none(graph):
    _, step, loss = make_loss()
    events = []
    graph.add_to_collection(GraphKeys.UPDATE_OPS, lambda: events.append("collection"))
    optimize_loss(loss, step, 0.1, "SGD", update_ops=[])(1.0)
    assert events == []
    train_op = optimize_loss(loss, step, 0.1, "SGD", update_ops=[lambda: events.append("given")])
    train_op(1.0)
    train_op(1.0)
    assert events == ["given", "given"]


def test_update_operations_that_the_loss_leaves_behind_run(graph):
    variable, step, _ = make_loss()
    seen = []

    def loss(x):
        graph.add_to_collection(GraphKeys.UPDATE_OPS, lambda: seen.append(x))
        return abs(variable * x)

    train_op = optimize_loss(loss, step, 0.1, "SGD")
    for x in (1.0, 2.0, 3.0):
        train_op(x)
    assert seen == [1.0, 2.0, 3.0]


def test_batch_normalization_feeds_its_moving_averages():
    x = np.array([[1.0], [3.0]], "f4")

    def loss():
        return ops.reduce_sum(layers.batch_normalization(x, training=True, momentum=0.75, name="norm"))

    train_op = optimize_loss(loss, None, 0.1, "SGD")
    train_op()
    train_op()
    (mean,) = [v for v in scopes.global_variables() if v.name == "norm/moving_mean"]
    np.testing.assert_allclose(mean.numpy(), [2.0 * (1 - 0.75**2)])


def test_update_operations_of_a_recorded_loss_run(graph):
    variable, events = Variable(1.0), []
    with graph.step(), GradientTape():
        loss = variable * 2.0
        graph.add_to_collection(GraphKeys.UPDATE_OPS, lambda: events.append("update"))
    optimize_loss(loss, None, 0.5, "SGD")()
    assert (events, float(variable)) == (["update"], 0.0)


# Variables.


def test_only_the_given_variables_are_trained_also_those_that_are_not_trainable():
    first, second = Variable(1.0, name="a"), Variable(1.0, trainable=False, name="b")
    optimize_loss(lambda: first * 2.0 + second * 3.0, None, 1.0, "SGD", variables=[second])()
    assert (float(first), float(second)) == (1.0, -2.0)


def test_variables_that_are_no_variables_are_refused():
    variable = Variable(1.0)
    with pytest.raises(ValueError, match="No variables to optimize"):
        optimize_loss(lambda: abs(variable), None, 0.1, "SGD", variables=[])
    with pytest.raises(TypeError, match="not a Variable"):
        optimize_loss(lambda: abs(variable), None, 0.1, "SGD", variables=[variable, 3])


def test_no_gradient_at_all_is_an_error():
    used, other = Variable(1.0, name="used"), Variable(1.0, name="other")
    train_op = optimize_loss(lambda: abs(used), None, 0.1, "SGD", variables=[other])
    with pytest.raises(ValueError, match="No gradients provided for any variable"):
        train_op()


def test_variables_without_a_gradient_are_left_alone_without_slots():
    used = get_variable("used", initializer=1.0)
    get_variable("other", initializer=1.0)
    train_op = optimize_loss(
        lambda: abs(used), None, 0.1, "Adam", summaries=["gradients"], gradient_multipliers={"used": 2.0}
    )
    train_op()
    assert [v.name for v in train_op.optimizer.variables() if "other" in v.name] == []
    assert [s.tag for s in summaries.merge_all()] == ["OptimizeLoss/gradients/used_0"]


# What is kept between steps.


def _resumable(state=None):
    with Graph().as_default():
        variable, step, loss = make_loss(1.0)
        train_op = optimize_loss(
            loss,
            step,
            0.1,
            "Adam",
            gradient_noise_scale=0.5,
            clip_gradients=adaptive_clipping_fn(global_step=step),
            learning_rate_decay_fn=lambda rate, step: schedules.exponential_decay(rate, step, 1, 0.9),
        )
        if state is not None:
            variable.assign(state.pop("test"))
            step.assign(state.pop("global_step"))
            train_op.load_state(state, [variable])
        return variable, step, train_op


def test_a_run_goes_on_from_its_state():
    variable, step, train_op = _resumable()
    for x in (1.0, 20.0, 3.0):
        train_op(x)
    train_op.learning_rate.assign(0.7)
    saved = {"test": variable.numpy(), "global_step": step.numpy(), **train_op.state()}
    other, _, resumed = _resumable(saved)
    assert [v.name for v in resumed.variables()] == [v.name for v in train_op.variables()]
    for x in (4.0, 500.0):
        assert float(resumed(x)) == float(train_op(x))
    np.testing.assert_array_equal(other.numpy(), variable.numpy())
    assert float(other) != 1.0


@pytest.mark.parametrize("change", ["missing", "shape", "strange"])
def test_a_state_that_does_not_fit_is_refused(change):
    _, _, train_op = _resumable()
    train_op(1.0)
    state = train_op.state()
    if change == "missing":
        del state["OptimizeLoss/learning_rate"]
    elif change == "shape":
        state["OptimizeLoss/AdaptiveMaxNorm/mean"] = np.zeros(2)
    else:
        state["w/other"] = np.zeros(())
    variable, step, _ = _resumable()
    with pytest.raises(ValueError, match="saved"):
        _resumable({"test": variable.numpy(), "global_step": step.numpy(), **state})


def _unnamed(x):
    return ops.reduce_sum(layers.dense(x, 1, use_bias=False, kernel_initializer=initializers.Constant(2.0)))


_ONE = np.ones((1, 1), "f4")


def test_losses_of_two_training_steps_do_not_share_variables_by_accident():
    first = optimize_loss(lambda: _unnamed(_ONE), None, 0.5, "SGD", name="first")
    second = optimize_loss(lambda: _unnamed(_ONE) * 3.0, None, 0.5, "SGD", name="second")
    first()
    message = (
        "Variable dense/weights already exists, disallowed: the training step 'first/train' made it, and "
    )
    with pytest.raises(ValueError, match=message + "'second/train'.*reuse=AUTO_REUSE"):
        second()
    (kernel,) = scopes.trainable_variables()
    assert float(kernel.numpy()[0, 0]) == 1.5  # 2 - 0.5 * 1: of the first step alone
    first()
    assert float(kernel.numpy()[0, 0]) == 1.0


def test_variables_that_are_not_shared_by_name_are_not_shared_by_accident_either():
    first = optimize_loss(lambda: scopes.new_variable(1.0, name="w") * 2.0, None, 0.5, "SGD")
    second = optimize_loss(lambda: scopes.new_variable(1.0, name="w") * 3.0, None, 0.5, "SGD")
    first()
    with pytest.raises(ValueError, match="Variable w already exists, disallowed: the training step"):
        second()


def test_training_steps_share_variables_on_purpose_with_auto_reuse_or_one_loss():
    def loss(factor):
        with scopes.variable_scope("shared", reuse=scopes.AUTO_REUSE):
            return abs(get_variable("w", (), initializer=initializers.Constant(8.0))) * factor

    optimize_loss(lambda: loss(1.0), None, 1.0, "SGD")()
    optimize_loss(lambda: loss(2.0), None, 1.0, "SGD")()
    (w,) = scopes.trainable_variables()
    assert float(w) == 5.0  # 8 - 1 - 2

    def unnamed():
        return _unnamed(_ONE)

    for rate in (0.25, 0.5):  # one loss, trained in two ways
        optimize_loss(unnamed, None, rate, "SGD", variables=None)()
    kernel = scopes.trainable_variables()[1]
    assert (len(scopes.trainable_variables()), float(kernel.numpy()[0, 0])) == (2, 1.25)  # 2 - 0.25 - 0.5


def test_a_training_step_called_twice_in_an_open_step_finds_its_variables_again(graph):
    collected, outer = [], []

    def loss():
        graph.add_to_collection(GraphKeys.LOSSES, "loss")
        value = _unnamed(_ONE)
        named = layers.dense(_ONE, 1, use_bias=False, name="named", kernel_initializer=initializers.Ones())
        own = scopes.new_variable(1.0, name="own")
        collected.append(graph.get_collection(GraphKeys.LOSSES))
        return value + ops.reduce_sum(named) + own * 2.0

    train_op = optimize_loss(loss, None, 0.25, "SGD")
    other = optimize_loss(lambda: _unnamed(_ONE), None, 0.25, "SGD")
    for _ in range(2):
        with graph.step():
            graph.add_to_collection(GraphKeys.LOSSES, "outer")
            outer.append(scopes.new_variable(5.0, name="outer"))
            train_op()
            other()
            get_variable("between", (), trainable=False)
            train_op()
            with pytest.raises(ValueError, match="Variable named/weights already exists"):
                layers.dense(_ONE, 1, name="named")
            with pytest.raises(ValueError, match="Variable between already exists"):
                get_variable("between", (), trainable=False)
    found = {v.name: float(v.numpy().ravel()[0]) for v in scopes.trainable_variables()}
    # 2 * 2 calls of one, 2 of the other, which has a layer of its own.
    assert found == {
        "outer": 5.0,
        "dense/weights": 1.0,
        "named/weights": 0.0,
        "own": -1.0,
        "dense_1/weights": 1.5,
    }
    assert outer[0] is outer[1]
    assert collected == [["outer", "loss"]] * 4


def test_update_operations_may_change_what_the_loss_has_read():
    w, u = Variable(np.ones((1, 1)), name="w"), Variable(np.full((1, 1), 2.0), trainable=False, name="u")
    train_op = optimize_loss(
        lambda: ops.reduce_sum(ops.square(ops.matmul(w, u))),
        None,
        0.125,
        "SGD",
        update_ops=[lambda: u.assign([[1.0]])],
        variables=[w],
    )
    assert float(train_op()) == 4.0  # and the gradient, 2 w u^2 = 8, is that of the old u
    assert (w.numpy().tolist(), u.numpy().tolist()) == ([[0.0]], [[1.0]])
