"""The tree itself; what the aggregator makes of it is in test_canonical.py."""

import itertools

import numpy as np
import pytest

from distopt.aggregators.tree import Partials, Tree


def _join(left, right):
    return f"({left}+{right})"


def _written(shards):
    """The tree by its definition: a node is split after the largest power of two below its length."""

    def node(first, last):
        if last - first == 1:
            return str(first)
        half = max(2**k for k in range(20) if 2**k < last - first)
        return _join(node(first, first + half), node(first + half, last))

    return node(0, shards)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        (1, "0"),
        (2, "(0+1)"),
        (3, "((0+1)+2)"),
        (5, "(((0+1)+(2+3))+4)"),
        (6, "(((0+1)+(2+3))+(4+5))"),
        (7, "(((0+1)+(2+3))+((4+5)+6))"),
    ],
)
def test_a_node_is_split_after_the_largest_power_of_two_below_its_length(shards, expected):
    leaves = {(shard, shard + 1): str(shard) for shard in range(shards)}
    assert Tree(shards).fold(leaves, _join) == expected == _written(shards)


@pytest.mark.parametrize("shards", [1, 2, 3, 6, 8, 11, 24, 31])
def test_any_cut_into_spans_gives_the_same_tree(shards):
    tree = Tree(shards)
    random = np.random.default_rng(shards)
    for _ in range(20):
        ends = sorted({0, shards, *random.integers(0, shards + 1, 3).tolist()})
        parts = {}
        for first, last in itertools.pairwise(ends):
            for node in tree.nodes_of(range(first, last)):
                own = {(shard, shard + 1): str(shard) for shard in range(*node)}
                kept = []
                for leaf, text in own.items():
                    tree.push(kept, leaf, text, _join)
                ((found, value),) = kept
                assert found == node
                parts[node] = value
        assert tree.fold(parts, _join) == _written(shards)


def test_a_rank_gives_the_fewest_nodes():
    tree = Tree(24)
    assert tree.nodes_of(range(24)) == [(0, 24)]
    assert tree.nodes_of(range(12)) == [(0, 8), (8, 12)]
    assert tree.nodes_of(range(8, 16)) == [(8, 16)]
    assert tree.nodes_of(range(18, 24)) == [(18, 20), (20, 24)]
    assert tree.nodes_of(range(5, 5)) == []
    assert [tree.open_nodes(range(n)) for n in (0, 1, 2, 3, 4, 8, 24)] == [0, 0, 1, 1, 2, 3, 4]


def test_nodes_that_do_not_make_up_the_tree_are_refused():
    with pytest.raises(ValueError, match="don't make up the tree of 4 shards"):
        Tree(4).fold({(0, 1): 1, (2, 4): 1}, lambda a, b: a + b)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        Tree(0)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 8, 12])
@pytest.mark.parametrize("first", [0, 1, 4])
def test_partials_hold_the_bits_of_the_tree_in_the_promised_memory(shards, first):
    if first >= shards:
        first = shards - 1
    tree = Tree(shards)
    span = range(first, shards)
    random = np.random.default_rng(7)
    leaves = (random.standard_normal((shards, 40)) * 10.0 ** random.integers(-4, 5, (shards, 40))).astype(
        "f4"
    )

    def expected(first, last):
        if last - first == 1:
            return leaves[first]
        half = max(2**k for k in range(20) if 2**k < last - first)
        return expected(first, first + half) + expected(first + half, last)

    buffers = [np.full(40, np.nan, "f4") for _ in range(tree.open_nodes(span))]
    partials = Partials(tree, span, buffers)
    gradients = np.empty(40, "f4")  # one array for all shards, as a slab's gradients are
    for shard in span[:-1]:
        gradients[:] = leaves[shard]
        partials.push(shard, gradients)
    partials.push_last(shards - 1, gradients)
    gradients[:] = leaves[-1]  # later: its elements need not be there before
    found = [partials.part(slice(0, 13)), partials.part(slice(13, 40))]
    for node, left, right in zip(tree.nodes_of(span), *found, strict=True):
        assert node == left[0] == right[0]
        np.testing.assert_array_equal(np.concatenate([left[1], right[1]]), expected(*node))
    assert found[0][-1][1].base is gradients  # the last is the leaf itself
