"""The function `gradients`, with TensorFlow's semantics."""

from __future__ import annotations

from typing import Any

from distopt.tape.aggregation import checked_method
from distopt.tape.backward import Walk, backward
from distopt.tape.gates import GATE_NONE, GATE_OP
from distopt.tape.nested import as_list
from distopt.tape.unconnected import UnconnectedGradients, or_zeros, wants_zeros
from distopt.variables import Operand

__all__ = ["gradients"]


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    name: str | None = None,
    colocate_gradients_with_ops: bool = False,
    gate_gradients: bool = False,
    aggregation_method: int | None = None,
    stop_gradients: Any = None,
    unconnected_gradients: Any = UnconnectedGradients.NONE,
) -> list[Any]:
    """Return the sum over `ys` of `grad_ys * dy/dx` for each x, as TensorFlow's function of this name.

    The ys must have been computed under an open `GradientTape`. The record is kept, so it can be called
    again. Called inside the tape's block it gives Tensors, which it can differentiate in its turn:
    `gradients(gradients(y, x), x)`.

    Args:
        ys: a Tensor or a list of them; integers and plain arrays are constants.
        xs: a Variable or Tensor or a list of them.
        grad_ys: upstream gradients, one per y; None, or None for a y, means ones.
        name: for code written for TensorFlow; there are no operations to name.
        colocate_gradients_with_ops: for code written for TensorFlow; a gradient is computed where the
            values are in any case.
        gate_gradients: True is `GATE_OP`, False `GATE_NONE`. As the list is returned whole, it changes
            nothing that could be seen; `GradientTape.gradients` has gates that do.
        aggregation_method: how contributions of several paths are added; see `AggregationMethod`.
        stop_gradients: operands to be taken as constants.
        unconnected_gradients: `UnconnectedGradients` or its "none" and "zero": what to give for an x that
            no y depends on.

    Returns:
        A list as long as `xs`, also for a single x: arrays, IndexedSlices, Tensors where an open tape
        watches what they depend on, or None; None for integers.

    Raises:
        ValueError: `grad_ys` has another length than `ys`; unknown `aggregation_method` or
            `unconnected_gradients`.
        TypeError: an x is neither Variable nor Tensor.
    """
    zero = wants_zeros(unconnected_gradients)
    checked_method(aggregation_method)  # an unknown method is an error even where nothing is added
    targets, sources = as_list(ys), as_list(xs)
    for source in sources:
        if not isinstance(source, Operand):
            raise TypeError(f"xs must be Variables or Tensors, got {type(source).__name__}")
    upstreams = None if grad_ys is None else as_list(grad_ys)
    if upstreams is not None and len(upstreams) != len(targets):
        raise ValueError(
            f"Length mismatch. Passed {len(upstreams)} grad_ys for {len(targets)} ys; give one for each y, "
            "or None for ones"
        )
    walk = Walk(
        stops={id(operand) for operand in as_list(stop_gradients)},
        gate=GATE_OP if gate_gradients else GATE_NONE,
        aggregation_method=aggregation_method,
    )
    found = {id(source): gradient for gradient, source in backward(targets, sources, upstreams, walk)}
    return [or_zeros(found[id(source)], source, zero) for source in sources]
