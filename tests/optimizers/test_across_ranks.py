"""One update on several ranks: clips after the sum, sparse rows, missing gradients, uneven shards."""

import numpy as np
import pytest

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.optimizers import SGD, Adam, tf1
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable


def test_clips_see_the_sum_over_ranks():
    # Gradients 1 and 2, clipvalue 2: the sum 3 is clipped to 2, not each part.
    def rank(communicator):
        w = Variable(0.0)
        optimizer = SGD(1.0, clipvalue=2.0, gradient_aggregator=AllReduce(communicator, "sum"))
        optimizer.apply_gradients([(np.float32(1 + communicator.rank), w)])
        return float(w)

    assert world(2, rank) == [-2.0, -2.0]


def test_without_aggregation_transforms_still_run():
    def rank(communicator):
        w = Variable(0.0)
        optimizer = SGD(1.0, clipvalue=0.5, gradient_aggregator=AllReduce(communicator, "sum"))
        pairs = [(np.float32(1 + communicator.rank), w)]
        optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        return float(w)

    assert world(2, rank) == [-0.5, -0.5]


def test_an_identity_aggregator_lets_ranks_diverge_as_in_keras():
    def rank(communicator):
        w = Variable(0.0)
        optimizer = SGD(1.0, gradient_aggregator=lambda pairs: pairs)
        optimizer.apply_gradients([(np.float32(3 + 2 * communicator.rank), w)])
        return float(w)

    assert world(2, rank) == [-3.0, -5.0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_of_all_ranks_are_summed_before_they_are_squared(ranks):
    # Rank r has r copies of row 0 with gradient 1 (rank 0 none), so v sees (sum of r) ** 2.
    total = sum(range(ranks))

    def rank(communicator):
        w = Variable(np.zeros((3, 1)), name="table")
        optimizer = Adam(0.1, beta_1=0.0, beta_2=0.0, gradient_aggregator=AllReduce(communicator, "sum"))
        copies = communicator.rank
        slices = IndexedSlices(np.ones((copies, 1)), np.zeros(copies, np.int64), (3, 1))
        optimizer.apply_gradients([(slices, w)])
        return optimizer.get_slot(w, "v").numpy().ravel().tolist()

    assert world(ranks, rank) == [[float(total**2), 0.0, 0.0]] * ranks


@pytest.mark.parametrize("arena", [False, True])
def test_ranks_agree_on_which_variables_have_a_gradient(arena):
    # "a" has a gradient on rank 2 only, "b" on none, "c" on all.
    def rank(communicator):
        a, b, c = (Variable([1.0], name=name) for name in "abc")
        if arena:
            Arena([a, b, c])
        optimizer = tf1.MomentumOptimizer(1.0, 0.5, gradient_aggregator=AllReduce(communicator, "sum"))
        only = np.ones(1, "f4") if communicator.rank == 2 else None
        optimizer.apply_gradients([(only, a), (None, b), (np.ones(1, "f4"), c)])
        slots = [optimizer.get_slot(v, "momentum") is not None for v in (a, b, c)]
        return [float(v.numpy()[0]) for v in (a, b, c)], slots

    assert world(3, rank) == [([0.0, 1.0, -2.0], [True, False, True])] * 3


def test_no_gradient_on_any_rank_is_an_error_on_all():
    def rank(communicator):
        w = Variable([1.0], name="w")
        optimizer = SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum"))
        with pytest.raises(ValueError, match="No gradients provided for any variable: 'w'"):
            optimizer.apply_gradients([(None, w)])
        return float(w.numpy()[0])

    assert world(2, rank) == [1.0, 1.0]


_X = np.array([1.0, 2.0, 3.0, 4.0])
_SHARDS = {2: [(0, 3), (3, 4)], 3: [(0, 4), (4, 4), (4, 4)], 4: [(0, 1), (1, 1), (1, 3), (3, 4)]}


@pytest.mark.parametrize("ranks", _SHARDS)
@pytest.mark.parametrize("make", [SGD, Adam, tf1.AdamOptimizer], ids=lambda make: make.__name__)
def test_ranks_on_uneven_and_empty_shards_train_as_one_process_does(ranks, make):
    # y = w * x; the mean gradient over the batch is mean(x) = 2.5 whatever the shards.
    def train(communicator, shard):
        w = Variable(np.array([1.0]), name="w")
        optimizer = make(0.1, gradient_aggregator=AllReduce(communicator, "mean"))
        for _ in range(3):
            own = _X[slice(*shard)]
            optimizer.minimize(lambda own=own: ops.reduce_sum(w * own), var_list=[w], examples=len(own))
        return w.numpy()[0]

    whole = world(1, lambda communicator: train(communicator, (0, 4)))[0]
    if make is SGD:
        assert whole == pytest.approx(1.0 - 3 * 0.1 * 2.5)
    found = world(ranks, lambda communicator: train(communicator, _SHARDS[ranks][communicator.rank]))
    assert found == [whole] * ranks


def test_means_of_means_are_too_big_by_the_number_of_ranks():
    # Keras' trap: reduce_mean on each of 2 ranks, summed, is 5.0 where 2.5 is right.
    def rank(communicator):
        w = Variable(np.array([0.0]), name="w")
        own = _X[2 * communicator.rank :][:2]
        optimizer = SGD(1.0, gradient_aggregator=AllReduce(communicator, "sum"))
        optimizer.minimize(lambda: ops.reduce_mean(w * own), [w])
        return -w.numpy()[0]

    with pytest.warns(UserWarning, match="the loss is a mean over this rank's examples"):
        assert world(2, rank) == pytest.approx([1.5 + 3.5] * 2)


def test_callable_hyperparameters_are_asked_once_per_step():
    asked = []

    def rank(communicator):
        def rate():
            asked.append(communicator.rank)
            return 1.0

        w = Variable(np.zeros(2), name="w")
        optimizer = SGD(rate, gradient_aggregator=AllReduce(communicator, "sum"))
        optimizer.apply_gradients([(np.ones(2), w)])

    world(2, rank)
    assert sorted(asked) == [0, 1]
