"""A model, gradients by rank and step, and the codecs that tests of aggregation go through."""

import numpy as np

from distopt.aggregators import Ticket
from distopt.variables import Arena, Variable

RANKS = [1, 2, 3, 4]

NAMES = [
    "fp16",
    "bf16",
    "int8:64",
    "int8:64:stochastic",
    "sign:64",
    "topk:0.2",
    "topk:0.2:fp16",
    "powersgd:2",
]

FEEDBACK = [f"ef-{name}" for name in NAMES]

SHAPES = {"w": (13, 11), "bias": (3,), "kernel": (3, 3, 4, 5), "v": (70,)}


def model(in_arena=True, shapes=None, dtype=np.float32):
    variables = [Variable(np.zeros(shape, dtype), name=name) for name, shape in (shapes or SHAPES).items()]
    if in_arena:
        Arena(variables)
    return variables


def gradients_of(variables, rank, step):
    random = np.random.default_rng([rank, step])
    return [random.standard_normal(v.shape).astype(v.dtype) for v in variables]


def one_step(aggregator, variables, step, examples=None):
    """Reduce random gradients of rank and step; returns copies of what came out."""
    rank = aggregator.communicator.rank
    pairs = list(zip(gradients_of(variables, rank, step), variables, strict=True))
    reduced = aggregator.reduce(pairs, Ticket(examples=rank + 1.0 if examples is None else examples))
    return [None if g is None else np.array(g) for g, _ in reduced]


def bits(arrays):
    return [array.tobytes() for array in arrays]
