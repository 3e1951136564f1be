"""Second derivatives: the backward half of a primitive, computed with Tensors that outer tapes record.

A backward half is a formula. On arrays it gives a gradient; on the Tensors and Variables that the
primitive was called on, the same formula gives a gradient that the open tapes record, so that it can be
differentiated in its turn. Fused kernels aren't formulas: their primitives have a composed form, the same
function made of other primitives, which is differentiated in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from distopt.tape.record import Context, Node, Tensor, active
from distopt.variables import IndexedSlices, Operand, differentiating, operators

__all__ = ["gradients_as_tensors", "is_watched"]

_Walk: TypeAlias = Callable[[Tensor, list[Any], Any, "_Inputs"], dict[int, Any]]


def is_watched(values: Iterable[Any]) -> bool:
    """Tell whether an open tape records what is computed from one of the values."""
    if not active.tapes:
        return False
    operands = [value.values if isinstance(value, IndexedSlices) else value for value in values]
    # Every tape is asked about every operand: that is how it learns which variables are accessed.
    return any([tape.watches(operand) for tape in active.tapes for operand in operands])


def gradients_as_tensors(
    node: Node, output: Tensor, relevant: tuple[bool, ...], upstream: Any, walk: _Walk
) -> Sequence[Any]:
    """Return what the node's backward half returns, as Tensors that the open tapes record.

    Args:
        node: the call to go back through.
        output: the Tensor that it made.
        relevant: per input, whether its gradient is wanted.
        upstream: the gradient of the output, an array or a Tensor.
        walk: goes back from a Tensor to the inputs of a composed form.

    Raises:
        TypeError: the backward half can't compute with Tensors, and there is no composed form.
    """
    called = node.primitive
    assert node.context is not None
    options = node.context.options
    if called.composition is not None:
        return _through_composition(node, relevant, upstream, walk)
    if called.backward is None:
        raise RuntimeError(f"primitive {called.name!r} has no gradient")
    context = Context(node.inputs, options, relevant)
    context.output = output
    before, differentiating.primitive = differentiating.primitive, called.name
    try:
        return called.backward(context, upstream)
    except (TypeError, AttributeError) as error:
        raise TypeError(
            f"the gradient of primitive {called.name!r} can't be differentiated again: {error}. Write it "
            f"with operators and primitives, or give the primitive a composed form (@{called.name}.composed)"
        ) from error
    finally:
        differentiating.primitive = before


def _through_composition(node: Node, relevant: tuple[bool, ...], upstream: Any, walk: _Walk) -> list[Any]:
    assert node.context is not None
    assert node.primitive.composition is not None
    # A Tensor of its own for each position: one operand may stand in two.
    inputs = [
        operators["identity"](operand) if needed else operand
        for operand, needed in zip(node.inputs, relevant, strict=True)
    ]
    sources = [operand for operand, needed in zip(inputs, relevant, strict=True) if needed]
    tape = _Inputs(sources)
    active.tapes.append(tape)
    try:
        output = node.primitive.composition(*inputs, **node.context.options)
    finally:
        active.tapes.remove(tape)
    found = walk(output, sources, upstream, tape)
    return [found[id(operand)] if needed else None for operand, needed in zip(inputs, relevant, strict=True)]


class _Inputs:
    """The tape of one composed form: it watches the inputs alone."""

    def __init__(self, operands: list[Operand]) -> None:
        self._watched = {id(operand) for operand in operands}

    def watches(self, operand: Any) -> bool:
        if id(operand) in self._watched:
            return True
        return isinstance(operand, Tensor) and operand.node is not None and self.holds(operand.node)

    def holds(self, node: Node) -> bool:
        return self in node.tapes
