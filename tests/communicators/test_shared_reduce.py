import contextlib
import time

import ml_dtypes
import numpy as np
import pytest
from test_shared_memory import memory_of

from distopt.communicators import shared_turns
from distopt.communicators.communicator import cut
from distopt.communicators.shared_memory import FOLDER
from distopt.communicators.shared_reduce import HostSteps, SharedReduce
from distopt.errors import CommunicatorError
from distopt.testing import world

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")

SIZES = [1, 2, 3, 7, 1000, 70_001, 300_007]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.uint64]


def steps_of(communicator):
    steps = HostSteps(memory_of(communicator), lambda operation, number: contextlib.nullcontext())
    assert steps.prepare()
    return steps


def brought(rank, size, dtype):
    """What a rank brings: numbers whose sums depend on the order in which they are added."""
    generator = np.random.default_rng(rank)
    if np.dtype(dtype).kind in "iu":
        return generator.integers(0, 100, size).astype(dtype)
    return (generator.standard_normal(size) * 10.0 ** (rank % 3)).astype(dtype)


def sum_by_hand(parts, dtype):
    """((a + b) + c) + ..., in float32 for 16-bit floats, rounded once."""
    wide = np.float32 if np.dtype(dtype).itemsize == 2 else dtype
    total = parts[0].astype(wide)
    for part in parts[1:]:
        total = total + part.astype(wide)
    return total.astype(dtype)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("staged", [False, True])
def test_sums_are_those_made_by_hand_in_rank_order(ranks, staged, ordered, monkeypatch):
    monkeypatch.setattr(shared_turns, "_ORDERED", ordered)
    sizes = SIZES if ordered else SIZES[-2:]

    def run(communicator):
        steps = steps_of(communicator)
        reduce = SharedReduce(steps)
        for dtype in DTYPES:
            memory = steps.memory.allocate(sum(SIZES), np.dtype(dtype))
            start = 0
            for size in sizes:
                values = np.empty(size, dtype) if staged else memory[start : start + size]
                for repeat in range(2):
                    parts = [brought(rank + repeat, size, dtype) for rank in range(ranks)]
                    values[...] = parts[communicator.rank]
                    assert reduce.start(values, "sum", 1).wait() is values
                    assert values.tobytes() == sum_by_hand(parts, dtype).tobytes(), (dtype, size)
                start += size
        reduce.close()

    world(ranks, run)


@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces_of_a_large_array_do_not_mix(ranks):
    size = 1_500_003  # of several pieces, the last one short

    def run(communicator):
        reduce = SharedReduce(steps_of(communicator))
        for _ in range(3):
            values = np.arange(size, dtype=np.float32) % 1000 + communicator.rank
            reduce.start(values, "sum", 1).wait()
            expected = np.arange(size, dtype=np.float32) % 1000 * ranks + ranks * (ranks - 1) // 2
            assert (values == expected).all()

    world(ranks, run)


@pytest.mark.parametrize("staged", [False, True])
def test_nan_wins_the_largest_and_the_smallest(staged):
    def run(communicator):
        steps = steps_of(communicator)
        for op, best in (("max", 3.0), ("min", 1.0)):
            for culprit in range(3):
                values = np.empty(4, np.float32) if staged else steps.memory.allocate(4, np.dtype(np.float32))
                values[...] = communicator.rank + 1
                if communicator.rank == culprit:
                    values[2] = np.nan
                SharedReduce(steps).start(values, op, 1).wait()
                np.testing.assert_array_equal(values, [best, best, np.nan, best])

    world(3, run)


def test_too_large_sums_are_infinite_without_a_warning():
    def run(communicator):
        steps = steps_of(communicator)
        for dtype in (np.float16, np.float32):
            values = np.full(5, np.finfo(dtype).max, dtype)
            SharedReduce(steps).start(values, "sum", 1).wait()
            assert np.isposinf(values).all()

    world(2, run)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_halves_of_an_all_reduce_can_be_had_by_themselves(ranks):
    def run(communicator):
        rank = communicator.rank
        steps = steps_of(communicator)
        for size in (1, 5, 100_003):
            memory = steps.memory.allocate(size, np.dtype(np.float32))
            parts = [brought(other, size, np.float32) for other in range(ranks)]
            total = sum_by_hand(parts, np.float32)
            own = cut(size, ranks)[rank]
            memory[...] = parts[rank]
            steps.start("reduce_scatter", memory, "sum", 1).wait()
            assert memory[own].tobytes() == total[own].tobytes()
            outside = np.ones(size, bool)
            outside[own] = False
            memory[outside] = np.nan
            steps.start("all_gather_parts", memory, "", 2).wait()
            assert memory.tobytes() == total.tobytes()

    world(ranks, run)


def test_more_steps_than_have_a_place_may_be_under_way():
    count = shared_turns._IN_FLIGHT * 2 + 3

    def run(communicator):
        steps = steps_of(communicator)
        memory = steps.memory.allocate(count * 3, np.dtype(np.float64))
        memory[...] = communicator.rank + 1
        if communicator.rank == 1:
            time.sleep(0.1)  # the others go ahead as far as they may
        reduce = SharedReduce(steps)
        pendings = [reduce.prepare(memory[3 * n : 3 * n + 3], "sum")(n) for n in range(count)]
        for pending in reversed(pendings):
            pending.wait()
        assert (memory == 6).all()

    world(3, run)


def test_a_rank_that_flushes_has_done_all_that_others_wait_for():
    def run(communicator):
        steps = steps_of(communicator)
        memory = steps.memory.allocate(1000, np.dtype(np.float32))
        memory[...] = 1
        pending = steps.start("all_reduce", memory, "sum", 1)
        if communicator.rank == 0:
            pending.wait()
        steps.flush()
        assert not steps.backlog
        communicator.barrier()
        assert pending.test()
        assert (memory == 2).all()

    world(2, run)


def test_ranks_that_reduce_different_places_are_told_so():
    def run(communicator):
        steps = steps_of(communicator)
        memory = steps.memory.allocate(10, np.dtype(np.float32))
        first = communicator.rank
        with pytest.raises(CommunicatorError, match="reduce different places"):
            SharedReduce(steps).start(memory[first : first + 5], "sum", 1).wait()
        assert not memory.any()
        memory[...] = 1
        SharedReduce(steps).start(memory, "sum", 2).wait()  # and goes on
        assert (memory == 2).all()

    world(2, run)


def test_an_array_elsewhere_has_no_place_in_a_step_of_the_host():
    def run(communicator):
        steps = steps_of(communicator)
        assert not steps.holds(np.zeros(3))
        with pytest.raises(ValueError, match="12 bytes is not in shared memory"):
            steps.plan("all_reduce", np.zeros(3, np.float32), "sum")
        assert not SharedReduce(steps, staged=False).can(np.zeros(3), "sum")
        assert SharedReduce(steps).can(np.zeros(3), "sum")

    world(2, run)
