"""optimize_loss: the recorded cases, the order of effects, every error, and several ranks."""

import itertools

import numpy as np
import pytest
from recorded import recorded

from distopt import layers, ops, optimizers, schedules, scopes, summaries
from distopt.aggregators import AllReduce
from distopt.optimizers import SGD, Adam, optimize_loss, tf1
from distopt.scopes import Graph, GraphKeys, get_variable
from distopt.tape import GradientTape, Tensor
from distopt.testing import world
from distopt.transforms import adaptive_clipping_fn
from distopt.variables import Arena, IndexedSlices, Variable

_KINDS = {
    "class": tf1.GradientDescentOptimizer,
    "fn": lambda rate: tf1.GradientDescentOptimizer(learning_rate=rate),
}


@pytest.fixture(autouse=True)
def graph():
    with Graph(seed=3).as_default() as graph:
        yield graph


def _setup(value=10.0):
    variable = get_variable("test", initializer=value)
    return variable, scopes.get_or_create_global_step(), lambda x: abs(variable * x)


def _arguments(case, step):
    """Turn a case's recorded text of its arguments into the arguments."""
    known = {"learning_rate": 0.1}
    for name, text in case["kwargs_repr"].items():
        if name == "optimizer":
            known[name] = _KINDS.get(case["name"]) or text.strip("'")
        elif name == "gradient_multipliers":
            known[name] = {"test:0": 7.0}
        elif name == "learning_rate_decay_fn":
            # The recorder's function is not in the file; a rate that stays is what its numbers show.
            known[name] = lambda rate, step: schedules.exponential_decay(rate, step, 1000, 1.0)
        elif name == "clip_gradients":
            known[name] = adaptive_clipping_fn(global_step=step) if "function" in text else float(text)
        elif name == "summaries":
            known[name] = list(optimizers.OPTIMIZER_SUMMARIES)
        elif name == "increment_global_step":
            known[name] = text == "True"
    return known


@pytest.mark.parametrize("case", recorded()["optimize_loss"], ids=lambda case: case["name"])
def test_recorded(case):
    variable, step, loss = _setup(case["init_var"])
    train_op = optimize_loss(loss, step, **_arguments(case, step))
    for number, x in enumerate(case["x_feeds"]):
        returned = train_op(x)
        np.testing.assert_allclose(float(returned), case["returned"][number], rtol=2e-4)
        np.testing.assert_allclose(variable.numpy(), case["var_after"][number], rtol=2e-4)
        assert int(step.value) == case["global_step"][number]
    tags = [summary.tag for summary in summaries.merge_all()]
    assert sorted(tags) == case["summary_tags"]
    everything = [*scopes.global_variables(), *train_op.variables()]
    names = {f"{variable.name}:0" for variable in everything}
    assert names == set(case["variables"])


def test_no_summary_piles_up_over_steps_and_each_is_the_latest():
    _, step, loss = _setup()
    train_op = optimize_loss(loss, step, 0.1, "SGD")
    for _ in range(3):
        train_op(5.0)
    (found,) = summaries.merge_all(scope="OptimizeLoss/loss")
    assert float(found.numpy()) == pytest.approx(45.0)  # 50, 47.5, 45
    assert len(scopes.get_collection(GraphKeys.SUMMARIES)) == 2


def test_the_second_call_gets_a_scope_of_its_own():
    _, step, loss = _setup()
    first = optimize_loss(loss, step, 0.1, "Adam")
    second = optimize_loss(loss, step, 0.2, "Adam")
    assert (first.name, second.name) == ("OptimizeLoss/train", "OptimizeLoss_1/train")
    second(1.0)
    assert [v.name for v in second.variables()] == [
        "OptimizeLoss_1/learning_rate",
        "OptimizeLoss_1/beta1_power",
        "OptimizeLoss_1/beta2_power",
        "OptimizeLoss_1/test/Adam",
        "OptimizeLoss_1/test/Adam_1",
    ]
    assert {s.tag for s in summaries.merge_all()} == {
        "OptimizeLoss_1/loss",
        "OptimizeLoss_1/global_norm/gradient_norm",
    }
    assert scopes.get_collection(GraphKeys.TRAIN_OP) == [first, second]


def test_a_name_of_ones_own_is_that_of_the_scope():
    _, step, loss = _setup()
    train_op = optimize_loss(loss, step, 0.1, "SGD", name="head")
    assert train_op.learning_rate.name == "head/learning_rate"
    with pytest.raises(ValueError, match="'head/learning_rate' already exists"):
        optimize_loss(loss, step, 0.1, "SGD", name="head")


# What may be given for the optimizer and its learning rate.


@pytest.mark.parametrize(
    "optimizer",
    ["SGD", tf1.GradientDescentOptimizer, lambda rate: tf1.GradientDescentOptimizer(rate), SGD],
    ids=["name", "class", "function", "Keras class"],
)
def test_the_learning_rate_variable_can_be_assigned_to(optimizer):
    variable, step, loss = _setup()
    train_op = optimize_loss(loss, step, 0.1, optimizer)
    train_op(5.0)  # 10 - 0.1 * 5
    train_op.learning_rate.assign(1.0)
    train_op(5.0)  # 9.5 - 5
    assert float(variable) == pytest.approx(4.5)


@pytest.mark.parametrize("of", [tf1.GradientDescentOptimizer, SGD])
def test_an_instance_is_used_as_it_is_and_the_learning_rate_ignored(of):
    variable, step, loss = _setup()
    optimizer = of(0.5)
    train_op = optimize_loss(loss, step, 0.1, optimizer)
    train_op(1.0)
    assert train_op.optimizer is optimizer
    assert optimizer.gradient_aggregator is None
    assert float(variable) == 9.5


def test_a_function_without_a_learning_rate_is_called_without_arguments():
    variable, step, loss = _setup()
    optimize_loss(loss, step, None, lambda: tf1.GradientDescentOptimizer(0.5))(1.0)
    assert float(variable) == 9.5


def test_a_function_may_compute_with_the_learning_rate():
    variable, step, loss = _setup()
    made = optimize_loss(
        loss, step, 0.5, lambda rate: tf1.GradientDescentOptimizer((1 + rate * 4 - 1) ** 2 / 8)
    )
    made(1.0)  # (0.5 * 4) ** 2 / 8 = 0.5
    made.learning_rate.assign(1.0)
    made(1.0)  # 4 ** 2 / 8 = 2
    assert float(variable) == 10.0 - 0.5 - 2.0


@pytest.mark.parametrize("make", [Variable, lambda value: Tensor(np.float32(value))])
def test_a_learning_rate_without_axes_is_used_as_it_is(make):
    variable, step, loss = _setup()
    train_op = optimize_loss(loss, step, make(0.5), "SGD")
    train_op(1.0)
    assert float(variable) == 9.5
    assert train_op.learning_rate is None
    assert "OptimizeLoss/learning_rate" not in {v.name for v in scopes.global_variables()}


def test_a_learning_rate_of_numpys_double_is_a_python_float():
    variable, step, loss = _setup()
    optimize_loss(loss, step, np.float64(0.5), "SGD")(1.0)
    assert float(variable) == 9.5


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (-0.1, "Invalid learning_rate -0.1"),
        (float("nan"), "Invalid learning_rate nan"),
        (1, "Learning rate should be 0d Tensor or float"),
        (np.float32(0.1), "Learning rate should be 0d Tensor or float"),
        (lambda: 0.1, "Learning rate should be 0d Tensor or float"),
        (schedules.ExponentialDecay(0.1, 1, 0.5), "Learning rate should be 0d Tensor or float"),
        (Variable([0.1, 0.2]), "Learning rate should be 0d Tensor or float"),
        ("0.1", "Learning rate should be 0d Tensor or float"),
    ],
)
def test_learning_rates_that_are_refused(rate, message):
    _, step, loss = _setup()
    with pytest.raises(ValueError, match=message):
        optimize_loss(loss, step, rate, "SGD")


@pytest.mark.parametrize(
    ("optimizer", "rate", "message"),
    [
        ("SGD", None, "Learning rate is None, but should be specified if optimizer is string"),
        (SGD, None, "Learning rate is None, but should be specified if optimizer is class"),
        ("sgd", 0.1, r"Optimizer name should be one of \[Adagrad, Adam, Ftrl, Momentum, RMSProp, SGD\], you"),
        (lambda rate: "SGD", 0.1, "Unrecognized optimizer: function should return"),
        (lambda: None, None, "Unrecognized optimizer: function should return"),
        (Variable, 0.1, "Unrecognized optimizer: function should return"),
        (3, 0.1, "Unrecognized optimizer: should be string"),
        (None, 0.1, "Unrecognized optimizer: should be string"),
    ],
)
def test_optimizers_that_are_refused(optimizer, rate, message):
    _, step, loss = _setup()
    with pytest.raises(ValueError, match=message):
        optimize_loss(loss, step, rate, optimizer)


def test_the_names_are_those_of_tensorflow():
    assert sorted(optimizers.OPTIMIZER_CLS_NAMES) == ["Adagrad", "Adam", "Ftrl", "Momentum", "RMSProp", "SGD"]
    assert set(optimizers.OPTIMIZER_SUMMARIES) == {
        "learning_rate",
        "loss",
        "gradients",
        "gradient_norm",
        "global_gradient_norm",
    }


def test_momentum_by_name_has_a_momentum_of_nine_tenths():
    variable, step, loss = _setup()
    train_op = optimize_loss(loss, step, 0.1, "Momentum")
    train_op(1.0)
    train_op(1.0)
    assert float(variable) == pytest.approx(10.0 - 0.1 * (1 + 1.9))


# The learning rate's decay.


def test_the_decay_function_sees_the_step_before_it_is_counted():
    variable, step, loss = _setup()
    seen = []

    def decay(rate, step):
        seen.append(int(step.value))
        return rate * 0.5 ** float(step)

    train_op = optimize_loss(loss, step, 1.0, "SGD", learning_rate_decay_fn=decay, summaries=[])
    for _ in range(3):
        train_op(1.0)
    assert set(seen) == {0, 1, 2}
    assert float(variable) == pytest.approx(10 - 1 - 0.5 - 0.25)


def test_a_decay_function_of_schedules_is_read_in_every_step_and_summarised():
    variable, step, loss = _setup()
    train_op = optimize_loss(
        loss, step, 1.0, "SGD", learning_rate_decay_fn=lambda r, s: schedules.exponential_decay(r, s, 1, 0.5)
    )
    train_op(1.0)
    train_op.learning_rate.assign(8.0)
    train_op(1.0)
    assert float(variable) == pytest.approx(10 - 1 - 4)
    (found,) = summaries.merge_all(scope="OptimizeLoss/learning_rate")
    assert (found.tag, float(found.numpy())) == ("OptimizeLoss/learning_rate_1", 4.0)


def test_a_decay_function_needs_a_global_step():
    variable = Variable(10.0)
    with pytest.raises(ValueError, match=r"global_step is required for learning_rate_decay_fn\."):
        optimize_loss(lambda: abs(variable), None, 0.1, "SGD", learning_rate_decay_fn=lambda r, s: r)


def test_without_a_learning_rate_the_decay_function_is_ignored():
    variable = Variable(10.0)
    train_op = optimize_loss(
        lambda: abs(variable), None, None, lambda: SGD(0.5), learning_rate_decay_fn=lambda r, s: 1 / 0
    )
    train_op()
    assert float(variable) == 9.5


# The loss.


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
    variable, step, _ = _setup()
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
    variable, step, loss = _setup()
    train_op = optimize_loss(loss, step, 0.1, "SGD")
    with graph.step():
        train_op(5.0)
        train_op(5.0)
    assert float(variable) == pytest.approx(9.0)


# The global step.


def test_without_a_global_step_the_graphs_is_counted():
    _, step, loss = _setup()
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
    variable, step, _ = _setup()
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
    _, step, loss = _setup()
    events = []
    graph.add_to_collection(GraphKeys.UPDATE_OPS, lambda: events.append("collection"))
    optimize_loss(loss, step, 0.1, "SGD", update_ops=[])(1.0)
    assert events == []
    train_op = optimize_loss(loss, step, 0.1, "SGD", update_ops=[lambda: events.append("given")])
    train_op(1.0)
    train_op(1.0)
    assert events == ["given", "given"]


def test_update_operations_that_the_loss_leaves_behind_run(graph):
    variable, step, _ = _setup()
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


# Noise, multipliers, clips, in this order.


def test_noise_is_added_before_the_multipliers_and_those_before_the_clip():
    variable = Variable(np.zeros(1000, np.float32), name="w")
    seen = []

    def clip(pairs):
        seen.append(pairs[0][0].copy())
        return pairs

    train_op = optimize_loss(
        lambda: ops.reduce_sum(variable * 1.0),
        None,
        1.0,
        "SGD",
        gradient_noise_scale=0.01,
        gradient_multipliers={variable: 100.0},
        clip_gradients=clip,
        summaries=["global_gradient_norm"],
    )
    train_op()
    noise = (seen[0] - 100.0) / 100.0
    assert np.abs(noise).max() <= 0.0201  # cut at two standard deviations
    assert 0.8 < noise.std() / (0.88 * 0.01) < 1.2
    np.testing.assert_array_equal(variable.numpy(), -seen[0])
    (norm,) = summaries.merge_all(scope="OptimizeLoss/global_norm/gradient_norm")
    assert float(norm.numpy()) == pytest.approx(float(np.linalg.norm(seen[0].astype("f8"))), rel=1e-5)


def test_noise_is_another_in_every_step_and_in_another_training_step():
    variable = Variable(np.zeros(100, np.float32), name="w")

    def moved(train_op):
        before = variable.numpy()
        train_op()
        return variable.numpy() - before

    def make():
        return optimize_loss(
            lambda: ops.reduce_sum(variable * 1.0), None, 1.0, "SGD", gradient_noise_scale=1.0
        )

    first, second = make(), make()
    steps = [moved(first), moved(first), moved(second)]
    for a, b in itertools.combinations(steps, 2):
        assert np.abs(a - b).max() > 0.1
    (count,) = [v for v in first.variables() if "Noise" in v.name]
    assert int(count.value) == 2


def test_noise_makes_sparse_gradients_dense():
    table = Variable(np.zeros((4, 2), np.float32), name="table")
    kinds = []

    def clip(pairs):
        kinds.extend(type(gradient) for gradient, _ in pairs)
        return pairs

    for noise in (None, 1.0):
        optimize_loss(
            lambda: ops.reduce_sum(ops.gather(table, indices=np.array([1]))),
            None,
            1.0,
            "SGD",
            gradient_noise_scale=noise,
            clip_gradients=clip,
        )()
    assert kinds == [IndexedSlices, np.ndarray]
    assert np.all(table.numpy() != 0)


def test_a_callable_clip_gets_the_pairs():
    variable, step, loss = _setup()
    optimize_loss(loss, step, 1.0, "SGD", clip_gradients=lambda pairs: [(g * 0.5, v) for g, v in pairs])(4.0)
    assert float(variable) == 8.0


@pytest.mark.parametrize("clip", [1, np.float32(1.0), "1.0"])
def test_clips_that_are_refused(clip):
    _, step, loss = _setup()
    with pytest.raises(ValueError, match="Unknown type"):
        optimize_loss(loss, step, 0.1, "SGD", clip_gradients=clip)


def test_an_optimizers_own_clip_comes_after():
    variable, step, loss = _setup()
    train_op = optimize_loss(loss, step, None, SGD(1.0, clipvalue=3.0), gradient_multipliers={variable: 2.0})
    train_op(5.0)  # 5 * 2, brought to 3
    assert float(variable) == 7.0


# What is kept between steps.


def _resumable(state=None):
    with Graph().as_default():
        variable, step, loss = _setup(1.0)
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


# Summaries.


def test_unknown_summaries_are_refused():
    _, step, loss = _setup()
    with pytest.raises(ValueError, match=r"Summaries should be one of \[learning_rate, .*\], you provided w"):
        optimize_loss(loss, step, 0.1, "SGD", summaries=["loss", "weights"])


def test_summaries_are_of_clipped_gradients_but_for_the_first_norm():
    variable = get_variable("test", initializer=np.zeros(2, np.float32))
    train_op = optimize_loss(
        lambda: ops.reduce_sum(variable * np.array([3.0, 4.0], "f4")),
        None,
        0.1,
        "SGD",
        clip_gradients=1.0,
        summaries=["gradients", "gradient_norm"],
    )
    train_op()
    found = {summary.tag: summary.numpy() for summary in summaries.merge_all()}
    assert set(found) == {
        f"OptimizeLoss/{tag}"
        for tag in (
            "global_norm/gradient_norm",
            "gradients/test_0",
            "gradient_norm/test_0",
            "global_norm/clipped_gradient_norm",
        )
    }
    assert float(found["OptimizeLoss/global_norm/gradient_norm"]) == pytest.approx(5.0)
    np.testing.assert_allclose(found["OptimizeLoss/gradients/test_0"], [0.6, 0.8], rtol=1e-6)
    assert float(found["OptimizeLoss/gradient_norm/test_0"]) == pytest.approx(1.0)
    assert float(found["OptimizeLoss/global_norm/clipped_gradient_norm"]) == pytest.approx(1.0)


# Several ranks.

_FEATURES = np.random.default_rng(0).standard_normal((7, 3)).astype("f4")
_SHARDS = [slice(0, 4), slice(4, 7), slice(7, 7)]  # uneven, and an empty one


def _train(rows, aggregator, arena, **settings):
    with Graph(seed=3).as_default():
        weights = get_variable("w", initializer=np.ones((3, 1), "f4"))
        if arena:
            Arena([weights])
        step = scopes.get_or_create_global_step()
        train_op = optimize_loss(
            lambda x: ops.l2_loss(ops.matmul(x, weights)),
            step,
            0.1,
            "SGD",
            examples=len,
            gradient_aggregator=aggregator,
            **settings,
        )
        losses = [float(train_op(_FEATURES[rows])) for _ in range(3)]
        shown = {summary.tag: float(summary.numpy()) for summary in summaries.merge_all()}
        return weights.numpy(), losses, shown, int(step.value)


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_several_ranks_do_what_one_does_on_the_whole_batch(reduction, arena):
    settings = {"gradient_noise_scale": 0.5, "gradient_multipliers": {"w": 0.5}, "clip_gradients": 0.4}
    (alone,) = world(1, lambda ranks: _train(slice(0, 7), AllReduce(ranks, reduction), arena, **settings))
    several = world(
        3, lambda ranks: _train(_SHARDS[ranks.rank], AllReduce(ranks, reduction), arena, **settings)
    )
    for weights, losses, shown, steps in several:
        np.testing.assert_allclose(weights, alone[0], rtol=1e-5)
        np.testing.assert_array_equal(weights, several[0][0])  # the same bits, noise included
        np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
        assert shown == pytest.approx(alone[2], rel=1e-5)
        assert steps == 3
    first = 0.5 * float((_FEATURES.sum(axis=1) ** 2).sum()) / (7 if reduction == "mean" else 1)
    assert alone[1][0] == pytest.approx(first, rel=1e-5)


def test_the_number_of_examples_may_be_a_number():
    def trained(ranks):
        variable = Variable(0.0)
        optimize_loss(
            lambda: variable * 6.0, None, 1.0, "SGD", examples=2, gradient_aggregator=AllReduce(ranks)
        )()
        return float(variable)

    assert world(3, trained) == [-3.0] * 3


def test_noise_is_added_once_to_the_global_gradient_not_once_per_rank():
    def moved(ranks):
        with Graph().as_default():
            variable = get_variable("w", initializer=np.zeros(2000, "f4"))
            optimize_loss(
                lambda: ops.reduce_sum(variable * 0.0),
                None,
                1.0,
                "SGD",
                gradient_noise_scale=1.0,
                gradient_aggregator=AllReduce(ranks, "sum"),
            )()
            return variable.numpy()

    for weights in world(4, moved):
        assert np.abs(weights).max() <= 2.0  # of four it would be up to 8
        assert weights.std() == pytest.approx(0.88, abs=0.05)


def test_the_optimizers_own_aggregator_is_used_where_none_is_given():
    def trained(ranks):
        with Graph().as_default():
            variable = Variable(0.0, name="w")
            own = SGD(1.0, gradient_aggregator=AllReduce(ranks, "sum"))
            train_op = optimize_loss(lambda: variable * (ranks.rank + 1.0), None, None, own)
            train_op()
            return float(variable), own.gradient_aggregator.communicator is ranks

    assert world(3, trained) == [(-6.0, True)] * 3


def test_a_callable_aggregator_gets_the_gradients_that_are_there():
    variable = get_variable("a", initializer=10.0)
    get_variable("b", initializer=1.0)
    seen = []

    def double(pairs):
        seen.append([v.name for _, v in pairs])
        return [(g * 2.0, v) for g, v in pairs]

    optimize_loss(lambda: abs(variable), None, 1.0, "SGD", gradient_aggregator=double)()
    assert (float(variable), seen) == (8.0, [["a"]])


def test_averaging_without_the_number_of_examples_is_an_error():
    def run(ranks):
        variable = Variable(1.0)
        train_op = optimize_loss(lambda: abs(variable), None, 0.1, Adam, gradient_aggregator=AllReduce(ranks))
        with pytest.raises(ValueError, match="pass examples="):
            train_op()

    world(2, run)


def test_a_mean_of_means_gives_a_warning():
    def run(ranks):
        variable = Variable(np.ones(4, "f4"))
        train_op = optimize_loss(
            lambda: ops.reduce_mean(variable * variable),
            None,
            0.1,
            "SGD",
            gradient_aggregator=AllReduce(ranks, "sum"),
        )
        train_op()

    with pytest.warns(UserWarning, match="the loss is a mean over this rank's examples"):
        world(2, run)


def test_a_step_that_fails_leaves_the_optimizer_its_own_aggregator():
    optimizer = SGD(0.1, gradient_aggregator=list)
    variable = Variable(1.0)

    def fail(pairs):
        raise OSError("cut off")

    with pytest.raises(OSError, match="cut off"):
        optimize_loss(lambda: abs(variable), None, None, optimizer, gradient_aggregator=fail)()
    assert optimizer.gradient_aggregator is list
