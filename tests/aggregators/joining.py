"""Training on ranks whose data end at different steps, for threads and for mpirun."""

import numpy as np

from distopt.aggregators import AllReduce, in_step
from distopt.variables import Arena, Variable

BATCHES = {1: [4], 2: [3, 5], 3: [0, 4, 2], 4: [3, 0, 5, 1]}
"""Number of ranks -> how many batches each has."""


def batches_of(rank, count, seed=0):
    """Return a rank's batches of whole numbers: (inputs [n, 3], targets [n]), n from 0 to 4."""
    random = np.random.default_rng([seed, rank])
    sizes = random.integers(0, 5, count)
    return [(random.integers(-3, 4, (n, 3)) * 1.0, random.integers(-3, 4, n) * 1.0) for n in sizes]


def union(counts, seed=0):
    """Return the global batch of each step, of one process that has all data."""
    everyone = [batches_of(rank, count, seed) for rank, count in enumerate(counts)]
    steps = []
    for step in range(max(counts)):
        parts = [batches[step] for batches in everyone if step < len(batches)]
        steps.append(tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return steps


def train(communicator, batches, make, arena, linear):
    """Train y = x . w with the documented loop; returns w, what the optimizer keeps, and the rounds made."""
    w = Variable(np.array([1.0, -2.0, 0.5]), name="w")
    if arena:
        Arena([w, Variable(np.zeros(5), name="never used")])
    optimizer = make(gradient_aggregator=AllReduce(communicator))
    rounds = 0
    for batch in in_step(iter(batches), communicator):
        rounds += 1
        pairs, examples = [(None, w)], 0
        if batch is not None:
            inputs, targets = batch
            error = np.ones_like(targets) if linear else inputs @ w.numpy() - targets
            pairs, examples = [(error @ inputs, w)], len(targets)
        optimizer.apply_gradients(pairs, examples=examples)
    return [w.numpy(), *optimizer.get_weights()], rounds
