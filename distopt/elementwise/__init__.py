"""One Python formula: blocked NumPy, a loop compiled by numba, or one fused CUDA kernel.

    @elementwise
    def momentum(value, gradient, velocity, *, learning_rate, decay, nesterov: bool = False):
        velocity = decay * velocity + gradient
        direction = gradient + decay * velocity if nesterov else velocity
        value = value - learning_rate * direction
        return value, velocity

    momentum(value, gradient, velocity, learning_rate=0.1, decay=0.9, nesterov=True)

The call updates the returned arrays in place. Positional parameters are arrays of one shape and
dtype (float16, float32, float64; NumPy or CuPy); keyword-only ones are scalars, or, annotated
`bool`, static options, for each setting of which code is generated. A formula is made of
assignments to names, numbers, `+ - * / **`, single comparisons, `& | ~` of comparisons, `if
option:` and `a if option else b`, and the functions named below; anything else is a SyntaxError
when the rule is defined. Import the functions from here, so that the plain function can also be
called on NumPy arrays (`rule.function`).
"""

from __future__ import annotations

from numpy import exp, isfinite, isnan, log, maximum, minimum, sign, sqrt, square, where

from distopt.elementwise.checks import DTYPES
from distopt.elementwise.decayed import decayed
from distopt.elementwise.rule import CpuPath, Elementwise, Rule, elementwise

__all__ = [
    "DTYPES",
    "Elementwise",
    "CpuPath",
    "Rule",
    "decayed",
    "elementwise",
    "exp",
    "isfinite",
    "isnan",
    "log",
    "maximum",
    "minimum",
    "sign",
    "sqrt",
    "square",
    "where",
]
