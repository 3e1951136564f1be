"""Adasum: add gradients as far as they are orthogonal, average them as far as they are parallel."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Aggregator, Pair, begin_step
from distopt.aggregators.agreement import Agreement
from distopt.aggregators.divide import divide, put, widened
from distopt.aggregators.ticket import Ticket
from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array, namespace
from distopt.communicators import Communicator
from distopt.communicators.communicator import cut
from distopt.variables import Slab, Variable, dense_gradient

__all__ = ["Adasum"]

_PIECE = 1 << 16


class Adasum(Aggregator):
    """Adds the ranks' mean gradients as far as they are orthogonal, and averages them as far as parallel.

    The rule of Maleki et al., "Scaling distributed training with adaptive summation" (2021):

        g = (1 - a.b / (2 |a|^2)) a + (1 - a.b / (2 |b|^2)) b

    Orthogonal gradients are added and equal ones averaged, so the learning rate of one rank serves any
    number of them. a and b are the results of two halves of the ranks: ranks are combined in a tree, (0, 1),
    (2, 3), ... then pairs of these; an odd one is carried up. Any number of ranks will do.

    A rank's gradient is first divided by its own examples. It weighs nothing that it has more examples than
    another. A rank without examples, or without a gradient of a variable, is absent: it changes nothing.
    Rows (IndexedSlices) are made dense.

    Each rank combines its own part of all ranks' gradients: parts are exchanged as in an all-reduce (each
    rank sends and receives 2 (P - 1) / P times the gradients), and for each level of the tree the dot
    products are summed over ranks, in float64. All ranks get the same bits. Memory: the gradients of all
    ranks' parts, which is 1 x the gradients, beside them.

    This is the rule for gradients. Horovod's `op=Adasum` applies it, with optimizers other than SGD, to
    the changes that each rank's optimizer makes.

    Args:
        communicator: over whose ranks.

    Raises:
        TypeError: `communicator` is none.
    """

    reduction = "mean"

    def __init__(self, communicator: Communicator) -> None:
        super().__init__()
        given: Any = communicator
        if not isinstance(given, Communicator):
            raise TypeError(
                f"Adasum needs a communicator, such as distopt.connect() gives, got {given!r:.60}"
            )
        self.communicator = communicator
        self._agreement = Agreement(communicator, "Adasum")

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`.

        Raises:
            ValueError: no number of examples was given; a variable comes twice; a shape differs.
            CommunicatorError: the ranks gave different variables, are at different steps, or one of them
                reported an error.
        """
        if ticket is None:
            raise ValueError(
                "Adasum divides each rank's gradient by its examples, but their number was not given: pass "
                "examples=len(batch) to minimize or apply_gradients"
            )
        given = sorted(begin_step(self.communicator, pairs), key=lambda pair: pair[1].number)
        for (_, variable), (_, following) in itertools.pairwise(given):
            if variable is following:
                raise ValueError(
                    f"variable {variable.name!r} comes twice; add its gradients up before reducing them"
                )
        began = time.perf_counter()
        self._agreement.start(given)
        own = ticket.examples
        self.ticket, presence = self._agreement.total(ticket, given)
        self.ready = not self._agreement.says_nothing_to_do(self.ticket)
        self.wire_bytes = 0
        found: dict[int, Any] = {}
        if self.ready:
            for flat in _flats([pair for pair, ranks in zip(given, presence[0], strict=True) if ranks], own):
                self._combine(flat)
                found |= {id(variable): view for variable, view in flat.views}
        self.exposed_seconds = time.perf_counter() - began
        return [(found.get(id(variable)), variable) for _, variable in given]

    def _combine(self, flat: _Flat) -> None:
        """Replace a rank's gradients by all ranks' combination, in place. Collective."""
        communicator, values = self.communicator, flat.values
        self.wire_bytes += sent_by_all_reduce(values.nbytes, communicator.size)
        cuts = cut(values.size, communicator.size)
        own = cuts[communicator.rank]
        nodes = communicator.all_to_all([values[part] for part in cuts])
        segments = [
            slice(max(part.start, own.start) - own.start, max(min(part.stop, own.stop) - own.start, 0))
            for part in flat.segments
        ]
        with flat.views[0][0].device.activate():
            while len(nodes) > 1:
                couples = list(zip(nodes[::2], nodes[1::2], strict=False))
                factors = self._factors(couples, segments)
                for (a, b), of_couple in zip(couples, factors, strict=True):
                    _merge(a, b, segments, of_couple)
                nodes = nodes[::2]
            values[own] = nodes[0]
        communicator.all_gather_parts(values).wait()

    def _factors(self, couples: Sequence[tuple[Array, Array]], segments: Sequence[slice]) -> Any:
        """Return the factors of a and of b: float64 [couples, segments, 2], the same on all ranks."""
        xp = namespace(couples[0][0])
        products = xp.stack([_products(a[part], b[part]) for a, b in couples for part in segments])
        self.wire_bytes += sent_by_all_reduce(products.nbytes, self.communicator.size)
        self.communicator.all_reduce(products).wait()
        dot, squares = products[:, :1], products[:, 1:]
        # A zero gradient has nothing to scale: the other one stays as it is.
        safe = xp.where(squares > 0, squares, 1.0)
        return (1.0 - dot / (2.0 * safe)).reshape(len(couples), len(segments), 2)


@dataclass
class _Flat:
    """Gradients that lie one after the other.

    Attributes:
        values: [n], contiguous.
        segments: of each variable in it.
        views: of each variable, shaped like it.
    """

    values: Array
    segments: list[slice]
    views: list[tuple[Variable, Array]]


def _flats(given: list[Pair], examples: float) -> list[_Flat]:
    """Return this rank's mean gradients as few flat arrays: each slab's, and the others' by dtype.

    Args:
        given: the pairs of variables of which some rank has a gradient, the same on every rank.
        examples: of this rank; without any its gradients are zeros.
    """
    slabs: dict[int, Slab] = {v.slab.number: v.slab for _, v in given if v.slab is not None}
    found: list[_Flat] = []
    for _, slab in sorted(slabs.items()):
        members = [pair for pair in given if pair[1].slab is slab]
        places = [(v, slice(v.start, v.start + v.size)) for _, v in members]
        found.append(_filled(slab.gradients, members, places, examples))
    loose = [pair for pair in given if pair[1].slab is None]
    for dtype in sorted({str(variable.dtype) for _, variable in loose}):
        members = [pair for pair in loose if str(pair[1].dtype) == dtype]
        first = members[0][1]
        start, places = 0, list[tuple[Variable, slice]]()
        for _, variable in members:
            places.append((variable, slice(start, start + variable.size)))
            start += variable.size
        found.append(_filled(first.device.zeros(start, first.dtype), members, places, examples))
    return found


def _filled(
    values: Array, members: list[Pair], places: list[tuple[Variable, slice]], examples: float
) -> _Flat:
    views: list[tuple[Variable, Array]] = []
    for variable, part in places:
        # Those of an arena are known by their identity, to optimizers too.
        own = variable.gradient if variable.slab is not None else None
        views.append((variable, values[part].reshape(variable.shape) if own is None else own))
    for (gradient, variable), (_, view) in zip(members, views, strict=True):
        with variable.device.activate():
            if gradient is None or not examples > 0:
                view[...] = 0
                continue
            if gradient is not variable.gradient:
                view[...] = dense_gradient(gradient, variable)
            divide(view, examples)
    return _Flat(values, [part for _, part in places], views)


def _products(a: Array, b: Array) -> Any:
    """Return a.b, a.a and b.b in float64, with no more than a piece of each in float64 at a time."""
    xp = namespace(a)
    total = xp.zeros(3, np.float64)
    for start in range(0, a.size, _PIECE):
        x, y = (part[start : start + _PIECE].astype(np.float64) for part in (a, b))
        total += xp.stack([xp.vdot(x, y), xp.vdot(x, x), xp.vdot(y, y)])
    return total


def _merge(a: Array, b: Array, segments: Sequence[slice], factors: Any) -> None:
    """Set a to (factor of a) * a + (factor of b) * b, segment by segment."""
    for part, (of_a, of_b) in zip(segments, factors, strict=True):
        total = widened(a[part])
        total *= of_a.astype(total.dtype)  # a factor may be beyond 16 bits
        total += of_b.astype(total.dtype) * widened(b[part])
        put(total, a[part])
