"""How a slab is cut into buckets, and how their size is measured."""

import numpy as np
import pytest

from distopt.aggregators import AllReduce
from distopt.aggregators.bucket_size import measured_bucket_bytes
from distopt.aggregators.buckets import bucket_length
from distopt.communicators.communicator import Done
from distopt.testing import world
from distopt.variables import Arena, Variable

KB = 1024


def _buckets(total, bucket, itemsize=4):
    lengths, left = [], total
    while left > 0:
        lengths.append(bucket_length(left, bucket, itemsize))
        left -= lengths[-1]
    return lengths


def test_buckets_halve_towards_the_end_down_to_64_kb():
    sizes = [4 * n // KB for n in _buckets(3 * 1024 * KB // 4, 1024 * KB // 4)]
    assert sizes == [1024, 1024, 512, 256, 128, 64, 64]


@pytest.mark.parametrize("total", [1, 63, 64, 20_000, 1_068_298])
@pytest.mark.parametrize("bucket", [1, 7, 16_384, 1 << 20, 1 << 30])
def test_buckets_cover_everything_once_and_none_is_larger_than_asked(total, bucket):
    lengths = _buckets(total, bucket)
    assert sum(lengths) == total
    assert min(lengths) >= 1
    assert max(lengths) <= bucket
    assert len(lengths) <= -(-total // bucket) + 20


class _Pretended:
    """Two ranks whose all_reduce takes as long as a formula says."""

    def __init__(self, latency, bytes_per_second):
        self.now, self.sizes = 0.0, []
        self._latency, self._bytes_per_second = latency, bytes_per_second

    def allocate(self, size, dtype):
        return np.zeros(size, dtype)

    def barrier(self):
        self.now += 1.0

    def all_reduce(self, values, op="sum"):
        if op == "sum":
            self.sizes.append(values.nbytes)
            self.now += self._latency + values.nbytes / self._bytes_per_second
        return Done(values)


@pytest.mark.parametrize(
    ("latency", "bytes_per_second", "expected"),
    [
        (1e-6, 1e8, 256 * KB),  # nothing is lost by small ones
        (1e-3, 1e9, 16 * 1024 * KB),  # 5 % over 16 MB's 17.7 ms are 0.9 ms: one bucket
        (1e-4, 1e9, 2 * 1024 * KB),  # 16 MB in 2 MB buckets 17.6 ms, the best 16.9 ms, in 1 MB ones 18.4 ms
    ],
)
def test_the_smallest_bucket_that_costs_at_most_5_percent_is_chosen(latency, bytes_per_second, expected):
    pretended = _Pretended(latency, bytes_per_second)
    found = measured_bucket_bytes(pretended, 64 << 20, clock=lambda: pretended.now)
    assert found == expected


def test_measuring_on_a_slow_line_takes_little():
    pretended = _Pretended(1e-3, 12e6)  # 100 Mbit/s
    measured_bucket_bytes(pretended, 100 << 20, clock=lambda: pretended.now)
    assert sum(pretended.sizes) / 12e6 < 0.6


@pytest.mark.parametrize("slab_bytes", [4, 1000, 3 << 20])
def test_all_ranks_choose_the_same(slab_bytes):
    found = world(3, lambda ranks: measured_bucket_bytes(ranks, slab_bytes))
    assert len(set(found)) == 1


def test_what_happened_when_is_recorded_and_the_size_is_settled_in_the_first_step():
    def run(communicator):
        variables = [Variable(np.zeros(64, "f4"), name="a"), Variable(np.zeros(128, "f4"), name="b")]
        Arena(variables)
        events = []
        aggregator = AllReduce(communicator, "sum")
        assert aggregator.bucket_bytes is None
        aggregator.recorder = lambda *event: events.append(event)
        for _ in range(2):
            events.clear()
            aggregator.reduce([(np.ones(v.shape, "f4"), v) for v in reversed(variables)])
        assert aggregator.bucket_bytes == 4 << 20
        return events, aggregator.exposed_seconds

    for events, exposed in world(2, run):
        assert [name for lane, name, _, _ in events if lane == "backward"] == ["b", "a"]
        assert [name for lane, name, _, _ in events if lane == "buckets"] == ["768 bytes"]
        assert all(start <= stop for _, _, start, stop in events)
        assert sum(stop - start for lane, _, start, stop in events if lane == "exposed") == pytest.approx(
            exposed
        )
