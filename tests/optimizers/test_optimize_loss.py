"""optimize_loss: the recorded cases, its scope, and what is given for optimizer and learning rate."""

import numpy as np
import pytest
from losses_of_steps import graph, make_loss
from recorded import recorded

from distopt import optimizers, schedules, scopes, summaries
from distopt.optimizers import SGD, optimize_loss, tf1
from distopt.scopes import GraphKeys
from distopt.tape import Tensor
from distopt.transforms import adaptive_clipping_fn
from distopt.variables import Variable

__all__ = ["graph"]

_KINDS = {
    "class": tf1.GradientDescentOptimizer,
    "fn": lambda rate: tf1.GradientDescentOptimizer(learning_rate=rate),
}


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
    variable, step, loss = make_loss(case["init_var"])
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
    _, step, loss = make_loss()
    train_op = optimize_loss(loss, step, 0.1, "SGD")
    for _ in range(3):
        train_op(5.0)
    (found,) = summaries.merge_all(scope="OptimizeLoss/loss")
    assert float(found.numpy()) == pytest.approx(45.0)  # 50, 47.5, 45
    assert len(scopes.get_collection(GraphKeys.SUMMARIES)) == 2


def test_the_second_call_gets_a_scope_of_its_own():
    _, step, loss = make_loss()
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
    _, step, loss = make_loss()
    train_op = optimize_loss(loss, step, 0.1, "SGD", name="head")
    assert train_op.learning_rate.name == "head/learning_rate"
    with pytest.raises(ValueError, match="Variable head/learning_rate already exists"):
        optimize_loss(loss, step, 0.1, "SGD", name="head")


# What may be given for the optimizer and its learning rate.


@pytest.mark.parametrize(
    "optimizer",
    ["SGD", tf1.GradientDescentOptimizer, lambda rate: tf1.GradientDescentOptimizer(rate), SGD],
    ids=["name", "class", "function", "Keras class"],
)
def test_the_learning_rate_variable_can_be_assigned_to(optimizer):
    variable, step, loss = make_loss()
    train_op = optimize_loss(loss, step, 0.1, optimizer)
    train_op(5.0)  # 10 - 0.1 * 5
    train_op.learning_rate.assign(1.0)
    train_op(5.0)  # 9.5 - 5
    assert float(variable) == pytest.approx(4.5)


@pytest.mark.parametrize("of", [tf1.GradientDescentOptimizer, SGD])
def test_an_instance_is_used_as_it_is_and_the_learning_rate_ignored(of):
    variable, step, loss = make_loss()
    optimizer = of(0.5)
    train_op = optimize_loss(loss, step, 0.1, optimizer)
    train_op(1.0)
    assert train_op.optimizer is optimizer
    assert optimizer.gradient_aggregator is None
    assert float(variable) == 9.5


def test_a_function_without_a_learning_rate_is_called_without_arguments():
    variable, step, loss = make_loss()
    optimize_loss(loss, step, None, lambda: tf1.GradientDescentOptimizer(0.5))(1.0)
    assert float(variable) == 9.5


def test_a_function_may_compute_with_the_learning_rate():
    variable, step, loss = make_loss()
    made = optimize_loss(
        loss, step, 0.5, lambda rate: tf1.GradientDescentOptimizer((1 + rate * 4 - 1) ** 2 / 8)
    )
    made(1.0)  # (0.5 * 4) ** 2 / 8 = 0.5
    made.learning_rate.assign(1.0)
    made(1.0)  # 4 ** 2 / 8 = 2
    assert float(variable) == 10.0 - 0.5 - 2.0


@pytest.mark.parametrize("make", [Variable, lambda value: Tensor(np.float32(value))])
def test_a_learning_rate_without_axes_is_used_as_it_is(make):
    variable, step, loss = make_loss()
    train_op = optimize_loss(loss, step, make(0.5), "SGD")
    train_op(1.0)
    assert float(variable) == 9.5
    assert train_op.learning_rate is None
    assert "OptimizeLoss/learning_rate" not in {v.name for v in scopes.global_variables()}


def test_a_learning_rate_of_numpys_double_is_a_python_float():
    variable, step, loss = make_loss()
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
    _, step, loss = make_loss()
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
    _, step, loss = make_loss()
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
    variable, step, loss = make_loss()
    train_op = optimize_loss(loss, step, 0.1, "Momentum")
    train_op(1.0)
    train_op(1.0)
    assert float(variable) == pytest.approx(10.0 - 0.1 * (1 + 1.9))


# The learning rate's decay.


def test_the_decay_function_sees_the_step_before_it_is_counted():
    variable, step, loss = make_loss()
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
    variable, step, loss = make_loss()
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
