"""The code of docs/strategies.md runs, on one rank and on several, and does what the formulas there say."""

import re
from pathlib import Path

import numpy as np
import pytest

from distopt import SGD, AllReduce, Arena, GradientTape, Ticket, Variable, ops
from distopt.aggregators import (
    Accumulate,
    Adasum,
    Canonical,
    Compressed,
    Delayed,
    Grouped,
    LocalSGD,
    Sharded,
)
from distopt.drift import DriftCheck, replicated
from distopt.testing import world

TEXT = (Path(__file__).parent.parent / "docs" / "strategies.md").read_text()
BLOCKS = re.findall(r"```python\n# (.*?)\n(.*?)```", TEXT, re.DOTALL)
PUBLIC = [SGD, AllReduce, Accumulate, Adasum, Delayed, Grouped, LocalSGD, Canonical, Sharded, Compressed]
TOOLS = [DriftCheck, replicated, GradientTape, Ticket]


def rows(step, rank):
    """Return features [n, 2] and targets [n], uneven, of some ranks none."""
    random = np.random.default_rng([step, rank])
    n = 2 + step % 2 if rank == 0 else (step + rank) % 3
    return random.standard_normal((n, 2)), random.standard_normal(n)


def variables(arenas=1):
    made = [Variable(np.zeros(2), name="w"), Variable(np.zeros(()), name="b")]
    for number in range(arenas):
        Arena(made[number::arenas])
    return made


def loss(w, b, x, y):
    return 0.5 * ops.reduce_sum(ops.square(ops.reduce_sum(w * x, axis=1) + b - y))


def run(ranks):
    """Return {heading: w and b after it, in one vector, on each rank}."""

    def of_rank(communicator):
        names = {thing.__name__: thing for thing in [*PUBLIC, *TOOLS]}
        names |= {"world": communicator, "variables": variables, "loss": loss}
        names["batch"] = lambda step: rows(step, communicator.rank)
        names["shard"] = rows
        found = {}
        for heading, code in BLOCKS:
            exec(code, names)
            if heading == "drift check":
                assert names["check"].checks == (2 if ranks > 1 else 0)  # one rank has none to differ from
            found[heading] = np.append(names["w"].numpy(), names["b"].numpy())
        return found

    everyone = world(ranks, of_rank)
    return {heading: [found[heading] for found in everyone] for heading in everyone[0]}


def sums(value, steps, ranks):
    """Return the gradient's sum over all examples of some steps and ranks, and how many there are."""
    total, count = np.zeros(3), 0
    for step in steps:
        for rank in ranks:
            x, y = rows(step, rank)
            error = x @ value[:2] + value[2] - y
            total += np.append(x.T @ error, error.sum())
            count += len(y)
    return total, count


@pytest.fixture(scope="module", params=[1, 3])
def outcome(request):
    return request.param, run(request.param)


def check(found, expected):
    for own in found:
        np.testing.assert_allclose(own, expected, rtol=1e-12)


def test_every_aggregator_of_the_page_has_a_block():
    code = "".join(block for _, block in BLOCKS)
    assert [thing.__name__ for thing in PUBLIC if thing.__name__ not in code] == []


def test_accumulation(outcome):
    ranks, found = outcome
    value = np.zeros(3)
    for steps in (range(4), range(4, 8), range(8, 10)):
        total, count = sums(value, steps, range(ranks))
        value = value - 0.1 * total / count
    check(found["accumulation"], value)


def test_delayed(outcome):
    ranks, found = outcome
    value, due = np.zeros(3), np.zeros(3)
    for step in range(5):
        total, count = sums(value, [step], range(ranks))
        value, due = value - 0.1 * due, total / count
    check(found["delayed"], value - 0.1 * due)


def test_local_sgd(outcome):
    ranks, found = outcome
    values, speeds, seen = np.zeros((ranks, 3)), np.zeros((ranks, 3)), np.zeros(ranks)
    for step in range(7):
        for rank in range(ranks):
            of = range(ranks) if step < 2 else [rank]
            total, count = sums(values[rank], [step], of)
            if count:
                speeds[rank] = 0.9 * speeds[rank] - 0.1 * total / count
                values[rank] += speeds[rank]
            seen[rank] += count if step >= 2 else 0
        if step == 5:
            values[:], seen = seen @ values / seen.sum(), np.zeros(ranks)
    check(found["local SGD"], seen @ values / seen.sum())


def test_adasum(outcome):
    ranks, found = outcome

    def join(a, b):
        parts = []
        for part in (slice(0, 2), slice(2, 3)):  # each variable by itself
            p, q = a[part], b[part]
            pp, qq = p @ p or 1.0, q @ q or 1.0
            parts.append((1 - p @ q / (2 * pp)) * p + (1 - p @ q / (2 * qq)) * q)
        return np.concatenate(parts)

    value = np.zeros(3)
    for step in range(5):
        means = [total / max(count, 1) for total, count in (sums(value, [step], [r]) for r in range(ranks))]
        whole = means[0] if ranks == 1 else join(join(means[0], means[1]), means[2])
        value = value - 0.1 * whole
    check(found["Adasum"], value)


def test_canonical_has_the_bits_of_one_rank_and_the_mean_of_its_shards(outcome):
    _, found = outcome
    value = np.zeros(3)
    for step in range(5):
        total, count = sums(value, [step], range(3))
        value = value - 0.1 * total / count
    check(found["canonical"], value)
    alone = run(1)["canonical"][0]
    for own in found["canonical"]:
        np.testing.assert_array_equal(own, alone)


@pytest.mark.parametrize(
    ("heading", "momentum", "first", "rtol"),
    [("sharded", 0.9, 0, 1e-12), ("compressed", 0.0, 0, 1e-2), ("drift check", 0.9, 1, 1e-12)],
)
def test_the_mean_over_the_global_batch(outcome, heading, momentum, first, rtol):
    ranks, found = outcome
    value, speed = np.zeros(3), np.zeros(3)
    for step in range(first, first + 5):
        total, count = sums(value, [step], range(ranks))
        speed = momentum * speed - 0.1 * total / count
        value = value + speed
    for own in found[heading]:
        np.testing.assert_allclose(own, value, rtol=rtol, atol=1e-14)


def test_groups(outcome):
    ranks, found = outcome
    for rank in range(ranks):
        group = range(rank % 2, ranks, 2)
        total, count = sums(np.zeros(3), [0], group)
        own = -0.1 * total / max(count, 1)
        np.testing.assert_allclose(found["groups with models of their own"][rank], own, rtol=1e-12)
        total, count = sums(np.zeros(3), [0], range(ranks))
        mixed = np.append(-0.1 * total[:2] / count, own[2])
        np.testing.assert_allclose(
            found["a shared weight, and a bias of each group"][rank], mixed, rtol=1e-12, atol=1e-15
        )
