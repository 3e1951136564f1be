"""Canonical over ranks as threads; the same claims under mpirun are in tests/distributed."""

import numpy as np
import pytest

from distopt.aggregators import AllReduce, Canonical, Ticket
from distopt.aggregators.tree import Tree
from distopt.communicators import SumOrder, connect
from distopt.communicators.communicator import cut
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

SIZES = {"w": (5, 3), "b": (3,), "d": (70,)}
DTYPES = {"w": "f4", "b": "f4", "d": "f8"}


def _model(in_arena, dtypes=DTYPES):
    variables = [Variable(np.zeros(shape, dtypes[name]), name=name) for name, shape in SIZES.items()]
    if in_arena:
        Arena(variables)
    return variables


def _leaf(name, shard, dtypes=DTYPES):
    """A gradient of which the sum depends on the order, in bits."""
    random = np.random.default_rng([shard, *name.encode()])
    values = random.standard_normal(SIZES[name]) * 10.0 ** random.integers(-3, 4, SIZES[name])
    return values.astype(dtypes[name])


def _total(leaf, first, last):
    """The sum by the tree's definition, in numbers."""
    if last - first == 1:
        return np.array(leaf(first))
    half = max(2**k for k in range(20) if 2**k < last - first)
    return _total(leaf, first, first + half) + _total(leaf, first + half, last)


def _shards(aggregator, variables, leaf=_leaf):
    for shard in aggregator.own_shards:
        pairs = []
        for variable in variables:
            gradient = leaf(variable.name, shard)
            if variable.slab is not None and isinstance(gradient, np.ndarray):
                variable.gradient[...] = gradient  # as a tape does
                gradient = variable.gradient
            pairs.append((gradient, variable))
        yield shard, pairs, Ticket(examples=shard + 0.5, loss=0.1 * 7**shard, correct=1)


@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("shards", [5, 8])
def test_sums_and_means_have_the_bits_of_the_tree_on_any_number_of_ranks(in_arena, bucket_bytes, shards):
    def run(communicator):
        aggregator = Canonical(communicator, shards, bucket_bytes=bucket_bytes)
        results, variables = [], _model(in_arena)
        for _ in range(2):  # from the second step on buckets may go while backward runs
            reduced = aggregator.reduce_shards(_shards(aggregator, variables))
            results.append({v.name: np.array(g) for g, v in reduced})
        return results, aggregator.ticket

    examples = sum(shard + 0.5 for shard in range(shards))
    loss = _total(lambda shard: 0.1 * 7**shard, 0, shards)
    for ranks in (1, 2, 3, 5):
        for results, ticket in world(ranks, run):
            for found in results:
                for name in SIZES:
                    total = _total(lambda shard, name=name: _leaf(name, shard), 0, shards)
                    np.testing.assert_array_equal(found[name], total / total.dtype.type(examples))
            assert (ticket.examples, ticket.loss, ticket.correct) == (examples, loss, shards)


def test_plain_all_reduce_depends_on_the_number_of_ranks_and_canonical_does_not():
    # In float32 1e8 + 1 is 1e8: one rank adds to ((1e8 + 1) - 1e8) + 1 = 1, two to 1e8 + -1e8 = 0.
    values = np.array([1e8, 1, -1e8, 1], "f4")

    def plain(communicator):
        variable = Variable(np.zeros(1, "f4"), name="v")
        own = values[communicator.rank * 4 // communicator.size :][: 4 // communicator.size]
        total = np.zeros(1, "f4")
        for value in own:
            total += value
        ((found, _),) = AllReduce(communicator, "sum").reduce([(total, variable)])
        return float(found[0])

    def canonical(communicator):
        variable = Variable(np.zeros(1, "f4"), name="v")
        aggregator = Canonical(communicator, 4, "sum")
        shards = ((s, [(values[s : s + 1].copy(), variable)], Ticket()) for s in aggregator.own_shards)
        ((found, _),) = aggregator.reduce_shards(shards)
        return float(found[0])

    assert {ranks: set(world(ranks, plain)) for ranks in (1, 2)} == {1: {1.0}, 2: {0.0}}
    for ranks in (1, 2, 3, 4):
        assert set(world(ranks, canonical)) == {0.0}


@pytest.mark.parametrize("in_arena", [True, False])
def test_sixteen_bits_are_summed_in_float32_and_rounded_once(in_arena):
    halves = dict.fromkeys(SIZES, "f2")

    def run(communicator):
        aggregator = Canonical(communicator, 6, "sum", bucket_bytes=64)
        variables = _model(in_arena, halves)
        for _ in range(2):
            found = aggregator.reduce_shards(
                _shards(aggregator, variables, lambda name, shard: _leaf(name, shard, halves))
            )
        return {v.name: np.array(g) for g, v in found}

    for ranks in (1, 2, 3, 4):
        for found in world(ranks, run):
            for name, value in found.items():
                total = _total(lambda s, name=name: _leaf(name, s, halves).astype("f4"), 0, 6)
                assert value.dtype == np.float16
                np.testing.assert_array_equal(value, total.astype("f2"))


@pytest.mark.parametrize("in_arena", [True, False])
def test_a_shard_without_a_gradient_counts_as_zeros_and_all_without_give_none(in_arena):
    def leaf(name, shard):
        if name == "b" or (name == "w" and shard != 3):
            return None
        return np.full(SIZES[name], -0.0, DTYPES[name]) if name == "w" else _leaf(name, shard)

    def run(communicator):
        aggregator = Canonical(communicator, 5, "sum")
        variables = _model(in_arena)
        for _ in range(2):
            found = aggregator.reduce_shards(_shards(aggregator, variables, leaf))
        return {v.name: None if g is None else np.array(g) for g, v in found}

    for ranks in (1, 2, 3, 5):
        for found in world(ranks, run):
            assert found["b"] is None
            # 0.0 + -0.0 is 0.0, whoever adds it.
            assert found["w"].tobytes() == np.zeros(SIZES["w"], "f4").tobytes()


@pytest.mark.parametrize("in_arena", [True, False])
def test_rows_stay_rows_in_the_order_of_shards(in_arena):
    def rows(shard):
        count = shard % 3  # none, in some shards
        values = np.full((count, 3), shard + 1, "f4")
        return IndexedSlices(values, np.arange(count) + shard % 2, (5, 3))

    def leaf(name, shard):
        return _leaf(name, shard) if name != "w" else rows(shard) if shard != 2 else None

    def run(communicator):
        aggregator = Canonical(communicator, 5, "sum")
        variables = _model(in_arena)
        found = {v.name: g for g, v in aggregator.reduce_shards(_shards(aggregator, variables, leaf))}
        return found["w"].values, found["w"].indices, np.array(found["d"])

    for ranks in (1, 2, 3, 5):
        for values, indices, other in world(ranks, run):
            # Shards 0 and 3 have no rows, 2 has no gradient; 1 has one row, 4 one.
            np.testing.assert_array_equal(values, [[5] * 3, [2] * 3])
            np.testing.assert_array_equal(indices, [0, 1])
            np.testing.assert_array_equal(other, _total(lambda s: _leaf("d", s), 0, 5))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_and_whole_gradients_of_one_variable_are_refused_on_every_rank(ranks):
    def leaf(name, shard):
        if name == "w" and shard == 3:
            return IndexedSlices(np.ones((1, 3), "f4"), np.array([0]), (5, 3))
        return _leaf(name, shard)

    def run(communicator):
        aggregator = Canonical(communicator, 4, "sum")
        variables = _model(True)
        with pytest.raises(CommunicatorError, match=r"w got rows .* in some canonical shards"):
            aggregator.reduce_shards(_shards(aggregator, variables, leaf))
        return "raised"

    assert world(ranks, run) == ["raised"] * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_with_as_many_shards_as_ranks_it_goes_into_any_optimizer(ranks):
    def run(communicator):
        rank = communicator.rank
        variable = Variable(np.zeros(2, "f4"), name="v")
        optimizer = SGD(1.0, gradient_aggregator=Canonical(communicator))
        optimizer.apply_gradients([(np.full(2, rank + 1, "f4"), variable)], examples=rank)
        with pytest.raises(ValueError, match="their number was not given"):
            optimizer.apply_gradients([(np.full(2, rank + 1, "f4"), variable)])
        return variable.numpy(), optimizer.step

    total, examples = ranks * (ranks + 1) / 2, ranks * (ranks - 1) / 2
    for value, steps in world(ranks, run):
        assert steps == (1 if examples else 0)  # one rank alone has no example: nothing is done
        expected = -np.float32(total) / np.float32(examples) if examples else 0
        np.testing.assert_array_equal(value, np.full(2, expected, "f4"))


def test_wrong_use_is_told():
    def run(communicator):
        with pytest.raises(ValueError, match=r"1 canonical shard\(s\) can't be shared by 2 ranks"):
            Canonical(communicator, 1)
        aggregator = Canonical(communicator, 4)
        variable = Variable(np.zeros(2, "f4"), name="v")
        with pytest.raises(ValueError, match="here are 4 shards and 2 ranks"):
            aggregator.reduce([(None, variable)], Ticket(examples=1))
        first = communicator.rank * 2
        for wrong in ([], [first], [first + 1], [first, first], [first, first + 1, first + 2]):
            with pytest.raises(
                ValueError, match=f"gives the shards {first} to {first + 1}, each once and in"
            ):
                Canonical(_Alone(communicator), 4).reduce_shards(
                    [(s, [(np.ones(2, "f4"), variable)], Ticket(examples=1)) for s in wrong]
                )
        return aggregator.own_shards

    assert world(2, run) == [range(2), range(2, 4)]
    with connect("local") as alone:
        other = Variable(np.zeros(2, "f4"), name="other")
        variable = Variable(np.zeros(2, "f4"), name="v")
        shards = [(0, [(None, variable)], Ticket()), (1, [(None, variable), (None, other)], Ticket())]
        with pytest.raises(ValueError, match=r"shard 1 has other variables than the one before: \['other'\]"):
            Canonical(alone, 2).reduce_shards(shards)


class _Alone:
    """Says what a rank is, and lets it compare variables with itself: wrong shards raise on it alone."""

    def __new__(cls, communicator):
        class Alone(type(communicator)):
            def __init__(self):
                self.__dict__.update(communicator.__dict__)

            def all_gather_object(self, value):
                return [value]

        return Alone()


def test_ranks_with_other_variables_or_shards_are_told_which():
    def run(communicator):
        name = "v" if communicator.rank == 0 else "other"
        variable = Variable(np.zeros(2, "f4"), name=name)
        Arena([variable])
        aggregator = Canonical(communicator, 3)
        pairs = ((s, [(None, variable)], Ticket(examples=1)) for s in aggregator.own_shards)
        with pytest.raises(CommunicatorError, match=r"variable 0 is 'other' .* and 'v' .* on rank 0"):
            aggregator.reduce_shards(pairs)
        aggregator = Canonical(communicator, 3 + communicator.rank)
        pairs = ((s, [(None, variable)], Ticket(examples=1)) for s in aggregator.own_shards)
        with pytest.raises(CommunicatorError, match=r"aggregates by Canonical\(shards=4"):
            aggregator.reduce_shards(pairs)
        return "raised"

    assert world(2, run) == ["raised"] * 2


def test_every_rank_hears_who_is_to_stop_and_who_can_not_go_on():
    def run(communicator):
        variable = Variable(np.zeros(2, "f4"), name="v")
        aggregator = Canonical(communicator, 5)

        def shards():
            return ((s, [(np.ones(2, "f4"), variable)], Ticket(examples=1)) for s in aggregator.own_shards)

        aggregator.reduce_shards(shards(), Ticket(stop=float(communicator.rank == 1), step=4))
        assert (aggregator.ticket.stop, aggregator.ticket.step) == (1, 4)
        broken = Ticket(error=float(communicator.rank == 2), reason="disk full", step=5)
        with pytest.raises(CommunicatorError, match=r"step 5 can't be done: rank 2 on .*: disk full"):
            aggregator.reduce_shards(shards(), broken)
        return "raised"

    assert world(3, run) == ["raised"] * 3


def _floats(node, size):
    random = np.random.default_rng([*node, size])
    return (random.standard_normal(size) * 10.0 ** random.integers(-3, 4, size)).astype("f4")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_combine_their_nodes_with_the_bits_of_the_tree(ranks):
    def run(communicator, shards, size):
        tree = Tree(shards)
        nodes = [tree.nodes_of(range(part.start, part.stop)) for part in cut(shards, ranks)]
        arrays = [_floats(node, size) for node in nodes[communicator.rank]]
        result = communicator.combine(arrays, tree.order_of(nodes)).wait()
        assert result is arrays[-1]
        return result, nodes

    for shards in range(ranks, 10):
        for size in (0, 1, ranks - 1, ranks + 1, 1001):
            for result, nodes in world(ranks, lambda c, v=shards, n=size: run(c, v, n)):
                leaves = {node: _floats(node, size) for own in nodes for node in own}
                expected = _folded(leaves, 0, shards)
                assert result.tobytes() == expected.tobytes()


def _folded(nodes, first, last):
    """The sum by the tree's definition, over nodes that ranks have made before."""
    if (first, last) in nodes:
        return nodes[first, last]
    half = max(2**k for k in range(20) if 2**k < last - first)
    return _folded(nodes, first, first + half) + _folded(nodes, first + half, last)


def test_a_sum_that_is_none_is_refused():
    for counts, additions, message in [
        ((1, 0), (), "at least one array"),
        ((2, 1), ((0, 1),), r"leave the arrays \[0, 2\]"),
        ((1, 1), ((0, 0),), r"addition \(0, 0\) needs two arrays"),
        ((2, 1), ((0, 1), (2, 1)), r"addition \(2, 1\) needs two arrays"),
    ]:
        with pytest.raises(ValueError, match=message):
            SumOrder(counts, additions)
    order = SumOrder((1,), ())
    with connect("local") as alone:
        for error, message, arrays in [
            (ValueError, "the order is of", [np.zeros(2), np.zeros(2)]),
            (ValueError, "one axis", [np.zeros((2, 2))]),
            (TypeError, "convert them to float32", [np.zeros(2, "f2")]),
        ]:
            with pytest.raises(error, match=message):
                alone.combine(arrays, order)
        with pytest.raises(ValueError, match="one dtype and length"):
            alone.combine([np.zeros(2, "f4"), np.zeros(2)], SumOrder((2,), ((0, 1),)))


def test_infinite_sums_are_values_and_no_warnings():
    def run(communicator):
        arrays = [np.array([3e38, np.inf, 1], "f4"), np.array([3e38, -np.inf, 1], "f4")]
        return communicator.combine(arrays, SumOrder((2, 2, 2), tuple((0, b) for b in range(1, 6)))).wait()

    for found in world(3, run):
        np.testing.assert_array_equal(found, [np.inf, np.nan, 6])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_slab_that_comes_later_is_summed_too(rows):
    def run(communicator):
        aggregator = Canonical(communicator, 5, "sum")
        first, later = (Variable(np.zeros(rows, "f4"), name=name) for name in ("first", "later"))
        Arena([first])
        gradients = ((s, [(np.full(rows, s, "f4"), first)], Ticket()) for s in aggregator.own_shards)
        aggregator.reduce_shards(gradients)
        Arena([later])
        gradients = ((s, [(np.full(rows, s, "f4"), later)], Ticket()) for s in aggregator.own_shards)
        ((found, _),) = aggregator.reduce_shards(gradients)
        return found

    for ranks in (1, 3):
        for found in world(ranks, run):
            np.testing.assert_array_equal(found, np.full(rows, 10))
