"""Record primitives as they run, and give gradients one by one as they become final.

A `primitive` is a function on arrays with its vector-Jacobian product beside it. While a `GradientTape`
is open, a call on something that the tape watches leaves a node. Going backward, use counts tell when the
gradient of a variable is final, and `GradientTape.gradients` yields it at that moment: whoever consumes the
generator drives the backward pass, and can start reducing one gradient while the next is still to be
computed.
"""

from distopt.tape.gradient_tape import GradientTape, gradients
from distopt.tape.record import Context, Primitive, Tensor, primitive, primitives

__all__ = ["Context", "GradientTape", "Primitive", "Tensor", "gradients", "primitive", "primitives"]
