"""Canonical: sums whose bits don't depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Pair, taken
from distopt.aggregators.agreement import Agreement, DisagreementError
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.arguments import whole_number
from distopt.aggregators.buckets import BucketReduction, SlabReduction
from distopt.aggregators.divide import divide, put
from distopt.aggregators.loose import reduce_loose
from distopt.aggregators.sparse import SparseExchange
from distopt.aggregators.ticket import Ticket
from distopt.aggregators.traffic import sent_by_half
from distopt.aggregators.tree import Node, Partials, Tree
from distopt.backend import Array
from distopt.communicators import Communicator, Pending
from distopt.communicators.communicator import cut, wire_dtype
from distopt.errors import CommunicatorError
from distopt.variables import IndexedSlices, Slab, Variable, concatenated, dense_gradient

__all__ = ["Canonical"]

_FIELDS = ("examples", "loss", "correct", "not_finite")


class Canonical(AllReduce):
    """Sums gradients over canonical shards of the global batch, in an order that the shards alone decide.

    The global batch is cut into V shards, whichever ranks there are. Each shard's gradient is computed by
    itself, and they are summed in a fixed binary tree over their numbers (`tree.py`): a rank adds up the
    subtrees that lie within its own shards, and every rank adds up its part of all of these in the tree's
    order, for all ranks (`Communicator.combine`): an arena in memory that the ranks share, from
    `Communicator.allocate`, is read and written there. So training has the same bits on any number of ranks,
    as long as a shard's gradient has: equal processors, libraries and numbers of threads are the caller's
    part.

        aggregator = Canonical(communicator, shards=24)
        optimizer = SGD(0.1, gradient_aggregator=aggregator)
        ...
        gradients = ((v, *gradients_of(v)) for v in aggregator.own_shards)  # (v, pairs, Ticket)
        optimizer.apply_gradients(
            aggregator.reduce_shards(gradients), experimental_aggregate_gradients=False
        )

    With as many shards as ranks it goes wherever AllReduce goes, and a rank's gradients are its only
    shard's.

    How gradients are combined: a shard without a gradient of a variable counts as zeros. Rows
    (IndexedSlices) stay rows, in the order of the shards. A variable that has rows in some shards and a
    whole gradient in others is an error. 16-bit floats are summed in float32.

    Args:
        communicator: over whose ranks.
        shards: V, at least the number of ranks, which it is when not given. Rank r owns the shards
            `own_shards`: as equal a part as can be, the first ranks have more.
        reduction: see `AllReduce`.
        bucket_bytes: see `AllReduce`; changes no bits.

    Attributes:
        shards: V.
        own_shards: those that this rank gives.

    Raises:
        ValueError: fewer shards than ranks; or as for AllReduce.
        TypeError: `communicator` is none, or `shards` no whole number.
    """

    def __init__(
        self,
        communicator: Communicator,
        shards: int | None = None,
        reduction: str = "mean",
        bucket_bytes: int = 4 << 20,
    ) -> None:
        super().__init__(communicator, reduction, bucket_bytes)
        self.shards = communicator.size if shards is None else whole_number(shards, "Canonical's shards", 1)
        if self.shards < communicator.size:
            raise ValueError(
                f"{self.shards} canonical shard(s) can't be shared by {communicator.size} ranks: each needs "
                "one at least. Take as many shards as the most ranks that you will train on."
            )
        self._tree = Tree(self.shards)
        spans = [range(part.start, part.stop) for part in cut(self.shards, communicator.size)]
        self.own_shards = spans[communicator.rank]
        self._order = self._tree.order_of([self._tree.nodes_of(span) for span in spans])
        self._open_nodes = max(self._tree.open_nodes(span) for span in spans)
        self._agreement = Agreement(
            communicator, f"Canonical(shards={self.shards}, reduction={reduction!r}, {bucket_bytes} bytes)"
        )
        self._memory: dict[int, _SlabMemory] = {}
        self._partials: dict[int, Partials] = {}

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Reduce where every rank has one shard; see `Aggregator.reduce`.

        Raises:
            ValueError: there are more shards than ranks, or as for AllReduce.
            CommunicatorError: as for AllReduce.
        """
        if self.shards != self.communicator.size:
            raise ValueError(
                f"a rank's gradients are those of one shard where there are as many shards as ranks; here "
                f"are {self.shards} shards and {self.communicator.size} ranks. Call reduce_shards with the "
                "gradients of each of own_shards, or make Canonical without `shards`."
            )
        self._check_counted(ticket is not None)
        return self.reduce_shards([(self.own_shards[0], pairs, ticket or Ticket())])

    def reduce_shards(
        self, shards: Iterable[tuple[int, Iterable[Pair], Ticket]], ticket: Ticket | None = None
    ) -> list[Pair]:
        """Return the global gradients, from those of each of this rank's shards. Collective.

        Args:
            shards: (number of the shard, its pairs, its part of the ticket) for each of `own_shards`, in
                order; an iterator makes one after the other, so that one gradient is there at a time.
                Pairs are as for `Aggregator.reduce`, the same variables for every shard.
            ticket: what this rank says beside its shards: step, stop, preempt, error.

        Returns:
            As `Aggregator.reduce`. `ticket` then holds the sums over shards, in the tree's order too;
            `not_finite` counts shards.

        Raises:
            ValueError: other shards than `own_shards`, or as for `reduce`.
            CommunicatorError: as for AllReduce; a variable has rows in some shards and a whole gradient in
                others.
        """
        self.exposed_seconds = 0.0
        self.wire_bytes = 0
        own = ticket or Ticket()
        rows = np.zeros((self.shards, len(_FIELDS)))
        found = _Found(self._tree)
        self._partials = {}
        slabs: dict[int, SlabReduction] = {}
        expected = list(self.own_shards)
        spoiled = self.communicator.begin_step()
        for number, pairs, part in shards:
            if not expected or number != expected.pop(0):
                raise ValueError(_wrong_shard(number, self.own_shards, self.communicator))
            slabs = {}
            first, spoiled = spoiled, False
            given = self._shard(number, taken(pairs, first), slabs, streaming=self._streams and not expected)
            found.add(number, given)
            own += part
            rows[number] = [getattr(part, name) for name in _FIELDS]
        if expected:
            raise ValueError(_wrong_shard(None, self.own_shards, self.communicator))
        return self._timed("finish", lambda: self._finish_shards(found, slabs, own, rows))

    def sum_over_shards(self, arrays: Sequence[Array]) -> Array:
        """Return the sum of small arrays over all shards, in the tree's order. Collective.

        Args:
            arrays: one for each of `own_shards`, flat, of one length and dtype everywhere. Changed.
        """
        kept: list[tuple[Node, Array]] = []
        for shard, array in zip(self.own_shards, arrays, strict=True):
            self._tree.push(kept, (shard, shard + 1), array, _added)
        return self.communicator.combine([array for _, array in kept], self._order).wait()

    @property
    def _streams(self) -> bool:
        """Whether buckets of the leading slab go while backward runs: where starting one waits for nobody."""
        leading = self._memory.get(self._leading_slab) if self._leading_slab is not None else None
        return self._order.is_pair or (leading is not None and leading.shared)

    def _check_counted(self, counted: bool) -> None:
        if self.reduction == "mean" and not counted:
            raise ValueError(
                "reduction='mean' divides by the examples of the global batch, but their number was not "
                "given: pass examples=len(batch) to minimize or apply_gradients, or use reduction='sum'"
            )

    def _shard(
        self, number: int, pairs: Iterable[Pair], slabs: dict[int, SlabReduction], streaming: bool
    ) -> list[Pair]:
        """Run a shard's backward pass, and add what lies in the arena to the sums of this rank."""
        leading = self._leading_slab
        self._leading_slab = leading if streaming else None
        given = self._consume(pairs, slabs)
        self._leading_slab = leading
        for slab in slabs.values():
            slab.fill_missing(slab.slab.variables)
        if number == self.own_shards[0] and not self._agreement.steps:
            # The first collectives: from here on the ranks are known to have the same slabs.
            self._timed("start", lambda: self._agreement.start(_ordered(given)))
            for key in sorted(slabs):
                self._memory[key] = self._allocated(slabs[key].slab)
        for slab in slabs.values():
            if number != self.own_shards[-1]:
                gradients = slab.slab.gradients
                leaf = gradients.astype(wire_dtype(gradients.dtype), copy=False)
                self._partials_of(slab.slab).push(number, leaf)
        return given

    def _allocated(self, slab: Slab, *, together: bool = True) -> _SlabMemory:
        """Make what the sums of a slab need. Collective, unless ranks may not do it `together`."""
        device, dtype = slab.variables[0].device, wire_dtype(slab.dtype)
        make: Any = self.communicator.allocate if together and device.kind == "cpu" else device.zeros
        size = slab.gradients.size
        in_place = dtype == slab.dtype and (together or not self.communicator.is_shared(slab.gradients))
        last = slab.gradients if in_place else make(size, dtype)
        return _SlabMemory(
            [make(size, dtype) for _ in range(self._open_nodes)], last, self.communicator.is_shared(last)
        )

    def _memory_of(self, slab: Slab) -> _SlabMemory:
        if slab.number not in self._memory:  # one that came later; other ranks may be elsewhere now
            self._memory[slab.number] = self._allocated(slab, together=False)
        return self._memory[slab.number]

    def _partials_of(self, slab: Slab) -> Partials:
        if slab.number not in self._partials:
            buffers = self._memory_of(slab).buffers
            self._partials[slab.number] = Partials(self._tree, self.own_shards, buffers)
        return self._partials[slab.number]

    def _start_bucket(self, slab: Slab, part: slice) -> BucketReduction:
        """Add this rank's other shards to a part of the last one's gradients; start its sum over ranks."""
        partials, last = self._partials_of(slab), self._memory_of(slab).last
        if part.start == 0:
            partials.push_last(self.own_shards[-1], last)
        bucket = slab.gradients[part]
        in_place = last is slab.gradients
        if not in_place:
            last[part] = bucket
        return _BucketSum(self._combined([array for _, array in partials.part(part)]), bucket, in_place)

    def _combined(self, arrays: list[Array]) -> Pending:
        # As an all-to-all of what each rank has and a gather of the parts of the sum.
        ranks, given = self.communicator.size, [array.nbytes for array in arrays]
        self.wire_bytes += sent_by_half(sum(given), ranks) + sent_by_half(given[0], ranks)
        return self.communicator.combine(arrays, self._order)

    def _finish_shards(
        self, found: _Found, slabs: dict[int, SlabReduction], own: Ticket, rows: Array
    ) -> list[Pair]:
        """Agree on the step, start what is left in one order on all ranks, and wait for everything."""
        given = found.pairs(own)
        own_slabs = {number: slabs[number].slab for number in slabs}
        self._take_part(slabs)
        order = sorted(slabs, key=lambda number: (number != self._leading_slab, number))
        if self._leading_slab in slabs and self._streams:
            slabs[self._leading_slab].start_complete_buckets()
        try:
            total, presence = self._agreement.total(own, given)
        except DisagreementError:
            self._drain(slabs, order)
            raise
        self.communicator.all_reduce(rows.reshape(-1)).wait()  # others have zeros there: nothing is rounded
        sums = self._tree.fold({(v, v + 1): row for v, row in enumerate(rows)}, lambda a, b: a + b)
        for name, value in zip(_FIELDS, sums, strict=True):
            setattr(total, name, float(value))
        self.ticket = total
        try:
            self._check_kinds(given, presence)
        except CommunicatorError:
            self._drain(slabs, order)
            raise
        for number in order:
            slabs[number].start_complete_buckets()
        self._choose_leading(own_slabs)
        self.ready = self.reduction == "sum" or not self._agreement.says_nothing_to_do(total)
        divisor = total.examples if self.reduction == "mean" and self.ready else None
        reduced = self._reduce_loose(found, given, presence, divisor)
        for number in order:
            slabs[number].wait(divisor)
        return reduced if self.ready else [(None, variable) for _, variable in given]

    def _take_part(self, slabs: dict[int, SlabReduction]) -> None:
        """Take part in the leading slab's sum, with zeros, where this rank was given nothing of it."""
        known = set(slabs)
        self._add_leading(slabs)
        for number in slabs.keys() - known:
            slab = slabs[number]
            slab.fill_missing(slab.slab.variables)
            for shard in self.own_shards[:-1]:
                leaf = slab.slab.gradients.astype(wire_dtype(slab.slab.dtype), copy=False)
                self._partials_of(slab.slab).push(shard, leaf)

    def _check_kinds(self, given: list[Pair], presence: Array) -> None:
        """Raise, on every rank, where a variable's gradient is rows on some ranks and whole on others."""
        mixed = [v.name for i, (_, v) in enumerate(given) if 0 < presence[1, i] < presence[0, i]]
        if mixed:
            raise CommunicatorError(_MIXED.format(", ".join(mixed)))

    def _reduce_loose(
        self, found: _Found, given: list[Pair], presence: Array, divisor: float | None
    ) -> list[Pair]:
        """Reduce rows, and what lies in no arena."""
        loose = [i for i, (_, v) in enumerate(given) if v.slab is None and presence[0, i] > presence[1, i]]
        sums: dict[int, Any] = {}
        for dtype in sorted({given[i][1].dtype.str for i in loose}):
            members = [given[i][1] for i in loose if given[i][1].dtype.str == dtype]
            sums.update(self._sum_loose(found, members, divisor))
        # Rows come in the order of shards from rank to rank, and those of one index are added in that order.
        sparse = [i for i in range(len(given)) if presence[1, i]]
        rows = SparseExchange(self.communicator, "rows")
        for i in sparse:
            gradient, variable = given[i]
            sums[id(variable)] = rows.sum(gradient, variable, float(presence[2, i]), divisor)
        self.wire_bytes += rows.wire_bytes
        others = presence.copy()
        others[:, loose + sparse] = 0
        reduced = reduce_loose(self.communicator, given, others, divisor, self._sum_packed)
        return [(sums.get(id(variable), gradient), variable) for gradient, variable in reduced]

    def _sum_loose(self, found: _Found, members: list[Variable], divisor: float | None) -> dict[int, Array]:
        """Sum the gradients of several variables of one dtype as one array."""
        total = self._combined([_packed(gradients, members) for _, gradients in found.loose]).wait()
        divide(total, divisor)
        views: dict[int, Array] = {}
        start = 0
        for variable in members:
            view = total[start : start + variable.size].reshape(variable.shape)
            views[id(variable)] = view.astype(variable.dtype, copy=False)
            start += variable.size
        return views


class _Found:
    """What a rank's shards gave: which variables have a gradient, rows, and sums outside of an arena."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._variables: list[Variable] = []
        self._whole: set[int] = set()
        self._rows: dict[int, list[IndexedSlices]] = {}
        self.loose: list[tuple[Node, dict[int, Array]]] = []

    def add(self, shard: int, given: list[Pair]) -> None:
        """Take in a shard's pairs.

        Raises:
            ValueError: they are of other variables than those of the shard before.
        """
        variables = [variable for _, variable in _ordered(given)]
        if self._variables and [id(v) for v in variables] != [id(v) for v in self._variables]:
            before, now = ({v.name for v in known} for known in (self._variables, variables))
            raise ValueError(
                f"shard {shard} has other variables than the one before: {sorted(before ^ now)[:5]}. Give "
                "every variable for every shard, with None where it has no gradient."
            )
        self._variables = variables
        loose: dict[int, Array] = {}
        for gradient, variable in given:
            if isinstance(gradient, IndexedSlices):
                self._rows.setdefault(id(variable), []).append(gradient)
            elif gradient is not None:
                self._whole.add(id(variable))
                if variable.slab is None:
                    dense = dense_gradient(gradient, variable)
                    loose[id(variable)] = dense.astype(wire_dtype(dense.dtype))  # a copy: sums go there
        self._tree.push(self.loose, (shard, shard + 1), loose, _added_by_variable)

    def pairs(self, ticket: Ticket) -> list[Pair]:
        """Return all variables in the order of their creation, with this rank's gradients or None.

        Where one has rows and a whole gradient, the ticket gets an error, which all ranks will raise.
        """
        mixed = [v.name for v in self._variables if id(v) in self._rows and id(v) in self._whole]
        if mixed:
            ticket.error, ticket.reason = 1.0, _MIXED.format(", ".join(mixed))
        return [(self._gradient(variable), variable) for variable in self._variables]

    def _gradient(self, variable: Variable) -> Any:
        if id(variable) in self._rows:
            return concatenated(self._rows[id(variable)])
        if id(variable) not in self._whole:
            return None
        return variable.value if variable.slab is None else variable.gradient  # that there is one


_MIXED = (
    "{} got rows (IndexedSlices) in some canonical shards and a whole gradient in others, of which the sum "
    "has no order. Use the variable in the same way for every shard, or convert its rows by to_dense()."
)


@dataclass(frozen=True)
class _SlabMemory:
    """Where the sums of a slab over a rank's shards are made.

    Attributes:
        buffers: of all shards but the last, see `Partials`; in the dtype that values are combined in.
        last: of the last one: the slab's gradients themselves, or memory of their length where these are of
            16 bits, or not all ranks know whether they are shared.
        shared: whether all ranks read and write them in place.
    """

    buffers: list[Array]
    last: Array
    shared: bool


class _BucketSum:
    """A bucket's sum over all shards, under way, in the bucket or in an array of its own."""

    def __init__(self, pending: Pending, bucket: Array, in_place: bool) -> None:
        self._pending = pending
        self._bucket = bucket
        self._in_place = in_place

    def finish(self, divisor: float | None) -> None:
        """See `BucketReduction.finish`."""
        total = self._pending.wait()
        divide(total, divisor)
        if not self._in_place:
            put(total, self._bucket, copied=True)


def _added(left: Array, right: Array) -> Array:
    left += right
    return left


def _added_by_variable(left: dict[int, Array], right: dict[int, Array]) -> dict[int, Array]:
    """Add gradients of the same variables; what is missing counts as zeros, of which -0.0 becomes 0.0."""
    for key, gradient in right.items():
        left[key] = _added(left[key], gradient) if key in left else gradient + 0
    for key in left.keys() - right.keys():
        left[key] += 0
    return left


def _packed(gradients: dict[int, Array], members: list[Variable]) -> Array:
    first = members[0]
    flat = first.device.zeros(sum(v.size for v in members), wire_dtype(first.dtype))
    start = 0
    for variable in members:
        if id(variable) in gradients:
            flat[start : start + variable.size] = gradients[id(variable)].reshape(-1)
        start += variable.size
    return flat


def _ordered(given: list[Pair]) -> list[Pair]:
    return sorted(given, key=lambda pair: pair[1].number)


def _wrong_shard(number: int | None, own: range, communicator: Communicator) -> str:
    got = "too few" if number is None else f"shard {number}"
    return (
        f"{communicator.where} gives the shards {own.start} to {own.stop - 1}, each once and in order; "
        f"got {got}. Go through `own_shards`."
    )
