"""Walk a record backward, and yield each gradient at the moment its gate opens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from distopt.backend import Array, namespace
from distopt.tape.aggregation import Sums
from distopt.tape.gates import GATE_GRAPH, GATE_NONE, GATE_OP
from distopt.tape.record import Node, Recorder, Tensor, active
from distopt.tape.second_order import gradients_as_tensors, is_watched
from distopt.variables import IndexedSlices, Operand, Variable, value_of

__all__ = ["Walk", "backward"]


class Walk(NamedTuple):
    """How to walk.

    Attributes:
        tape: whose record; None for every node that is there.
        into_arena: whether gradients of variables are written into their arena. They are arrays then,
            whoever watches.
        release: whether nodes that no other tape holds may let go of what they saved.
        stops: `id`s of operands to be taken as constants.
        gate: when gradients are yielded (see gates.py).
        aggregation_method: how contributions are added (see aggregation.py).
    """

    tape: Recorder | None = None
    into_arena: bool = False
    release: bool = False
    stops: Collection[int] = ()
    gate: int = GATE_OP
    aggregation_method: int | None = None


def backward(
    targets: list[Any], sources: list[Any], upstreams: list[Any] | None, walk: Walk
) -> Iterator[tuple[Any, Any]]:
    """Walk the record backward from the targets; yield (gradient, source) for every source once.

    Args:
        targets: Tensors, Variables, IndexedSlices of Tensors, or arrays (which are constants).
        sources: Tensors and Variables, perhaps repeated.
        upstreams: one for each target, None for ones; None for ones everywhere.
        walk: how.
    """
    return _gradients(targets, sources, upstreams, walk)


def _gradients(
    targets: list[Any], sources: list[Any], upstreams: list[Any] | None, walk: Walk
) -> Iterator[tuple[Any, Any]]:
    wanted = {id(source): source for source in sources}
    ends = _ends(targets, upstreams)
    nodes, uses = _plan([target for target, _ in ends], wanted, walk)
    stream = _walked(nodes, uses, wanted, ends, walk)
    # A primitive that communicates backward must not come between the reductions that a consumer
    # starts: which of these have begun depends on the gradients that a rank has.
    communicates = any(n.context is not None and n.context.options.get("communicator") for n, _ in nodes)
    yield from list(stream) if walk.gate == GATE_GRAPH or communicates else stream


def _walked(
    nodes: list[tuple[Node, tuple[bool, ...]]],
    uses: dict[int, int],
    wanted: dict[int, Any],
    ends: list[tuple[Any, Any]],
    walk: Walk,
) -> Iterator[tuple[Any, Any]]:
    # Nobody watches what is written into an arena, and nobody can watch where no tape is open.
    watchable = bool(active.tapes) and not walk.into_arena
    outputs = _outputs(nodes, ends) if watchable else {}
    sums = Sums(walk.aggregation_method)

    for target, upstream in ends:
        for key in _keys(target, wanted):
            sums.add(key, upstream)

    at_once = walk.gate == GATE_NONE
    opened: list[tuple[Any, Any]] = []
    emitted: set[int] = set()
    for key, source in wanted.items():
        if uses.get(key, 0) == 0 and key in sums:
            emitted.add(key)
            yield _final(sums.pop(key), source, walk), source

    for node, relevant in nodes:
        upstream = sums.pop(id(node))
        context = node.context
        if context is None:
            raise RuntimeError(
                f"the record of {node.primitive.name} was released by an earlier call of gradient; "
                "use GradientTape(persistent=True)"
            )
        results: Sequence[Any] = (None,) * len(node.inputs)
        if upstream is not None:
            node.check_versions()
            if isinstance(upstream, IndexedSlices) and not node.primitive.takes_slices:
                upstream = upstream.to_dense()
            context.is_last = walk.release and len(node.tapes) == 1
            if watchable and is_watched((*node.inputs, upstream)):
                results = gradients_as_tensors(node, outputs[id(node)], relevant, upstream, _of_composition)
            else:
                context.needs = relevant
                context.destinations = _destinations(node, relevant, wanted, sums, walk)
                vjp = node.primitive.backward
                if vjp is None:
                    raise RuntimeError(f"primitive {node.primitive.name!r} has no gradient")
                results = vjp(context, value_of(upstream) if watchable else upstream)
                context.destinations = ()
        opened.clear()
        for operand, needed, result in zip(node.inputs, relevant, results, strict=True):
            if not needed:
                continue
            for key in _keys(operand, wanted):
                if result is not None:
                    sums.add(key, result)
                if key not in wanted:
                    continue
                uses[key] -= 1
                if uses[key] == 0:
                    emitted.add(key)
                    final = _final(sums.pop(key), operand, walk), operand
                    if at_once:
                        yield final
                    else:
                        opened.append(final)
        if context.is_last:
            node.context = None
        if opened:
            yield from opened

    for key, source in wanted.items():
        if key not in emitted:
            yield None, source


def _of_composition(output: Tensor, inputs: list[Any], upstream: Any, tape: Recorder) -> dict[int, Any]:
    """Return the gradients of a primitive's composed form, by the `id` of the input."""
    stream = _gradients([output], inputs, [upstream], Walk(tape))
    return {id(operand): gradient for gradient, operand in stream}


def _ends(targets: list[Any], upstreams: list[Any] | None) -> list[tuple[Any, Any]]:
    """Return (target, upstream) for the targets that a gradient can start from."""
    given = upstreams if upstreams is not None else [None] * len(targets)
    ends: list[tuple[Any, Any]] = []
    for target, upstream in zip(targets, given, strict=True):
        operand = target.values if isinstance(target, IndexedSlices) else target
        if isinstance(operand, Operand) and operand.value.dtype.kind in "fcV":
            ends.append((operand, _upstream(operand, upstream)))
    return ends


def _outputs(nodes: list[tuple[Node, tuple[bool, ...]]], ends: list[tuple[Any, Any]]) -> dict[int, Tensor]:
    """Return the Tensor that each node made. Nodes don't hold it: it holds them."""
    operands = [target for target, _ in ends]
    for node, _ in nodes:
        operands.extend(node.inputs)
    return {id(t.node): t for t in operands if isinstance(t, Tensor) and t.node is not None}


def _plan(
    targets: list[Any], wanted: dict[int, Any], walk: Walk
) -> tuple[list[tuple[Node, tuple[bool, ...]]], dict[int, int]]:
    """Return the nodes between sources and targets, latest first, and how often each source is used."""
    tape, stops = walk.tape, walk.stops
    reachable: dict[int, Node] = {}
    pending = [t.node for t in targets if isinstance(t, Tensor) and t.node is not None and id(t) not in stops]
    while pending:
        node = pending.pop()
        if id(node) in reachable or (tape is not None and not tape.holds(node)):
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
        if node.context is not None and node.context.output.dtype.kind not in "fcV":
            continue  # no gradient flows through integers
        leads.add(id(node))
        plan.append((node, relevant))
        for operand in node.inputs:
            if id(operand) in wanted:
                uses[id(operand)] = uses.get(id(operand), 0) + 1
    return plan[::-1], uses


def _leads(operand: Any, wanted: dict[int, Any], leads: set[int], stops: Collection[int]) -> bool:
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
    sums: Sums,
    walk: Walk,
) -> tuple[Array | None, ...]:
    """Return where each gradient may be written straight into the arena: first contributions only."""
    if not walk.into_arena:
        return ()
    taken: set[int] = set()
    found: list[Array | None] = []
    for operand, needed in zip(node.inputs, relevant, strict=True):
        free = needed and isinstance(operand, Variable) and id(operand) in wanted
        free = free and id(operand) not in sums and id(operand) not in taken
        taken.add(id(operand))
        found.append(operand.gradient if free else None)
    return tuple(found)


def _final(gradient: Any, source: Any, walk: Walk) -> Any:
    if gradient is None:
        return None
    destination = source.gradient if walk.into_arena and isinstance(source, Variable) else None
    if destination is None:
        return gradient if is_watched([gradient]) else value_of(gradient)
    # Rows stay rows: what they update, and whether a constraint may be there, doesn't depend on the arena.
    if gradient is destination or isinstance(gradient, IndexedSlices):
        return gradient
    destination[...] = gradient
    return destination


def _upstream(target: Any, given: Any) -> Any:
    value = target.value
    xp = namespace(value)
    if given is None:
        return xp.ones_like(value)
    if isinstance(given, IndexedSlices):
        given = given.values if given.values.shape == value.shape else given.to_dense()
    if is_watched([given]):
        return given if given.shape == value.shape else given + xp.zeros_like(value)
    return xp.broadcast_to(xp.asarray(value_of(given), dtype=value.dtype), np.shape(value))
