"""Sums within pretended hosts and between them; over MPI in tests/distributed/test_ring_mpi.py."""

from contextlib import nullcontext

import numpy as np
import pytest
from fake_links import FakeNetwork, finish

from distopt.communicators.hierarchical import Hierarchical, MessageSteps

HOSTS = [[1], [3], [1, 1], [2, 2], [2, 1], [1, 3, 2], [2, 2, 2]]  # ranks of each host


def _waiting(operation, number):
    return nullcontext()


def _algorithms(hosts, seed=0, **options):
    owners = min(hosts)
    between = [FakeNetwork(len(hosts), seed + slice_) for slice_ in range(owners)]
    found, inside = [], []
    for number, ranks in enumerate(hosts):
        inside.append(FakeNetwork(ranks, seed + 100 + number))
        for rank in range(ranks):
            steps = MessageSteps(inside[-1].links(rank))
            across = between[rank].links(number) if rank < owners else None
            links = inside[-1].links(rank)
            found.append(Hierarchical(steps, across, links, len(hosts), owners, _waiting, **options))
    return found


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 5, 64, 1001])
@pytest.mark.parametrize("segment_bytes", [1, 40, 1 << 20])
def test_sums_of_any_size_over_hosts_of_any_size(hosts, size, segment_bytes):
    algorithms = _algorithms(hosts, seed=size, segment_bytes=segment_bytes, pieces_in_flight=3)
    ranks = sum(hosts)
    values = [np.arange(size, dtype="f8") * (rank + 1) for rank in range(ranks)]
    pendings = [a.start(own, "sum", 1) for a, own in zip(algorithms, values, strict=True)]
    finish(pendings, [a.progress for a in algorithms])
    for own in values:
        np.testing.assert_array_equal(own, np.arange(size) * (ranks * (ranks + 1) / 2))


@pytest.mark.parametrize("hosts", [[2, 2], [1, 3, 2]], ids=str)
@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_all_ranks_have_the_same_bits_whenever_messages_come(hosts, op):
    given = np.random.default_rng(0).normal(size=(sum(hosts), 501)).astype("f4")
    found = set()
    for seed in range(4):
        values = given.copy()
        algorithms = _algorithms(hosts, seed=1000 * seed, segment_bytes=128)
        pendings = [a.start(own, op, 1) for a, own in zip(algorithms, values, strict=True)]
        finish(pendings, [a.progress for a in algorithms])
        found |= {own.tobytes() for own in values}
    assert len(found) == 1
    combine = {"sum": np.sum, "max": np.max, "min": np.min}[op]
    np.testing.assert_allclose(np.frombuffer(found.pop(), "f4"), combine(given, axis=0), rtol=2e-6, atol=1e-6)


def test_the_network_carries_what_one_ring_over_the_hosts_does():
    hosts, size = [4, 4, 4], 1200
    algorithms = _algorithms(hosts)
    sent = []
    for algorithm in algorithms:
        send = algorithm._between.send
        algorithm._between.send = lambda values, to, tag, send=send: (
            sent.append(values.nbytes),
            send(values, to, tag),
        )[1]
    values = [np.ones(size, "f4") for _ in algorithms]
    pendings = [a.start(own, "sum", 1) for a, own in zip(algorithms, values, strict=True)]
    finish(pendings, [a.progress for a in algorithms])
    # Each of 3 hosts sends 2 (3 - 1) / 3 of the bytes, whatever its number of ranks.
    assert sum(sent) == 3 * (2 * 2 / 3) * size * 4
