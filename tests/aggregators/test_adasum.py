"""Adasum from arithmetic and against the published recursion in NumPy; mpirun: test_strategies_mpi.py."""

import numpy as np
import pytest
import strategies_cases as cases

from distopt.aggregators import Adasum, Ticket
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

RANKS = [1, 2, 3, 4]


def combined(ranks, gradients, in_arena=False, examples=1.0, dtype=np.float64):
    """Return what each rank gets for one variable; `gradients(rank)` is its own."""

    def run(communicator):
        own = gradients(communicator.rank)
        variable = Variable(np.zeros_like(gradients(0), dtype), name="w")
        if in_arena:
            Arena([variable])
        ((found, _),) = Adasum(communicator).reduce([(own, variable)], Ticket(examples=examples))
        return None if found is None else found.copy()

    results = world(ranks, run)
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])
    return results[0]


@pytest.mark.parametrize("ranks", [*RANKS, 8])
@pytest.mark.parametrize("in_arena", [True, False])
def test_orthogonal_gradients_are_added(ranks, in_arena):
    found = combined(ranks, lambda rank: np.eye(8)[rank] * (rank + 1), in_arena)
    assert found.tolist() == [rank + 1.0 if rank < ranks else 0.0 for rank in range(8)]


@pytest.mark.parametrize("ranks", [*RANKS, 8])
@pytest.mark.parametrize("in_arena", [True, False])
def test_equal_gradients_are_averaged(ranks, in_arena):
    found = combined(ranks, lambda rank: np.array([3.0, -4.0, 0.0]), in_arena)
    assert found.tolist() == [3.0, -4.0, 0.0]


def test_parallel_gradients_of_any_length_are_averaged_and_opposite_ones_add_to_their_mean():
    # b = c a: (1 - c / 2) a + (1 - 1 / (2 c)) c a = (1 + c) / 2 a, for any c but 0.
    for c in (0.25, 2.0, -1.0, -4.0):
        found = combined(2, lambda rank, c=c: np.array([1.0, 2.0]) * (c if rank else 1.0))
        np.testing.assert_allclose(found, np.array([1.0, 2.0]) * (1 + c) / 2, rtol=1e-15)


def test_a_gradient_of_zeros_changes_nothing():
    assert combined(2, lambda rank: np.array([1.0, 2.0]) * rank).tolist() == [1.0, 2.0]
    assert combined(3, lambda rank: np.array([1.0, 2.0]) * (rank == 2)).tolist() == [1.0, 2.0]
    assert combined(4, lambda rank: np.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ranks", [*RANKS, 5, 6, 7, 8])
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_papers_recursion_for_each_variable_by_itself(ranks, in_arena, dtype):
    # Sizes below and above the number of ranks, none, and one that parts of two ranks share.
    shapes = [(5, 3), (), (1,), (0,), (129,)]

    def gradients(rank):
        random = np.random.default_rng(rank)
        return [random.standard_normal(shape).astype(dtype) for shape in shapes]

    def run(communicator):
        made = [Variable(np.zeros(shape, dtype), name=str(n)) for n, shape in enumerate(shapes)]
        if in_arena:
            Arena(made)
        own = gradients(communicator.rank)
        given = [(g * 2, v) for g, v in zip(own, made, strict=True)]  # the sum over 2 examples
        reduced = Adasum(communicator).reduce(given[::-1], Ticket(examples=2))
        assert [v for _, v in reduced] == made
        assert not in_arena or all(g is v.gradient for g, v in reduced)
        return [g.copy() for g, _ in reduced]

    results = world(ranks, run)
    everyone = [gradients(rank) for rank in range(ranks)]
    for number in range(len(shapes)):
        expected = cases.adasum([np.float64(of_rank[number]) for of_rank in everyone])
        for found in results:
            np.testing.assert_allclose(
                found[number], expected, rtol=1e-5 if dtype == np.float32 else 1e-12, atol=1e-6
            )
            np.testing.assert_array_equal(found[number], results[0][number])


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
def test_gradients_are_means_over_each_ranks_own_examples_and_a_rank_without_is_absent(ranks, in_arena):
    def run(communicator):
        made = cases.variables(in_arena)
        optimizer = SGD(cases.RATE, gradient_aggregator=Adasum(communicator))
        for step in range(6):
            pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
            optimizer.apply_gradients(pairs, examples=examples)
        assert optimizer.step == 5  # step 3 has no examples
        return cases.state_of(made)

    w, b = np.linspace(-1, 1, 3), np.zeros(1)
    for step in range(6):
        parts = [cases.batch(step, rank, ranks) for rank in range(ranks)]
        means = [[g / len(y) for g in cases.gradient(w, b, x, y)] for x, y in parts if len(y)]
        if means:
            w = w - cases.RATE * cases.adasum([of_w for of_w, _ in means])
            b = b - cases.RATE * cases.adasum([of_b for _, of_b in means])
    for found in world(ranks, run):
        np.testing.assert_allclose(found[0], w, rtol=1e-12)
        np.testing.assert_allclose(found[1], b, rtol=1e-12)


@pytest.mark.parametrize("in_arena", [True, False])
def test_rows_are_made_dense_and_none_stays_where_all_have_none(in_arena):
    def run(communicator):
        made = [Variable(np.zeros((3, 1)), name="table"), Variable(np.ones(2), name="unused")]
        if in_arena:
            Arena(made)
            made[0].gradient[...] = 99.0
        rows = IndexedSlices(np.array([[1.0], [1.0]]), np.array([communicator.rank] * 2), (3, 1))
        given = rows if communicator.rank < 2 else None
        (table, _), (unused, _) = Adasum(communicator).reduce(
            [(given, made[0]), (None, made[1])], Ticket(2.0)
        )
        return table.tolist(), unused

    assert world(3, run) == [([[1.0], [1.0], [0.0]], None)] * 3


def test_a_gradient_that_is_not_finite_on_one_rank_is_so_on_all():
    def run(communicator):
        variable = Variable(np.zeros(4, "f4"), name="w")
        Arena([variable])
        own = np.full(4, np.nan if communicator.rank == 1 else 1.0, "f4")
        ((found, _),) = Adasum(communicator).reduce([(own, variable)], Ticket(examples=1))
        return bool(np.isnan(found).all())

    assert world(3, run) == [True] * 3


def test_float32_dot_products_are_summed_in_float64():
    for size in (1e30, 1e-30):  # their squares are infinite or 0 in float32
        found = combined(2, lambda rank, size=size: np.full(3, size, "f4"), True, dtype=np.float32)
        assert found.tolist() == np.full(3, size, "f4").tolist()


def test_wrong_use_is_refused():
    def run(communicator):
        w = Variable(np.zeros(2 + (communicator.rank == 1)), name="w")
        with pytest.raises(TypeError, match="Adasum needs a communicator"):
            Adasum(None)
        aggregator = Adasum(communicator)
        with pytest.raises(ValueError, match="pass examples=len"):
            aggregator.reduce([(w.numpy(), w)])
        with pytest.raises(ValueError, match="'w' comes twice"):
            aggregator.reduce([(w.numpy(), w), (w.numpy(), w)], Ticket(examples=1))
        with pytest.raises(CommunicatorError, match=r"rank 1 on .* has other variables"):
            aggregator.reduce([(w.numpy(), w)], Ticket(examples=1))
        return True

    assert world(2, run) == [True] * 2
