"""Sums and counts travel together: weighted examples, and steps without any, in every kind of optimizer."""

import numpy as np
import pytest
from every import CLASSES, make, variables

from distopt import ops, schedules, transforms
from distopt.aggregators import AllReduce
from distopt.optimizers import SGD, Adam, LossScaleOptimizer, optimize_loss, tf1
from distopt.testing import world
from distopt.variables import Arena, Variable


def _gradients(own, weight):
    """Return gradients of whole numbers times a weight."""
    return [(np.arange(v.size).reshape(v.shape).astype("f4") * np.float32(weight), v) for v in own]


def _everything(optimizer, own):
    kept = [weight.numpy() for weight in optimizer.weights]
    for transformer in optimizer.gradient_transformers:
        kept += [variable.numpy() for variable in getattr(transformer, "variables", list)()]
    return [v.numpy().tobytes() for v in own] + [weight.tobytes() for weight in kept]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("arena", [True, False])
def test_a_step_without_examples_changes_nothing_in_any_optimizer(name, arena, caplog):
    def run(communicator):
        own = variables()
        if arena:
            Arena(own)
        optimizer = make(name, gradient_aggregator=AllReduce(communicator))
        optimizer.apply_gradients(_gradients(own, 1), examples=1.5)
        before, steps = _everything(optimizer, own), int(optimizer.iterations)
        optimizer.apply_gradients([(None, v) for v in own], examples=0)
        optimizer.apply_gradients(_gradients(own, 0), examples=0.0)  # all weights are 0
        assert _everything(optimizer, own) == before
        optimizer.apply_gradients(_gradients(own, 1), examples=1.5)
        assert int(optimizer.iterations) == steps + 1
        return _everything(optimizer, own) != before

    assert world(3, run) == [True] * 3
    said = [
        record.getMessage() for record in caplog.records if "no rank has an example" in record.getMessage()
    ]
    assert [message.partition(":")[0] for message in said] == ["step 1", "step 2"]


@pytest.mark.parametrize("name", CLASSES)
def test_the_first_step_without_examples_makes_no_slots_and_is_no_error(name):
    def run(communicator):
        own = variables()
        start = [v.numpy().tobytes() for v in own]
        optimizer = make(name, gradient_aggregator=AllReduce(communicator))
        optimizer.apply_gradients([(None, v) for v in own], examples=0)
        assert [v.numpy().tobytes() for v in own] == start
        return int(optimizer.iterations)

    assert world(2, run) == [0, 0]


@pytest.mark.parametrize("name", CLASSES)
def test_weighted_examples_train_as_their_weighted_mean(name):
    # Ranks 0, 1, 2 have weights 0.5, 0, 1.5: sums 0.5 g and 1.5 g over 2 are g, as one example of weight 1.
    def run(communicator, weight):
        own = variables()
        optimizer = make(name, gradient_aggregator=AllReduce(communicator))
        for _ in range(3):
            pairs = _gradients(own, weight) if weight else [(None, v) for v in own]
            optimizer.apply_gradients(pairs, examples=weight)
        return [v.numpy() for v in own]

    (expected,) = world(1, lambda communicator: run(communicator, 1.0))
    for found in world(3, lambda communicator: run(communicator, (0.5, 0, 1.5)[communicator.rank])):
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(value, wanted)


def _minimized(communicator, optimizer, own_weights, own, rounds=3):
    # The loss is the sum over examples of weight * w * x.
    (w,) = own
    x = np.arange(1.0, 1 + len(own_weights), dtype="f4")
    weights = np.asarray(own_weights, "f4")
    for _ in range(rounds):
        optimizer.minimize(
            lambda: ops.reduce_sum(w * (x * weights)), var_list=[w], examples=float(weights.sum())
        )
    return float(w.numpy())


@pytest.mark.parametrize("kind", ["keras", "tf1", "loss scale"])
def test_minimize_divides_by_the_sum_of_weights(kind):
    # Rank 0: 0.5 * 1 + 0.25 * 2; rank 1: 0.75 * 1; rank 2 has none: the mean is 1.75 / 1.5.
    shares = [[0.5, 0.25], [0.75], []]

    def run(communicator):
        aggregator = AllReduce(communicator)
        makers = {
            "keras": lambda: SGD(1.0, gradient_aggregator=aggregator),
            "tf1": lambda: tf1.GradientDescentOptimizer(1.0, gradient_aggregator=aggregator),
            "loss scale": lambda: LossScaleOptimizer(
                SGD(1.0, gradient_aggregator=aggregator), initial_scale=64.0
            ),
        }
        return _minimized(communicator, makers[kind](), shares[communicator.rank], [Variable(0.0, name="w")])

    assert world(3, run) == pytest.approx([-3 * 1.75 / 1.5] * 3, rel=1e-6)


@pytest.mark.parametrize("kind", ["keras", "tf1", "loss scale"])
def test_minimize_without_examples_leaves_schedules_scales_and_transformers_alone(kind):
    def run(communicator):
        w = Variable(2.0, name="w")
        steps = Variable(np.int64(0), trainable=False, name="global_step")
        aggregator = AllReduce(communicator)
        clipping = transforms.adaptive_clipping_fn()
        options = {"gradient_aggregator": aggregator, "gradient_transformers": [clipping]}
        rate = schedules.ExponentialDecay(0.5, 1, 0.5)
        if kind == "tf1":
            optimizer = tf1.MomentumOptimizer(0.5, 0.9, **options)
        else:
            optimizer = SGD(rate, momentum=0.9, **options)
        if kind == "loss scale":
            optimizer = LossScaleOptimizer(optimizer, dynamic_growth_steps=2)

        def minimize(examples):
            def loss():
                return ops.reduce_sum(w * np.full(examples, 3.0, "f4"))

            if kind == "tf1":
                optimizer.minimize(loss, steps, [w], examples=examples)
            else:
                optimizer.minimize(loss, [w], examples=examples)

        minimize(2)
        before = [_everything(optimizer, [w, steps]), optimizer.hyperparameter("learning_rate")]
        for _ in range(4):
            minimize(0)
        after = [_everything(optimizer, [w, steps]), optimizer.hyperparameter("learning_rate")]
        assert after == before
        minimize(2)
        return int(optimizer.iterations), int(steps.value)

    assert world(2, run) == [(2, 2 if kind == "tf1" else 0)] * 2


def test_optimize_loss_counts_weights_and_leaves_out_steps_without_examples():
    # Sums 0.5 * 2 and 1.0 * 4 over the weight 1.5.
    def run(communicator):
        w, step = Variable(0.0, name="w"), Variable(np.int64(0), trainable=False, name="global_step")
        ran = []
        train = optimize_loss(
            lambda x, weight: ops.reduce_sum(w * (x * weight)),
            step,
            1.0,
            "SGD",
            variables=[w],
            update_ops=[lambda: ran.append(1)],
            examples=lambda x, weight: float(np.sum(weight)),
            gradient_aggregator=AllReduce(communicator),
        )
        own = ([2.0], [0.5]) if communicator.rank == 0 else ([4.0], [1.0])
        x, weight = (np.array(values, "f4") for values in own)
        train(x, weight)
        after_one = float(w.numpy())
        train(x[:0], weight[:0])
        assert float(w.numpy()) == after_one
        train(x, weight)
        return after_one, float(w.numpy()), int(step.value), len(ran)

    mean = (0.5 * 2 + 4) / 1.5
    assert world(2, run) == [(pytest.approx(-mean), pytest.approx(-2 * mean), 2, 2)] * 2


def test_a_rank_that_refuses_its_count_says_so_and_the_others_don_t_hang():
    def run(communicator):
        w = Variable([1.0], name="w")
        optimizer = Adam(gradient_aggregator=AllReduce(communicator))
        examples = -2 if communicator.rank == 1 else 2
        optimizer.apply_gradients([(np.ones(1, "f4"), w)], examples=examples)

    with pytest.raises(ValueError, match="examples must be 0 or more and finite, got -2"):
        world(3, run, timeout_seconds=20)


def test_a_mean_needs_a_count_and_a_sum_does_not():
    def run(communicator):
        w = Variable([0.0], name="w")
        with pytest.raises(
            ValueError, match="the examples of the global batch, but their number was not given"
        ):
            SGD(gradient_aggregator=AllReduce(communicator)).apply_gradients([(np.ones(1, "f4"), w)])
        SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum")).apply_gradients([(np.ones(1, "f4"), w)])
        return w.numpy().tolist()

    assert world(2, run) == [[-2.0]] * 2
