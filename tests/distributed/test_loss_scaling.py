"""Loss scaling and optimize_loss under mpirun: valid for any number of ranks."""

import numpy as np
import pytest

from distopt import ops, scopes, summaries
from distopt.aggregators import AllReduce
from distopt.optimizers import SGD, LossScaleOptimizer, optimize_loss
from distopt.variables import Arena, Variable


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_an_overflow_on_the_last_rank_skips_the_step_on_all(communicator, reduction, arena):
    size = communicator.size
    variable = Variable(np.zeros(3, "f4"), name="w")
    if arena:
        Arena([variable])
    inner = SGD(1.0, gradient_aggregator=AllReduce(communicator, reduction))
    optimizer = LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=2)
    history = []
    for overflow in (False, True, False, False):
        factor = np.ones(3, "f4")
        if overflow and communicator.rank == size - 1:
            factor[1] = np.inf
        optimizer.minimize(lambda f=factor: ops.reduce_sum(variable * f), [variable], examples=2)
        history.append((optimizer.loss_scale, int(optimizer.iterations)))
    moved = -3.0 * size if reduction == "sum" else -1.5
    expected = [(8.0, 1), (4.0, 1), (4.0, 2), (8.0, 3)], [moved] * 3
    assert communicator.all_gather_object((history, variable.numpy().tolist())) == [expected] * size


def test_optimize_loss_trains_as_one_process_does_on_the_whole_batch(communicator):
    features = np.random.default_rng(0).standard_normal((9, 3)).astype("f4")
    cuts = np.linspace(0, 9, communicator.size + 1).astype(int)
    if communicator.size > 1:
        cuts[1] = 1  # uneven
    mine = features[cuts[communicator.rank] : cuts[communicator.rank + 1]]

    def train(rows, aggregator):
        with scopes.Graph(seed=3).as_default():
            weights = scopes.get_variable("w", initializer=np.ones((3, 1), "f4"))
            train_op = optimize_loss(
                lambda x: ops.l2_loss(ops.matmul(x, weights)) * (1.0 if aggregator else 1.0 / 9),
                scopes.get_or_create_global_step(),
                0.1,
                "Momentum",
                gradient_noise_scale=0.1,
                clip_gradients=0.5,
                examples=len,
                gradient_aggregator=aggregator,
            )
            losses = [float(train_op(rows)) for _ in range(4)]
            shown = {s.tag: float(s.numpy()) for s in summaries.merge_all()}
            return weights.numpy(), losses, shown

    weights, losses, shown = train(mine, AllReduce(communicator))
    expected, expected_losses, expected_shown = train(features, None)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert shown == pytest.approx(expected_shown, rel=1e-5)
    for other in communicator.all_gather_object(weights):
        np.testing.assert_array_equal(other, weights)
