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


def local_sgd(ranks, steps, every, start, momentum):
    """Local SGD as its authors write it down, each rank's parameters in one vector."""
    values = np.tile(np.append(np.linspace(-1, 1, 3), 0.0), (ranks, 1))
    velocity, seen = np.zeros((ranks, 4)), np.zeros(ranks)
    for step in range(steps):
        sums, counts = np.zeros((ranks, 4)), np.zeros(ranks)
        for rank in range(ranks):
            features, targets = batch(step, rank, ranks)
            counts[rank] = len(targets)
            sums[rank] = np.concatenate(gradient(values[rank, :3], values[rank, 3:], features, targets))
        if step < start:
            if counts.sum():
                velocity = momentum * velocity - RATE * sums.sum(0) / counts.sum()
                values = values + velocity
            continue
        for rank in np.flatnonzero(counts):
            velocity[rank] = momentum * velocity[rank] - RATE * sums[rank] / counts[rank]
            values[rank] += velocity[rank]
        seen += counts
        if (step + 1 - start) % every == 0:
            if seen.sum():
                values[:] = seen @ values / seen.sum()
            seen[:] = 0
    return values


def delayed(ranks, steps, momentum=0.5, late=1):
    """SGD in which step t applies the global mean gradient of step t - late, the rest after the last."""
    value, velocity, pending, updates = np.append(np.linspace(-1, 1, 3), 0.0), np.zeros(4), [None] * late, 0
    for step in range(steps + late):
        sums, count = np.zeros(4), 0
        for rank in range(ranks if step < steps else 0):
            features, targets = batch(step, rank, ranks)
            sums += np.concatenate(gradient(value[:3], value[3:], features, targets))
            count += len(targets)
        pending.append(sums / count if count else None)
        due = pending.pop(0)
        if due is not None:
            velocity = momentum * velocity - RATE * due
            value, updates = value + velocity, updates + 1
    return value, updates


def accumulated(ranks, updates):
    """SGD on means over all examples of the steps of each update, in NumPy."""
    value, velocity = np.append(np.linspace(-1, 1, 3), 0.0), np.zeros(4)
    means_of_means = value.copy()
    for steps in updates:
        parts = [batch(step, rank, ranks) for step in steps for rank in range(ranks)]
        sums = sum(np.concatenate(gradient(value[:3], value[3:], x, y)) for x, y in parts)
        count = sum(len(y) for _, y in parts)
        wrong = [
            np.concatenate(gradient(means_of_means[:3], means_of_means[3:], x, y)) / max(len(y), 1)
            for x, y in parts
        ]
        means_of_means = means_of_means - RATE * np.mean(wrong, 0)
        if count:
            velocity = 0.5 * velocity - RATE * sums / count
            value = value + velocity
    return value, means_of_means


def adasum(vectors):
    """The paper's recursion over halves, which for a power of two is the tree of neighbours."""
    if len(vectors) == 1:
        return vectors[0]
    half = 1 << (len(vectors) - 1).bit_length() - 1  # an odd rest is the right part
    a, b = adasum(vectors[:half]), adasum(vectors[half:])
    dot, aa, bb = (a * b).sum(), (a * a).sum(), (b * b).sum()
    if aa == 0 or bb == 0:
        return a + b
    return (1 - dot / (2 * aa)) * a + (1 - dot / (2 * bb)) * b
