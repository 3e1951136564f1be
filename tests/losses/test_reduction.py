"""Reductions, and what several ranks divide by. Expected values are arithmetic, or section 3.3's numbers."""

import numpy as np
import pytest

from distopt import losses, ops
from distopt.aggregators import AllReduce, Ticket
from distopt.communicators import LocalCommunicator
from distopt.losses import Reduction, compute_average_loss, compute_weighted_loss, scale_regularization_loss
from distopt.tape import GradientTape
from distopt.testing import world
from distopt.variables import Variable


class TwoRanks:
    size = 2


PER_EXAMPLE = np.array([2.5, 3.5], np.float32)


def test_values_are_those_of_keras():
    assert Reduction.all() == ("auto", "none", "sum", "sum_over_batch_size")
    for key in Reduction.all():
        Reduction.validate(key)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("none", [2.5, 3.5]), ("sum", 6.0), ("sum_over_batch_size", 3.0), ("auto", 3.0)],
)
def test_reductions_of_two_losses(reduction, expected):
    found = compute_weighted_loss(PER_EXAMPLE, reduction=reduction)
    assert found.numpy().tolist() == expected
    assert found.dtype == np.float32


def test_weights_do_not_change_the_divisor():
    weights = np.array([1.0, 0.0])
    assert float(compute_weighted_loss(PER_EXAMPLE, weights)) == 1.25  # and not 2.5
    assert float(compute_weighted_loss(PER_EXAMPLE, weights, Reduction.SUM)) == 2.5
    each = compute_weighted_loss(PER_EXAMPLE, weights, Reduction.NONE)
    assert each.numpy().tolist() == [2.5, 0.0]
    assert each.dtype == np.float32


@pytest.mark.parametrize("weights", [2.0, [2.0, 2.0], np.full((2, 1), 2.0), Variable([2.0, 2.0])])
def test_weights_may_be_a_number_or_a_column(weights):
    assert compute_weighted_loss(PER_EXAMPLE, weights, "none").numpy().tolist() == [5.0, 7.0]


def test_weights_of_examples_spread_over_further_axes():
    many = np.array([[1.0, 2.0], [3.0, 4.0]])
    found = compute_weighted_loss(many, np.array([10.0, 0.0]), "none")
    assert found.numpy().tolist() == [[10.0, 20.0], [0.0, 0.0]]
    assert float(compute_weighted_loss(many, np.array([10.0, 0.0]))) == 30.0 / 4


@pytest.mark.parametrize("shape", [(3,), (1, 2), (2, 2), (2, 3, 1)])
def test_weights_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"don't fit losses of shape \(2,\)"):
        compute_weighted_loss(PER_EXAMPLE, np.ones(shape))


def test_an_empty_batch_has_the_loss_zero():
    assert float(compute_weighted_loss(np.zeros(0))) == 0.0
    assert float(compute_average_loss(np.zeros(0), global_batch_size=4)) == 0.0
    assert float(compute_average_loss(np.zeros(0))) == 0.0


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match=r"^Invalid Reduction Key: 'mean'"):
        compute_weighted_loss(PER_EXAMPLE, reduction="mean")
    with pytest.raises(ValueError, match=r"^Invalid Reduction Key: 'mean'"):
        losses.MeanSquaredError("mean")


@pytest.mark.parametrize("reduction", ["auto", "sum_over_batch_size"])
def test_a_mean_over_a_ranks_own_examples_is_refused_on_several_ranks(reduction):
    with pytest.raises(ValueError, match=r"^Please use Reduction.SUM or Reduction.NONE .* are 2"):
        compute_weighted_loss(PER_EXAMPLE, reduction=reduction, communicator=TwoRanks())
    loss = losses.MeanSquaredError(reduction, communicator=TwoRanks())
    with pytest.raises(ValueError, match=r"^Please use Reduction.SUM or Reduction.NONE"):
        loss(np.zeros((2, 1)), np.ones((2, 1)))
    alone = losses.MeanSquaredError(reduction, communicator=LocalCommunicator())
    assert float(alone(np.zeros((2, 1)), np.ones((2, 1)))) == 1.0


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_sums_and_single_losses_are_right_on_several_ranks(reduction):
    found = compute_weighted_loss(PER_EXAMPLE, reduction=reduction, communicator=TwoRanks())
    assert found.numpy().sum() == 6.0


def test_average_loss_of_two_replicas():
    each = np.array([1.0, 2.0, 3.0])
    assert float(compute_average_loss(each)) == 2.0
    assert float(compute_average_loss(each, communicator=TwoRanks())) == 1.0
    assert float(compute_average_loss(each, num_replicas=2)) == 1.0
    assert float(compute_average_loss(each, global_batch_size=10, num_replicas=2)) == pytest.approx(0.6)
    assert float(compute_average_loss(each, np.array([1.0, 0.0, 1.0]), global_batch_size=8)) == 0.5


def test_average_loss_counts_examples_and_not_elements():
    assert float(compute_average_loss(np.ones((2, 5)), num_replicas=2)) == 10 / 4


def test_average_loss_refuses_what_it_cannot_average():
    with pytest.raises(ValueError, match="one loss for each example, got a scalar"):
        compute_average_loss(np.float32(3.0))
    with pytest.raises(ValueError, match=r"^global_batch_size must be scalar"):
        compute_average_loss(PER_EXAMPLE, global_batch_size=[4])
    with pytest.raises(TypeError, match=r"^global_batch_size must be an int, got 4\.0"):
        compute_average_loss(PER_EXAMPLE, global_batch_size=4.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        compute_average_loss(PER_EXAMPLE, global_batch_size=0)
    with pytest.raises(ValueError, match="not both"):
        compute_average_loss(PER_EXAMPLE, communicator=TwoRanks(), num_replicas=2)
    with pytest.raises(ValueError, match="num_replicas must be at least 1, got 0"):
        scale_regularization_loss(PER_EXAMPLE, num_replicas=0)


@pytest.mark.parametrize("penalties", [[1.0, 2.0, 3.0], np.array([1.0, 2.0, 3.0]), 6.0, [Variable(6.0)]])
def test_penalties_are_divided_by_the_replicas(penalties):
    assert float(scale_regularization_loss(penalties)) == 6.0
    assert float(scale_regularization_loss(penalties, TwoRanks())) == 3.0
    assert float(scale_regularization_loss(penalties, num_replicas=3)) == 2.0


def test_no_penalties_are_zero():
    assert float(scale_regularization_loss([])) == 0.0


def gradient_of_two_ranks(loss_of, parts, reduction="sum", count=False):
    """Return the reduced gradient by w at w = 1 of losses w * x, x split over two ranks."""

    def rank(communicator):
        weight = Variable(np.float64(1.0), name="w")
        x = np.array(parts[communicator.rank])
        with GradientTape() as tape:
            loss = loss_of(weight * x, communicator)
        pairs = [(tape.gradient(loss, weight), weight)]
        ticket = Ticket(examples=len(x)) if count else None
        ((gradient, _),) = AllReduce(communicator, reduction).reduce(pairs, ticket)
        return float(gradient)

    first, second = world(2, rank)
    assert first == second
    return first


def test_summed_means_are_too_large_and_average_losses_right():
    halves = ([1.0, 2.0], [3.0, 4.0])  # the true gradient of the mean is 2.5
    assert gradient_of_two_ranks(lambda each, c: ops.reduce_mean(each), halves) == 5.0
    assert gradient_of_two_ranks(lambda each, c: ops.reduce_sum(each), halves) == 10.0
    found = gradient_of_two_ranks(lambda each, c: compute_average_loss(each, communicator=c), halves)
    assert found == 2.5


def test_unequal_parts_are_right_with_the_global_batch():
    parts = ([1.0], [2.0, 3.0, 4.0])
    by_size = gradient_of_two_ranks(lambda each, c: compute_average_loss(each, global_batch_size=4), parts)
    by_count = gradient_of_two_ranks(
        lambda each, c: compute_weighted_loss(each, None, Reduction.SUM, c), parts, "mean", count=True
    )
    assert by_size == by_count == 2.5
    means = gradient_of_two_ranks(lambda each, c: ops.reduce_mean(each), parts)
    assert means / 2 == 2.0  # no factor makes it 2.5 for all splits


def test_penalties_of_all_replicas_sum_to_the_penalty_once():
    found = gradient_of_two_ranks(
        lambda each, c: scale_regularization_loss([3.0 * each, each], c), ([1.0], [1.0])
    )
    assert found == 4.0
