"""The benchmark of divided slots: what it says about memory is arithmetic."""

from distopt.bench.sharded import measure
from distopt.testing import world

# The network's 1,068,298 parameters, each variable padded to lines of 64 elements.
_ELEMENTS = sum(-(-n // 64) * 64 for n in (4800, 64, 102400, 64, 2304 * 384, 384, 384 * 192, 192, 1920, 10))


def test_it_measures_three_ways_and_the_memory_of_each():
    for found in world(2, lambda communicator: measure(communicator, 2)):
        assert [one.name for one in found] == ["undivided", "divided", "divided, whole gradients"]
        assert all(one.milliseconds > 0 for one in found)
        assert found[0].slot_bytes == [2 * 4 * _ELEMENTS] * 2
        assert found[1].slot_bytes == found[2].slot_bytes == [4 * _ELEMENTS] * 2
