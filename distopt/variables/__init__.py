"""Variable, IndexedSlices and Arena: the values that are trained, and the flat memory they live in."""

from distopt.variables.arena import Arena, Slab
from distopt.variables.gradients import add_gradients, adopted_gradient, dense_gradient
from distopt.variables.operand import Operand, differentiating, operators
from distopt.variables.present import number_now
from distopt.variables.slices import IndexedSlices, concatenated, value_of
from distopt.variables.variable import Variable

__all__ = [
    "Arena",
    "IndexedSlices",
    "Operand",
    "Slab",
    "Variable",
    "add_gradients",
    "adopted_gradient",
    "concatenated",
    "dense_gradient",
    "differentiating",
    "number_now",
    "operators",
    "value_of",
]
