"""What must hold of the average over a global batch whatever the data: random cases, each by its seed."""

import numpy as np
import pytest

from distopt.aggregators import AllReduce, Ticket
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

SEEDS = range(12)
DIMENSIONS = 6


class Case:
    """Examples with weights, cut over ranks: uneven shards, some empty; whole numbers or any.

    The gradient of one example is its weight times its row, so a rank's sum is weights @ rows.
    """

    def __init__(self, seed, whole=True, ranks=None):
        self.random = np.random.default_rng(seed)
        self.ranks = ranks or int(self.random.integers(2, 6))
        self.arena = bool(self.random.integers(2))
        self.bucket_bytes = int(self.random.choice([1, 24, 1 << 20]))
        count = int(self.random.integers(1, 12))
        draw = self.random.integers(-8, 9, (count, DIMENSIONS)).astype(float)
        self.rows = draw if whole else self.random.standard_normal((count, DIMENSIONS))
        # Quarters: sums of products with whole numbers are exact in float64 and in float32.
        self.weights = self.random.integers(1, 9, count) / 4.0
        self.owner = self.random.integers(0, self.ranks, count)

    def mean(self):
        """Return the weighted mean, by arithmetic."""
        return self.weights @ self.rows / self.weights.sum()

    def reduced(self, rows=None, weights=None, owner=None, ranks=None, dtype="f8", reduction="mean"):
        """Return what all ranks get for the rows and weights that each owns."""
        rows = self.rows if rows is None else rows
        weights = self.weights if weights is None else weights
        owner = self.owner if owner is None else owner

        def run(communicator):
            mine = owner == communicator.rank
            first, second = (
                Variable(np.zeros(4, dtype), name="a"),
                Variable(np.zeros((1, 2), dtype), name="b"),
            )
            if self.arena:
                Arena([first, second])
            total = (weights[mine, None].astype(dtype) * rows[mine].astype(dtype)).sum(axis=0, dtype=dtype)
            gradients = (total[:4], total[4:].reshape(1, 2)) if mine.any() else (None, None)
            aggregator = AllReduce(communicator, reduction, self.bucket_bytes)
            pairs = zip(gradients, (first, second), strict=True)
            found = aggregator.reduce(pairs, Ticket(examples=float(weights[mine].sum())))
            return np.concatenate([np.array(g).reshape(-1) for g, _ in found])

        results = world(self.ranks if ranks is None else ranks, run)
        for other in results[1:]:
            assert other.tobytes() == results[0].tobytes()  # the same bits on every rank
        return results[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_the_average_is_the_weighted_mean_over_all_examples(seed, dtype):
    case = Case(seed)
    exact = case.weights @ case.rows
    np.testing.assert_array_equal(case.reduced(reduction="sum", dtype=dtype), exact)
    wanted = exact.astype(dtype) / np.dtype(dtype).type(case.weights.sum())
    np.testing.assert_array_equal(case.reduced(dtype=dtype), wanted)
    random = Case(seed, whole=False)
    np.testing.assert_allclose(random.reduced(), random.mean(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_linear_in_the_gradients(seed):
    case = Case(seed)
    other = case.random.integers(-8, 9, case.rows.shape).astype(float)
    combined = case.reduced(3.0 * case.rows - 2.0 * other, reduction="sum")
    separate = 3.0 * case.reduced(reduction="sum") - 2.0 * case.reduced(other, reduction="sum")
    np.testing.assert_array_equal(combined, separate)
    np.testing.assert_allclose(
        case.reduced(0.3 * case.rows - 1.7 * other), 0.3 * case.reduced() - 1.7 * case.reduced(other),
        rtol=1e-12, atol=1e-13,
    )  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
def test_shards_may_change_places_between_ranks(seed):
    case = Case(seed)
    permuted = case.random.permutation(case.ranks)[case.owner]
    assert case.reduced(owner=permuted).tobytes() == case.reduced().tobytes()
    rounded = Case(seed, whole=False)
    np.testing.assert_allclose(rounded.reduced(owner=permuted), rounded.reduced(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_examples_may_be_cut_over_ranks_in_any_way(seed):
    case = Case(seed)
    expected = case.reduced().tobytes()
    for ranks in (1, 2, 3, 5):
        owner = case.random.integers(0, ranks, len(case.rows))
        assert case.reduced(owner=owner, ranks=ranks).tobytes() == expected
    everything_on_the_last = np.full(len(case.rows), 2)
    assert case.reduced(owner=everything_on_the_last, ranks=3).tobytes() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_may_be_split_into_two(seed):
    case = Case(seed)
    split = np.where((case.owner == 0) & (case.random.random(len(case.rows)) < 0.5), case.ranks, case.owner)
    assert case.reduced(owner=split, ranks=case.ranks + 1).tobytes() == case.reduced().tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_empty_ranks_may_stand_anywhere(seed):
    case = Case(seed)
    expected = case.reduced().tobytes()
    for empty in range(case.ranks + 1):
        moved = case.owner + (case.owner >= empty)
        assert case.reduced(owner=moved, ranks=case.ranks + 1).tobytes() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_only_the_ratios_of_weights_count(seed):
    case = Case(seed)
    expected = case.reduced()
    for factor in (2.0, 0.25, 2.0**-20):  # powers of two, which round nothing
        assert case.reduced(weights=case.weights * factor).tobytes() == expected.tobytes()
    for factor in (3.0, 0.1, 1e6):
        np.testing.assert_allclose(
            case.reduced(weights=case.weights * factor), expected, rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_weight_of_two_is_an_example_twice_and_of_zero_one_that_is_not_there(seed):
    case = Case(seed)
    weights = case.weights.copy()
    weights[0] *= 2
    twice = [np.append(values, values[:1], axis=0) for values in (case.rows, case.weights)]
    found = case.reduced(weights=weights)
    # Its second copy may be on another rank.
    owner = np.append(case.owner, case.random.integers(case.ranks))
    assert case.reduced(*twice, owner=owner).tobytes() == found.tobytes()
    if len(weights) > 1:
        weights[0] = 0
        without = case.reduced(case.rows[1:], case.weights[1:], case.owner[1:])
        assert case.reduced(weights=weights).tobytes() == without.tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_sparse_rows_have_the_average_of_the_dense_gradient(seed):
    case = Case(seed)
    places = case.random.integers(0, 5, len(case.rows))

    def run(communicator, mode):
        table = Variable(np.zeros((5, DIMENSIONS)), name="table")
        if case.arena:
            Arena([table])
        mine = case.owner == communicator.rank
        rows = case.weights[mine, None] * case.rows[mine]
        ticket = Ticket(examples=float(case.weights[mine].sum()))
        pair = IndexedSlices(rows, places[mine], (5, DIMENSIONS)), table
        ((found, _),) = AllReduce(communicator, sparse=mode).reduce([pair], ticket)
        return found.to_dense().tolist(), found.indices.tolist()

    expected = np.zeros((5, DIMENSIONS))
    for place, weight, row in zip(places, case.weights, case.rows, strict=True):
        expected[place] += weight * row
    wanted = (expected / case.weights.sum()).tolist(), sorted(set(places.tolist()))
    for mode in ("rows", "dense"):
        assert world(case.ranks, lambda c, mode=mode: run(c, mode)) == [wanted] * case.ranks


def test_plain_sums_of_random_numbers_do_depend_on_the_number_of_ranks():
    # The negative control: with rounding, the comparisons by bits above could fail.
    differ = 0
    for seed in SEEDS:
        case = Case(seed, whole=False)
        found = {
            case.reduced(
                owner=np.arange(len(case.rows)) * ranks // len(case.rows), ranks=ranks, dtype="f4"
            ).tobytes()
            for ranks in (1, 2, 3, 5)
        }
        differ += len(found) > 1
    assert differ >= len(SEEDS) // 2


def test_a_mean_of_means_is_not_the_average():
    # Another control: 32, 32, 32 and 7 examples.
    values = np.repeat([1.0, 1.0, 1.0, 9.0], [32, 32, 32, 7])
    owner = np.repeat([0, 1, 2, 3], [32, 32, 32, 7])

    def run(communicator, weigh):
        own = values[owner == communicator.rank]
        w = Variable(np.zeros(1), name="w")
        gradient, examples = (own.sum(), len(own)) if weigh else (own.mean(), 1)
        ((found, _),) = AllReduce(communicator).reduce([(np.array([gradient]), w)], Ticket(examples=examples))
        return float(found[0])

    assert world(4, lambda c: run(c, True)) == pytest.approx([values.mean()] * 4)
    assert world(4, lambda c: run(c, False)) == pytest.approx([3.0] * 4)  # where 1.54 is right
