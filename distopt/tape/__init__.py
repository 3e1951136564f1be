"""Record primitives as they run, and give gradients one by one as they become final.

A `primitive` is a function on arrays with its vector-Jacobian product beside it. While a `GradientTape`
is open, a call on something that the tape watches leaves a node. Going backward, use counts tell when the
gradient of a variable is final, and `GradientTape.gradients` yields it when its gate opens: whoever consumes
the generator drives the backward pass, and can start reducing one gradient while the next is still to be
computed. Where an outer tape watches, gradients are Tensors, recorded in their turn: second derivatives.
"""

from distopt.tape.aggregation import AggregationMethod
from distopt.tape.functional import gradients
from distopt.tape.gates import GATE_GRAPH, GATE_NONE, GATE_OP
from distopt.tape.gradient_tape import GradientTape
from distopt.tape.record import Context, Primitive, Tensor, primitive, primitives
from distopt.tape.unconnected import UnconnectedGradients

__all__ = [
    "GATE_GRAPH",
    "GATE_NONE",
    "GATE_OP",
    "AggregationMethod",
    "Context",
    "GradientTape",
    "Primitive",
    "Tensor",
    "UnconnectedGradients",
    "gradients",
    "primitive",
    "primitives",
]
