"""The ring over pretended messages; over MPI in tests/distributed/test_ring_mpi.py."""

import time
from contextlib import nullcontext

import numpy as np
import pytest
from fake_links import FakeLinks, FakeNetwork, finish

from distopt.communicators.communicator import cut
from distopt.communicators.ring import Ring
from distopt.testing import world

RANKS = [1, 2, 3, 4, 5]
SIZES = [0, 1, 2, 3, 7, 64, 1001]


def _waiting(operation, number):
    return nullcontext()


def _rings(network, **options):
    return [Ring(network.links(rank), _waiting, **options) for rank in range(network.size)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("segment_bytes", [1, 48, 1 << 20])
def test_sums_of_any_size_over_any_number_of_ranks(ranks, size, segment_bytes):
    # Rank r has (r + 1) * arange: whole numbers, so the sum is exact in any order.
    network = FakeNetwork(ranks, seed=size)
    rings = _rings(network, segment_bytes=segment_bytes, pieces_in_flight=3)
    values = [np.arange(size, dtype="f4") * (rank + 1) for rank in range(ranks)]
    pendings = [ring.start(own, "sum", 1) for ring, own in zip(rings, values, strict=True)]
    finish(pendings, [ring.progress for ring in rings])
    for own, pending in zip(values, pendings, strict=True):
        np.testing.assert_array_equal(own, np.arange(size) * (ranks * (ranks + 1) / 2))
        assert pending.wait() is own
    assert network.largest <= max(segment_bytes, 4)
    assert not any(network.messages.values())


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "u8"])
@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_several_reductions_in_flight_do_not_mix(ranks, dtype, op):
    rng = np.random.default_rng(ranks)
    network = FakeNetwork(ranks, seed=3)
    rings = _rings(network, segment_bytes=64, pieces_in_flight=4)
    given = [[rng.integers(0, 9, 40 + 31 * number).astype(dtype) for number in range(5)] for _ in rings]
    combine = {"sum": np.sum, "max": np.max, "min": np.min}[op]
    expected = [combine([own[number] for own in given], axis=0) for number in range(5)]
    pendings = [
        ring.start(values, op, number)
        for ring, own in zip(rings, given, strict=True)
        for number, values in enumerate(own)
    ]
    finish(pendings, [ring.progress for ring in rings])
    for own in given:
        for values, sums in zip(own, expected, strict=True):
            np.testing.assert_array_equal(values, sums)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_chunk_is_summed_once_round_the_ring_so_all_ranks_have_the_same_bits(ranks):
    given = np.random.default_rng(0).normal(size=(ranks, 103)).astype("f4")
    expected = np.empty(103, "f4")
    for chunk, part in enumerate(cut(103, ranks)):
        total = given[(chunk + 1) % ranks, part].copy()
        for step in range(2, ranks + 1):
            total += given[(chunk + step) % ranks, part]
        expected[part] = total
    for seed in range(5):  # whenever messages come
        values = given.copy()
        network = FakeNetwork(ranks, seed)
        rings = _rings(network)
        pendings = [ring.start(own, "sum", 1) for ring, own in zip(rings, values, strict=True)]
        finish(pendings, [ring.progress for ring in rings])
        for own in values:
            np.testing.assert_array_equal(own.view("u4"), expected.view("u4"))


def test_not_a_number_and_infinity_reach_all_ranks_without_a_warning():
    values = [np.array([np.nan, 1.0, 3e38, np.inf], "f4"), np.array([1.0, np.nan, 3e38, -np.inf], "f4")]
    rings = _rings(FakeNetwork(2))
    pendings = [ring.start(own, "sum", 1) for ring, own in zip(rings, values, strict=True)]
    finish(pendings, [ring.progress for ring in rings])
    for own in values:
        np.testing.assert_array_equal(own, np.array([np.nan, np.nan, np.inf, np.nan], "f4"))


def test_no_more_pieces_are_in_flight_than_allowed():
    network = FakeNetwork(2)
    ring = Ring(network.links(0), _waiting, segment_bytes=4, pieces_in_flight=3)
    ring.start(np.zeros(100, "f4"), "sum", 1)
    for _ in range(20):
        ring.progress()
    assert sum(len(queue) for queue in network.messages.values()) == 3


def test_starting_and_polling_never_wait_for_a_rank_that_does_not_come():
    ring = Ring(FakeNetwork(2).links(0), _waiting)
    began = time.perf_counter()
    pending = ring.start(np.zeros(1000, "f4"), "sum", 1)
    assert [pending.test() for _ in range(100)] == [False] * 100
    assert time.perf_counter() - began < 1.0


def test_waiting_for_a_late_rank_costs_no_core():
    # As many ranks as threads: they meet in the fake network, whose lock is Python's own.
    network = FakeNetwork(2)

    def run(communicator):
        ring = Ring(network.links(communicator.rank), _waiting)
        if communicator.rank == 1:
            time.sleep(1.0)
        values = np.ones(1000, "f4")
        began = time.thread_time()
        ring.start(values, "sum", 1).wait()
        return time.thread_time() - began, values.sum()

    (early, first), (_, second) = world(2, run)
    assert first == second == 2000
    assert early < 0.25


def test_flush_finishes_what_is_in_flight_before_this_rank_blocks_elsewhere():
    network = FakeNetwork(3)

    def run(communicator):
        ring = Ring(network.links(communicator.rank), _waiting, segment_bytes=16)
        values = np.full(50, 1.0 + communicator.rank)
        pending = ring.start(values, "sum", 1)
        if communicator.rank == 0:
            ring.flush()
            communicator.barrier()  # moves nothing on
            assert pending.test()
        else:
            pending.wait()
            communicator.barrier()
        return values.tolist()

    assert world(3, run) == [[6.0] * 50] * 3


def test_an_error_of_the_network_reaches_who_waits():
    class Broken(FakeLinks):
        def test_some(self, requests):
            raise OSError("the card is gone")

    ring = Ring(Broken(FakeNetwork(2), 0), _waiting)
    with pytest.raises(OSError, match="the card is gone"):
        ring.start(np.zeros(9), "sum", 1).wait()
    with pytest.raises(OSError, match="the card is gone"):
        ring.progress()
