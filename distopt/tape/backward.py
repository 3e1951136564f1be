"""Walk a record backward, and yield each gradient at the moment it is final."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, namespace
from distopt.tape.record import Node, Recorder, Tensor
from distopt.variables import IndexedSlices, Operand, Variable, add_gradients

__all__ = ["backward"]


def backward(
    targets: list[Any],
    sources: list[Any],
    upstreams: Any,
    tape: Recorder | None,
    into_arena: bool,
    release: bool,
    stops: set[int] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Walk the record backward from the targets; yield (gradient, source) as each becomes final."""
    wanted = {id(source): source for source in sources}
    nodes, uses = _plan(targets, wanted, tape, stops or set())
    sums: dict[int, _Sum] = {}

    for target, upstream in zip(targets, _upstreams(targets, upstreams), strict=True):
        if isinstance(target, Operand):
            for key in _keys(target, wanted):
                sums.setdefault(key, _Sum()).add(upstream)

    emitted: set[int] = set()
    for key, source in wanted.items():
        if uses.get(key, 0) == 0 and key in sums:
            emitted.add(key)
            yield _final(sums.pop(key), source, into_arena), source

    for node, relevant in nodes:
        total = sums.pop(id(node), None)
        context = node.context
        if context is None:
            raise RuntimeError(
                f"the record of {node.primitive.name} was released by an earlier call of gradient; "
                "use GradientTape(persistent=True)"
            )
        results: Sequence[Any] = (None,) * len(node.inputs)
        if total is not None and total.value is not None:
            context.needs = relevant
            context.destinations = _destinations(node, relevant, wanted, sums, into_arena)
            context.is_last = release and len(node.tapes) == 1
            vjp = node.primitive.backward
            if vjp is None:
                raise RuntimeError(f"primitive {node.primitive.name!r} has no gradient")
            results = vjp(context, total.value)
            context.destinations = ()
        for operand, needed, result in zip(node.inputs, relevant, results, strict=True):
            if not needed:
                continue
            for key in _keys(operand, wanted):
                if result is not None:
                    sums.setdefault(key, _Sum()).add(result)
                if key not in wanted:
                    continue
                uses[key] -= 1
                if uses[key] == 0:
                    emitted.add(key)
                    yield _final(sums.pop(key, None), operand, into_arena), operand
        if context.is_last:
            node.context = None

    for key, source in wanted.items():
        if key not in emitted:
            yield None, source


def _plan(
    targets: list[Any], wanted: dict[int, Any], tape: Recorder | None, stops: set[int]
) -> tuple[list[tuple[Node, tuple[bool, ...]]], dict[int, int]]:
    """Return the nodes between sources and targets, latest first, and how often each source is used."""
    reachable: dict[int, Node] = {}
    pending = [t.node for t in targets if isinstance(t, Tensor) and t.node is not None]
    while pending:
        node = pending.pop()
        if id(node) in reachable or (tape is not None and tape not in node.tapes):
            continue
        reachable[id(node)] = node
        for operand in node.inputs:
            if isinstance(operand, Tensor) and operand.node is not None and id(operand) not in stops:
                pending.append(operand.node)
    ordered = sorted(reachable.values(), key=lambda node: node.sequence)
    leads: set[int] = set()
    uses: dict[int, int] = {}
    plan: list[tuple[Node, tuple[bool, ...]]] = []
    for node in ordered:
        relevant = tuple(_leads(operand, wanted, leads, stops) for operand in node.inputs)
        if not any(relevant):
            continue
        leads.add(id(node))
        plan.append((node, relevant))
        for operand in node.inputs:
            if id(operand) in wanted:
                uses[id(operand)] = uses.get(id(operand), 0) + 1
    return plan[::-1], uses


def _leads(operand: Any, wanted: dict[int, Any], leads: set[int], stops: set[int]) -> bool:
    """Tell whether a gradient has to flow into `operand`."""
    if id(operand) in wanted:
        return operand.dtype.kind in "fV"
    if not isinstance(operand, Tensor) or id(operand) in stops:
        return False
    return operand.node is not None and id(operand.node) in leads


def _keys(operand: Any, wanted: dict[int, Any]) -> list[int]:
    """Return under which keys a gradient of `operand` is summed: its own as a source, its node's."""
    keys = [id(operand)] if id(operand) in wanted else []
    if isinstance(operand, Tensor) and operand.node is not None:
        keys.append(id(operand.node))
    return keys


def _destinations(
    node: Node,
    relevant: tuple[bool, ...],
    wanted: dict[int, Any],
    sums: dict[int, _Sum],
    into_arena: bool,
) -> tuple[Array | None, ...]:
    """Return where each gradient may be written straight into the arena: first contributions only."""
    if not into_arena:
        return ()
    taken: set[int] = set()
    found: list[Array | None] = []
    for operand, needed in zip(node.inputs, relevant, strict=True):
        free = needed and isinstance(operand, Variable) and id(operand) in wanted
        free = free and id(operand) not in sums and id(operand) not in taken
        taken.add(id(operand))
        found.append(operand.gradient if free else None)
    return tuple(found)


class _Sum:
    """The contributions to one gradient so far. The first is kept as it is; a sum gets its own memory."""

    __slots__ = ("_owned", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self._owned = False

    def add(self, contribution: Any) -> None:
        if self.value is None:
            self.value = contribution
        elif isinstance(self.value, IndexedSlices) or isinstance(contribution, IndexedSlices):
            self.value = add_gradients(self.value, contribution)
            self._owned = True
        elif self._owned and np.shape(self.value):
            self.value += contribution
        else:
            self.value = self.value + contribution
            self._owned = True


def _final(total: _Sum | None, source: Any, into_arena: bool) -> Any:
    if total is None or total.value is None:
        return None
    gradient = total.value
    destination = source.gradient if into_arena and isinstance(source, Variable) else None
    if isinstance(gradient, IndexedSlices):
        if destination is None:
            return gradient
        gradient = gradient.to_dense()  # a variable in an arena has a dense segment
    if destination is None or gradient is destination:
        return gradient
    destination[...] = gradient
    return destination


def _upstreams(targets: list[Any], given: Any) -> list[Any]:
    if given is None:
        given = [None] * len(targets)
    elif len(targets) == 1 and not isinstance(given, list | tuple):
        given = [given]
    elif not isinstance(given, list | tuple) or len(given) != len(targets):
        raise ValueError(
            f"there are {len(targets)} targets, so a list of as many upstream gradients is expected, "
            f"got {given!r}"
        )
    return [_upstream(t, g) for t, g in zip(targets, given, strict=True)]


def _upstream(target: Any, given: Any) -> Any:
    value = target.value
    xp = namespace(value)
    if given is None:
        return xp.ones_like(value)
    array = given.value if isinstance(given, Operand) else given
    return xp.broadcast_to(xp.asarray(array, dtype=value.dtype), np.shape(value))
