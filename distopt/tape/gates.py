"""When finished gradients are handed out: TensorFlow's gates."""

from __future__ import annotations

__all__ = ["GATE_GRAPH", "GATE_NONE", "GATE_OP", "checked_gate"]

GATE_NONE = 0
"""Each gradient at the moment it is final, while others of the same primitive are still to be added up."""

GATE_OP = 1
"""The gradients of a primitive's inputs together, once all of them are added up."""

GATE_GRAPH = 2
"""No gradient before all are final."""


def checked_gate(gate_gradients: int) -> int:
    """Return a gate.

    Raises:
        ValueError: it is none of the three.
    """
    if isinstance(gate_gradients, bool) or gate_gradients not in (GATE_NONE, GATE_OP, GATE_GRAPH):
        raise ValueError(
            "gate_gradients must be one of: Optimizer.GATE_NONE, Optimizer.GATE_OP, Optimizer.GATE_GRAPH. "
            f"Not {gate_gradients}"
        )
    return gate_gradients
