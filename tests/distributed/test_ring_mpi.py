"""The ring of messages keeps the communicators' contract, over real MPI."""

import time
from contextlib import nullcontext

import numpy as np
import pytest
from communicator_contract import CONTRACT

from distopt.communicators import connect
from distopt.communicators.mpi_algorithms import make_hierarchical


@pytest.fixture(scope="module")
def ring(communicator):
    """The same ranks, with all_reduce in a ring."""
    with connect("mpi", algorithm="ring") as same, same.split(0, key=-communicator.rank) as ranks:
        yield ranks


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_the_ring_keeps_the_contract(ring, check):
    check(ring)


def test_buckets_in_flight_among_other_collectives(ring):
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 60_000, 12)
    for turn in range(3):
        buckets = [np.full(n, 1.0 + ring.rank, "f4") for n in sizes]
        pendings = [ring.all_reduce(bucket) for bucket in buckets[:6]]
        if turn == 1:
            ring.barrier()
        pendings += [ring.all_reduce(bucket) for bucket in buckets[6:]]
        if ring.rank == 0:  # waits are free to be in any order
            pendings.reverse()
        for pending in pendings:
            pending.wait()
        for bucket in buckets:
            np.testing.assert_array_equal(bucket, ring.size * (ring.size + 1) / 2)


def test_a_rank_that_waits_in_the_ring_does_not_burn_its_core(ring):
    values = np.ones(100_000, "f4")
    ring.barrier()
    if ring.rank == ring.size - 1:
        time.sleep(1.0)
    began = time.thread_time()
    ring.all_reduce(values).wait()
    assert time.thread_time() - began < 0.4
    assert (values == ring.size).all()


def test_other_algorithms_may_come_in_between(communicator):
    with connect("mpi", algorithm="ring") as ranks:
        for turn in range(5):
            large, small = np.ones(50_000), np.ones(3)
            ranks._choice._forced = "ring"
            ringed = ranks.all_reduce(large)
            ranks._choice._forced = "mpi"
            others = ranks.all_reduce(small)
            for pending in (ringed, others) if (turn + ranks.rank) % 2 else (others, ringed):
                pending.wait()
            assert (large == ranks.size).all()
            assert (small == ranks.size).all()


def test_the_thread_moves_messages_while_a_rank_computes(communicator):
    with connect("mpi", algorithm="ring") as ranks:
        (ring,) = (algorithm for algorithm in ranks._algorithms if algorithm.name == "ring")
        ring.background = True
        for turn in range(4):
            buckets = [np.full(30_000, 1.0 + ranks.rank, "f4") for _ in range(6)]
            pendings = [ranks.all_reduce(bucket) for bucket in buckets]
            deadline = time.monotonic() + 20
            while turn < 2 and ring.flows.busy and time.monotonic() < deadline:
                np.dot(np.ones((64, 64)), np.ones((64, 64)))
            if turn == 3:
                ranks.barrier()
            for pending, bucket in zip(pendings, buckets, strict=True):
                assert turn >= 2 or pending.test()
                assert (pending.wait() == ranks.size * (ranks.size + 1) / 2).all()
                assert bucket.dtype == np.float32


@pytest.mark.parametrize("ranks_per_host", [1, 2, 3])
def test_within_and_between_pretended_hosts(communicator, ranks_per_host):
    # As if every `ranks_per_host` ranks were a host; the last one may have fewer.
    whole = communicator._mpi.Dup()
    host = whole.Split(whole.rank // ranks_per_host, whole.rank)
    levels, across = make_hierarchical(whole, host, lambda *_: nullcontext(), background=False)
    rng = np.random.default_rng(whole.rank)
    for size in (0, 1, 5, 1000, 300_001):
        exact = np.full(size, whole.rank + 1, "i8")
        rounded = rng.normal(size=size).astype("f4")
        pendings = [levels.start(exact, "sum", 1), levels.start(rounded, "sum", 2)]
        for pending in pendings:
            pending.wait()
        assert (exact == whole.size * (whole.size + 1) // 2).all()
        assert len(set(whole.allgather(rounded.tobytes()))) == 1
    levels.close()
    for part in (host, across, whole):
        part.Free()
