"""A linear model over ranks, in NumPy and through optimizers, for tests of ways to combine ranks."""

import numpy as np

from distopt.aggregators import Ticket
from distopt.variables import Arena, IndexedSlices, Variable

RATE = 0.125


def counts(step, rank, ranks):
    """Examples of a rank in a step: uneven, some steps without any on one rank, one without any at all."""
    if step == 3:
        return 0
    if rank == ranks - 1 and ranks > 1 and step % 2:
        return 0
    return 1 + (step * 7 + rank * 3) % 4


def batch(step, rank, ranks):
    """Return features [n, 3] and targets [n]."""
    random = np.random.default_rng([step, rank])
    features = random.standard_normal((4, 3))
    return features[: counts(step, rank, ranks)], random.standard_normal(4)[: counts(step, rank, ranks)]


def gradient(w, b, features, targets):
    """Return the sums over examples of the gradients of half the squared error."""
    error = features @ w + b - targets
    return features.T @ error, error.sum(keepdims=True)


def variables(in_arena, dtype=np.float64):
    made = [Variable(np.linspace(-1, 1, 3).astype(dtype), name="w"), Variable(np.zeros(1, dtype), name="b")]
    if in_arena:
        Arena(made)
    return made


def pairs_of(made, step, rank, ranks):
    """Return this rank's pairs of a step and its examples; None without any, the sums else."""
    w, b = made
    features, targets = batch(step, rank, ranks)
    if not len(targets):
        return [(None, w), (None, b)], 0
    return list(zip(gradient(w.numpy(), b.numpy(), features, targets), made, strict=True)), len(targets)


def table_pairs(table, step, rank, ranks):
    """Return a pair with rows of a table, as many as the rank has examples."""
    n = counts(step, rank, ranks)
    if not n:
        return [(None, table)]
    rows = np.arange(1.0, 2 * n + 1).reshape(n, 2) * (rank + 1)
    return [(IndexedSlices(rows, (np.arange(n) * (rank + 1) + step) % len(table.value), table.shape), table)]


def ticket(examples, **fields):
    return Ticket(examples=float(examples), **fields)


def state_of(made):
    return [variable.numpy() for variable in made]
