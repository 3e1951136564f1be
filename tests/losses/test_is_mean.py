"""Which losses are means over examples already."""

import numpy as np
import pytest

from distopt import losses, ops
from distopt.losses import Reduction, is_mean
from distopt.tape import GradientTape, Tensor
from distopt.variables import Variable

X = np.array([1.0, 2.0, 3.0, 4.0])

MEANS = {
    "reduce_mean": lambda w: ops.reduce_mean(w * X),
    "of a matrix": lambda w: ops.reduce_mean(w * X.reshape(2, 2)),
    "over examples, then summed": lambda w: ops.reduce_sum(ops.reduce_mean(w * X.reshape(2, 2), axis=0)),
    "over examples by a negative axis": lambda w: ops.reduce_mean(w * X, axis=-1),
    "with a penalty": lambda w: ops.reduce_mean(w * X) + 0.1 * ops.l2_loss(w),
    "after a penalty": lambda w: ops.add_n(ops.l2_loss(w), ops.reduce_mean(w * X)),
    "scaled": lambda w: -3.0 * ops.reduce_mean(w * X) / 2.0,
    "of a cast": lambda w: ops.cast(ops.reduce_mean(w * X), dtype=np.float32),
    "sum over number": lambda w: ops.reduce_sum(w * X) / 4,
    "mean of features, mean of examples": lambda w: ops.reduce_mean(
        losses.mean_squared_error(np.zeros((2, 2)), w * X.reshape(2, 2))
    ),
    "Keras' default": lambda w: losses.MeanSquaredError()(np.zeros((4, 1)), w * X.reshape(4, 1)),
    "Keras' default, weighted": lambda w: losses.MeanAbsoluteError()(
        np.zeros((4, 1)), w * X.reshape(4, 1), sample_weight=X
    ),
}
OTHERS = {
    "sum": lambda w: ops.reduce_sum(w * X),
    "sum of means over features": lambda w: ops.reduce_sum(ops.reduce_mean(w * X.reshape(2, 2), axis=1)),
    "Keras' sum": lambda w: losses.MeanSquaredError(Reduction.SUM)(np.zeros((2, 2)), w * X.reshape(2, 2)),
    "sum over the global batch": lambda w: ops.reduce_sum(w * X) / 8,
    "average loss of two replicas": lambda w: losses.compute_average_loss(w * X, num_replicas=2),
    "mean of one example": lambda w: ops.reduce_mean(w * X[:1]),
    "cross-entropy": lambda w: ops.sparse_softmax_cross_entropy(w * np.ones((2, 3)), labels=np.array([0, 1])),
    "penalty": lambda w: ops.l2_loss(w),
    "divided by a mean": lambda w: ops.reduce_sum(w * X) / ops.reduce_mean(w * X),
}


def recorded(loss):
    variable = Variable(np.float64(2.0))
    with GradientTape() as tape:
        return tape, variable, loss(variable)


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_means_over_examples_are_found(loss):
    assert is_mean(recorded(loss)[2])


def test_a_mean_with_a_factor_may_have_been_made_right():
    for loss in (lambda w: ops.reduce_mean(w * X) * 4.0, lambda w: ops.reduce_mean(w * X) / 2):
        tensor = recorded(loss)[2]
        assert is_mean(tensor)
        assert not is_mean(tensor, through_factors=False)
    for name in set(MEANS) - {"scaled"}:
        assert is_mean(recorded(MEANS[name])[2], through_factors=False), name


class Aggregator:
    def __init__(self, reduction, ranks):
        self.reduction = reduction
        self.communicator = type("Communicator", (), {"size": ranks})()


@pytest.mark.parametrize(
    ("reduction", "ranks", "message"),
    [
        ("mean", 1, r"reduction='mean'\) divides it by the examples again: give it the sum"),
        ("mean", 2, r"reduction='mean'\) divides it by the examples again: give it the sum"),
        ("sum", 3, r"reduction='sum'\) adds 3 of them up: give it losses.compute_average_loss"),
    ],
)
def test_the_mean_of_means_is_warned_about(reduction, ranks, message):
    aggregator = Aggregator(reduction, ranks)
    with pytest.warns(UserWarning, match=message):
        ops.warn_of_mean_of_means(recorded(MEANS["with a penalty"])[2], aggregator)
    ops.warn_of_mean_of_means(recorded(OTHERS["sum"])[2], aggregator)  # warnings are errors here
    ops.warn_of_mean_of_means(recorded(MEANS["scaled"])[2], aggregator)


@pytest.mark.parametrize("aggregator", [None, list, Aggregator("sum", 1)])
def test_a_mean_on_one_rank_is_right(aggregator):
    ops.warn_of_mean_of_means(recorded(MEANS["reduce_mean"])[2], aggregator)


@pytest.mark.parametrize("loss", OTHERS.values(), ids=OTHERS)
def test_sums_are_not_taken_for_means(loss):
    assert not is_mean(recorded(loss)[2])


def test_what_no_tape_recorded_is_not_known_to_be_a_mean():
    assert not is_mean(ops.reduce_mean(X))
    assert not is_mean(Tensor(np.float64(1.0)))
    assert not is_mean(3.0)


def test_it_does_not_disturb_the_gradient():
    tape, variable, loss = recorded(MEANS["with a penalty"])
    assert is_mean(loss)
    assert float(tape.gradient(loss, variable)) == pytest.approx(2.5 + 0.1 * 2.0)


def test_a_long_chain_of_shared_terms_is_walked_once():
    def doubled(w):
        total = ops.reduce_sum(w * X)
        for _ in range(60):  # 2**60 paths
            total = total + total
        return total

    assert not is_mean(recorded(doubled)[2])
