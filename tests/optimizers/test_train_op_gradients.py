"""The step of optimize_loss: noise, multipliers, clips, summaries, and several ranks."""

import itertools

import numpy as np
import pytest
from losses_of_steps import graph, make_loss

from distopt import ops, scopes, summaries
from distopt.aggregators import AllReduce
from distopt.optimizers import SGD, Adam, optimize_loss
from distopt.scopes import Graph, get_variable
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

__all__ = ["graph"]


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
    variable, step, loss = make_loss()
    optimize_loss(loss, step, 1.0, "SGD", clip_gradients=lambda pairs: [(g * 0.5, v) for g, v in pairs])(4.0)
    assert float(variable) == 8.0


@pytest.mark.parametrize("clip", [1, np.float32(1.0), "1.0"])
def test_clips_that_are_refused(clip):
    _, step, loss = make_loss()
    with pytest.raises(ValueError, match="Unknown type"):
        optimize_loss(loss, step, 0.1, "SGD", clip_gradients=clip)


def test_an_optimizers_own_clip_comes_after():
    variable, step, loss = make_loss()
    train_op = optimize_loss(loss, step, None, SGD(1.0, clipvalue=3.0), gradient_multipliers={variable: 2.0})
    train_op(5.0)  # 5 * 2, brought to 3
    assert float(variable) == 7.0


# Summaries.


def test_unknown_summaries_are_refused():
    _, step, loss = make_loss()
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


def test_noise_is_the_same_where_ranks_have_gradients_of_different_variables():
    def trained(ranks):
        own = [Variable(np.zeros(5, "f4"), name=name) for name in "abc"]
        used = own if ranks.rank == 0 else [own[2], own[0]]
        optimize_loss(
            lambda: ops.add_n([ops.reduce_sum(v * 1.0) for v in used]),
            None,
            1.0,
            "SGD",
            gradient_noise_scale=1.0,
            variables=own,
            gradient_aggregator=AllReduce(ranks, "sum"),
        )()
        return np.concatenate([v.numpy() for v in own])

    first, second = world(2, trained)
    np.testing.assert_array_equal(first, second)


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
