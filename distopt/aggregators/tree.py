"""The fixed binary tree in which shards are summed, and the part of it that a rank computes.

A floating-point sum depends on its order. Here the order is a tree over the numbers of the shards, which
depends on how many there are and on nothing else: not on which rank computed a shard, nor on when.

The rule: a node of n > 1 shards is split after its first 2**k shards, the largest power of two below n.
So a tree of 6 is ((0 + 1) + (2 + 3)) + (4 + 5), and every full node is an aligned block of 2**k shards,
of which a rank that goes through its own shards in order never holds more than one of each size open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from distopt.backend import Array
from distopt.communicators import SumOrder

__all__ = ["Node", "Partials", "Tree"]

Node: TypeAlias = "tuple[int, int]"
"""The sum of the shards first, ..., last - 1."""

T = TypeVar("T")


class Tree:
    """The tree over a number of shards.

    Args:
        shards: how many, at least 1.

    Attributes:
        shards: how many.
        root: the node of all shards.
        left_of: the left sibling of every node that is a right one.

    Raises:
        ValueError: there are no shards.
    """

    def __init__(self, shards: int) -> None:
        if shards < 1:
            raise ValueError(f"the number of canonical shards must be at least 1, got {shards}")
        self.shards = shards
        self.root: Node = (0, shards)
        self.left_of: dict[Node, Node] = {}
        pending = [self.root]
        while pending:
            first, last = pending.pop()
            if last - first > 1:
                middle = split((first, last))
                self.left_of[middle, last] = first, middle
                pending += [(first, middle), (middle, last)]

    def push(self, kept: list[tuple[Node, T]], node: Node, value: T, add: Callable[[T, T], T]) -> None:
        """Put a node behind those to its left, added to its left siblings as far as these are there.

        Args:
            kept: nodes that are not siblings, from left to right. Changed.
            node: their right neighbour.
            value: of the node.
            add: left and right sibling -> their parent.
        """
        while kept and kept[-1][0] == self.left_of.get(node):
            left, other = kept.pop()
            node, value = (left[0], node[1]), add(other, value)
        kept.append((node, value))

    def nodes_of(self, span: range) -> list[Node]:
        """Return the fewest nodes that make up neighbouring shards, from left to right."""
        kept: list[tuple[Node, None]] = []
        for shard in span:
            self.push(kept, (shard, shard + 1), None, _nothing)
        return [node for node, _ in kept]

    def open_nodes(self, span: range) -> int:
        """Return how many sums a rank keeps at most before it comes to the last of its shards."""
        kept: list[tuple[Node, None]] = []
        most = 0
        for shard in span[:-1]:
            self.push(kept, (shard, shard + 1), None, _nothing)
            most = max(most, len(kept))
        return most

    def order_of(self, nodes: Sequence[Sequence[Node]]) -> SumOrder:
        """Return in which order to add the nodes of all ranks, which make up the whole tree.

        Args:
            nodes: of each rank, from left to right, at least one.

        Raises:
            ValueError: they don't make up the tree, each shard once.
        """
        additions: list[tuple[int, int]] = []

        def note(left: int, right: int) -> int:
            additions.append((left, right))
            return left

        numbered = [node for own in nodes for node in own]
        self.fold({node: number for number, node in enumerate(numbered)}, note)
        return SumOrder(tuple(len(own) for own in nodes), tuple(additions))

    def fold(self, parts: Mapping[Node, T], add: Callable[[T, T], T]) -> T:
        """Combine nodes that make up the whole tree.

        Args:
            parts: value of each node.
            add: left and right sibling -> their parent.

        Raises:
            ValueError: the nodes don't make up the tree, each shard once.
        """
        kept: list[tuple[Node, T]] = []
        for node in sorted(parts):
            self.push(kept, node, parts[node], add)
        if [node for node, _ in kept] != [self.root]:
            raise ValueError(f"nodes {sorted(parts)} don't make up the tree of {self.shards} shards")
        return kept[0][1]


def _nothing(left: None, right: None) -> None:
    del left, right


def split(node: Node) -> int:
    """Return the shard that the right half of a node begins with."""
    first, last = node
    return first + (1 << (last - first - 1).bit_length() - 1)


class Partials:
    """A rank's sums of an array over its shards, as far as the tree allows without the others.

    Shards are pushed in order. All but the last are added up in buffers. The last one's array stays where
    it is, so that nothing is copied where a rank has one shard; what is to be added to it can be added
    slice by slice, while the other slices are still being computed.

    Args:
        tree: the order of the sum.
        span: the rank's shards.
        buffers: memory for `tree.open_nodes(span)` arrays; all that the rank's shards share.
    """

    def __init__(self, tree: Tree, span: range, buffers: Sequence[Array]) -> None:
        self._tree, self._span = tree, span
        self._free = list(buffers)
        self._closed: list[tuple[Node, Array]] = []
        self._to_add: list[Array] = []

    def push(self, shard: int, leaf: Array) -> None:
        """Take in the array of a shard that isn't the last; it may be overwritten afterwards, and is."""
        node, siblings = self._close(shard)
        for buffer in siblings[:-1]:
            leaf += buffer  # the same bits as buffer + leaf
        if siblings:
            target = siblings[-1]
            target += leaf
        else:
            target = self._free.pop()
            target[...] = leaf
        self._free += siblings[:-1]
        self._closed.append((node, target))

    def push_last(self, shard: int, leaf: Array) -> None:
        """Take in the array of the last shard, whose elements need not be there yet."""
        node, self._to_add = self._close(shard)
        self._closed.append((node, leaf))

    def part(self, part: slice) -> list[tuple[Node, Array]]:
        """Return a slice of the sums of all `tree.nodes_of(span)`; the last is one of the last leaf.

        To be called once for every slice, when the last leaf's elements there are final.
        """
        last = self._closed[-1][1][part]
        for buffer in self._to_add:
            last += buffer[part]
        return [*((node, array[part]) for node, array in self._closed[:-1]), (self._closed[-1][0], last)]

    def _close(self, shard: int) -> tuple[Node, list[Array]]:
        """Take off the siblings that a shard completes, the nearest first; return their common node."""
        node: Node = shard, shard + 1
        siblings: list[Array] = []
        while self._closed and self._closed[-1][0] == self._tree.left_of.get(node):
            left, buffer = self._closed.pop()
            siblings.append(buffer)
            node = left[0], node[1]
        return node, siblings
