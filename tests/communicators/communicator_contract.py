"""What every communicator must do, as checks that run on all ranks of it at once.

Used over one rank, over threads (test_contract.py) and over MPI (tests/distributed).
"""

import hashlib
import time

import ml_dtypes
import numpy as np
import pytest
from contract_arrays import FLOATS, INTEGERS, SHAPES, ramp
from contract_details import DETAILS

from distopt.communicators.communicator import cut
from distopt.errors import CommunicatorError

CONTRACT = [*DETAILS]


def contract(check):
    CONTRACT.append(check)
    return check


def digests(communicator, values):
    return communicator.all_gather_object(hashlib.sha256(values.tobytes()).hexdigest())


@contract
def sum_over_ranks_is_exact_for_small_integers_in_every_dtype(communicator):
    size = communicator.size
    for dtype in FLOATS + INTEGERS:
        for shape in SHAPES:
            for _ in range(2):
                values = ramp(shape, dtype, communicator.rank)
                result = communicator.all_reduce(values).wait()
                expected = ramp(shape, np.int64, 0) * size + size * (size - 1) // 2
                assert result is values
                assert values.dtype == dtype
                np.testing.assert_array_equal(values.astype(np.int64), expected)


@contract
def reducing_a_slice_of_an_arena_changes_that_slice_only(communicator):
    arena = np.full(1000, 5.0, np.float32)
    communicator.all_reduce(arena[100:357]).wait()
    assert (arena[100:357] == 5.0 * communicator.size).all()
    assert (arena[:100] == 5.0).all()
    assert (arena[357:] == 5.0).all()


@contract
def sums_are_the_same_bits_on_all_ranks_for_every_size(communicator):
    sizes = [1, 2, 3, 5, 31, 1000, 4097, 16383, 65537, 262_145, 2_500_003]
    if communicator.size > 4:
        sizes.pop()  # gathered by every thread of one process
    generator = np.random.default_rng(communicator.rank)
    for dtype in FLOATS:
        for size in sizes:
            mine = generator.standard_normal(size).astype(dtype)
            everyone = communicator.all_gather(mine).wait().astype(np.float64)
            exact, scale = everyone.sum(0), np.abs(everyone).sum(0)
            communicator.all_reduce(mine).wait()
            assert len(set(digests(communicator, mine))) == 1, (dtype, size)
            # (size - 1) additions in the wire dtype, and one rounding to the dtype.
            tolerance = 4 * scale * float(ml_dtypes.finfo(dtype).eps)
            assert (np.abs(mine.astype(np.float64) - exact) <= tolerance).all(), (dtype, size)


@contract
def largest_and_smallest_are_found(communicator):
    for dtype in FLOATS + INTEGERS:
        for _ in range(2):
            rank, size = communicator.rank, communicator.size
            values = np.array([rank, size - rank, 3], dtype)
            largest = communicator.all_reduce(values.copy(), "max").wait()
            smallest = communicator.all_reduce(values.copy(), "min").wait()
            np.testing.assert_array_equal(largest.astype(int), [size - 1, size, 3])
            np.testing.assert_array_equal(smallest.astype(int), [0, 1, 3])


@contract
def nan_on_any_one_rank_reaches_all_ranks(communicator):
    for op in ("sum", "max", "min"):
        for culprit in range(communicator.size):
            values = np.ones(5, np.float32)
            if communicator.rank == culprit:
                values[2] = np.nan
            communicator.all_reduce(values, op).wait()
            np.testing.assert_array_equal(np.isnan(values), [False, False, True, False, False])


@contract
def sixteen_bit_floats_are_summed_in_float32_and_rounded_once(communicator):
    ones = communicator.size - 1
    for dtype, large in ((np.float16, 2048.0), (ml_dtypes.bfloat16, 256.0)):
        values = np.array([large if communicator.rank == 0 else 1.0], dtype)
        communicator.all_reduce(values).wait()
        assert float(values[0]) == float(np.float32(large + ones).astype(dtype))


@contract
def a_float16_sum_that_is_too_large_is_infinite_without_a_warning(communicator):
    values = np.full(3, 60000.0, np.float16)
    communicator.all_reduce(values).wait()
    expected = 60000.0 if communicator.size == 1 else np.inf
    assert (values.astype(np.float32) == np.float32(np.float16(expected))).all()


@contract
def several_reductions_may_be_pending_and_are_awaited_in_any_order(communicator):
    arena = np.ones(3_000_001, np.float32)
    parts = [arena[start : start + 600_000] for start in range(0, arena.size, 600_000)]
    pendings = [communicator.all_reduce(part) for part in parts]
    communicator.progress()
    for pending in reversed(pendings):
        pending.wait()
    assert (arena == communicator.size).all()


@contract
def a_blocking_collective_may_come_while_many_reductions_are_pending(communicator):
    arena = np.ones(12_000_000, np.float32)
    pending = communicator.all_reduce(arena)
    if communicator.rank % 2 == 0:
        pending.wait()  # the others are in the barrier by then, and must have sent their parts
    communicator.barrier()
    pending.wait()
    assert (arena == communicator.size).all()


@contract
def testing_a_pending_reduction_is_enough_to_finish_it(communicator):
    for _ in range(2):
        values = np.full(1_200_000, communicator.rank + 1.0)
        pending = communicator.all_reduce(values)
        deadline = time.monotonic() + 30
        while not pending.test():
            assert time.monotonic() < deadline
        expected = communicator.size * (communicator.size + 1) / 2
        assert (values == expected).all()
        assert pending.wait() is values


@contract
def broadcast_gives_every_rank_the_values_of_each_root(communicator):
    dtypes = [*FLOATS, *INTEGERS, np.bool_, np.complex64]
    for root in range(communicator.size):
        for dtype in dtypes:
            for shape in SHAPES:
                values = ramp(shape, dtype, communicator.rank)
                result = communicator.broadcast(values, root).wait()
                assert result is values
                np.testing.assert_array_equal(values, ramp(shape, dtype, root))


@contract
def all_gather_stacks_the_arrays_by_rank(communicator):
    for dtype in [*FLOATS, *INTEGERS, np.bool_, np.complex64]:
        for shape in [*SHAPES, (70_001,)]:
            for _ in range(2):
                mine = ramp(shape, dtype, communicator.rank)
                gathered = communicator.all_gather(mine).wait()
                assert gathered.shape == (communicator.size, *shape)
                assert gathered.dtype == dtype
                for rank in range(communicator.size):
                    np.testing.assert_array_equal(gathered[rank], ramp(shape, dtype, rank))


@contract
def a_gathered_array_belongs_to_the_rank_that_has_it(communicator):
    mine = np.zeros(3)
    gathered = communicator.all_gather(mine).wait()
    gathered[...] = communicator.rank + 1
    communicator.barrier()
    assert (mine == 0).all()
    assert (gathered == communicator.rank + 1).all()


@contract
def large_sums_of_odd_length_are_whole(communicator):
    values = np.arange(5_000_003, dtype=np.float32) % 1000 + communicator.rank
    communicator.all_reduce(values).wait()
    size = communicator.size
    expected = (np.arange(5_000_003, dtype=np.float32) % 1000) * size + size * (size - 1) // 2
    assert (values == expected).all()


@contract
def large_copies_of_odd_length_are_whole(communicator):
    # A little more than one piece; for many ranks less, since every one of them has what all gather.
    piece = 2**26 if communicator.size <= 4 else 2**22
    count = piece + 91_139
    values = np.full(count, communicator.rank, np.uint8)
    values[[0, piece - 1, piece, -1]] += 100
    gathered = communicator.all_gather(values).wait()
    communicator.broadcast(values, communicator.size - 1).wait()
    assert (gathered[-1] == values).all()
    for rank in range(communicator.size):
        assert gathered[rank, [0, piece - 1, piece, -1]].tolist() == [rank + 100] * 4
        assert int(gathered[rank].sum()) == count * rank + 400


@contract
def a_prepared_reduction_can_be_started_again_and_again(communicator):
    values = np.zeros(70_001, np.float32)
    start = communicator.prepare_all_reduce(values)
    for step in range(3):
        values[...] = communicator.rank + step
        assert start().wait() is values
        expected = communicator.size * (communicator.size - 1) / 2 + step * communicator.size
        assert (values == expected).all()


@contract
def reduce_scatter_gives_each_rank_its_part_of_the_sum_in_rank_order(communicator):
    size = communicator.size
    for dtype in FLOATS + INTEGERS:
        for length in (0, 1, 7, 1001):
            for _ in range(2):
                values = ramp((length,), dtype, communicator.rank)
                own = cut(length, size)[communicator.rank]
                result = communicator.reduce_scatter(values).wait()
                assert result.base is values or result.base is values.base or result is values
                expected = ramp((length,), np.int64, 0) * size + size * (size - 1) // 2
                np.testing.assert_array_equal(result.astype(np.int64), expected[own])
                np.testing.assert_array_equal(values[own], result)
    mine = np.random.default_rng(communicator.rank).standard_normal(5001).astype(np.float32)
    everyone = communicator.all_gather(mine).wait()
    ordered = everyone[0].copy()
    for other in everyone[1:]:
        ordered += other
    result = communicator.reduce_scatter(mine).wait()
    assert result.tobytes() == ordered[cut(5001, size)[communicator.rank]].tobytes()


@contract
def parts_of_an_array_are_gathered_in_place(communicator):
    for dtype in [*FLOATS, *INTEGERS, np.bool_]:
        for length in (0, 1, 7, 1001):
            for _ in range(2):
                expected = ramp((length,), dtype, 3)
                values = np.zeros(length, dtype)
                own = cut(length, communicator.size)[communicator.rank]
                values[own] = expected[own]
                assert communicator.all_gather_parts(values).wait() is values
                np.testing.assert_array_equal(values, expected)


@contract
def each_rank_receives_what_each_other_sent_to_it(communicator):
    rank, size = communicator.rank, communicator.size
    for dtype in [*FLOATS, *INTEGERS, np.bool_]:
        for _ in range(2):
            sent = [ramp((rank * 3 + to,), dtype, rank + to) for to in range(size)]
            received = communicator.all_to_all(sent)
            assert len(received) == size
            for source, part in enumerate(received):
                np.testing.assert_array_equal(part, ramp((source * 3 + rank,), dtype, source + rank))
            received[0][...] = 0
            communicator.barrier()
            np.testing.assert_array_equal(sent[0], ramp((rank * 3,), dtype, rank))


@contract
def rows_of_different_numbers_are_gathered_by_rank(communicator):
    for dtype in [*FLOATS, *INTEGERS, np.bool_]:
        for tail in ((), (5,), (2, 3), (0,)):
            for _ in range(2):
                # Rank 1 has none.
                lengths = [0 if rank == 1 else rank * 2 + 1 for rank in range(communicator.size)]
                gathered = communicator.all_gather_rows(
                    ramp((lengths[communicator.rank], *tail), dtype, communicator.rank)
                )
                assert len(gathered) == communicator.size
                for rank, rows in enumerate(gathered):
                    assert rows.dtype == dtype
                    np.testing.assert_array_equal(rows, ramp((lengths[rank], *tail), dtype, rank))


@contract
def allocated_memory_is_zero_and_sums_in_it_are_right(communicator):
    for dtype in (np.float32, np.float64, np.float16):
        memory = communicator.allocate(300_001, dtype)
        assert memory.shape == (300_001,)
        assert memory.dtype == dtype
        assert not memory.any()
        for _ in range(2):
            memory[...] = communicator.rank
            memory[-1] = 7
            communicator.all_reduce(memory[5:-1]).wait()
            assert (memory[5:-1] == communicator.size * (communicator.size - 1) // 2).all()
            assert (memory[:5] == communicator.rank).all()
            assert memory[-1] == 7


@contract
def objects_travel(communicator):
    for root in range(communicator.size):
        sent = {"rank": communicator.rank, "text": "x" * 100_000, "none": None}
        received = communicator.broadcast_object(sent, root)
        assert received["rank"] == root
        assert len(received["text"]) == 100_000
    ranks = communicator.all_gather_object((communicator.rank, communicator.host))
    assert [rank for rank, _ in ranks] == list(range(communicator.size))


@contract
def nobody_passes_a_barrier_before_the_last_rank_comes(communicator):
    for late in range(communicator.size):
        communicator.barrier()
        begin = time.monotonic()
        if communicator.rank == late:
            time.sleep(0.1)
        communicator.barrier()
        assert time.monotonic() - begin > 0.05


@contract
def ranks_of_a_host_are_numbered_from_zero(communicator):
    everyone = communicator.all_gather_object(
        (communicator.host, communicator.local_rank, communicator.local_size)
    )
    for host, _, local_size in everyone:
        numbers = sorted(number for other, number, _ in everyone if other == host)
        assert numbers == list(range(local_size))


@contract
def split_makes_groups_ordered_by_key_that_work_by_themselves(communicator):
    for _ in range(2):
        color = communicator.rank % 2
        with communicator.split(color, key=-communicator.rank) as group:
            members = [rank for rank in range(communicator.size) if rank % 2 == color]
            assert group.size == len(members)
            assert group.rank == len(members) - 1 - members.index(communicator.rank)
            values = np.array([float(communicator.rank)])
            group.all_reduce(values).wait()
            assert values[0] == sum(members)
            assert len(set(group.all_gather_object(group.label))) == 1
    communicator.barrier()


@contract
def a_split_of_a_split_works(communicator):
    with communicator.split(0) as whole, whole.split(whole.rank // 2) as pair:
        values = np.ones(1)
        pair.all_reduce(values).wait()
        assert values[0] == pair.size
        whole.barrier()


@contract
def wrong_arguments_raise_before_anything_is_sent(communicator):
    good = np.ones((4, 4), np.float32)
    read_only = good.copy()
    read_only.flags.writeable = False
    objects = np.array([None, {}], object)
    size = communicator.size
    wrong = [
        (TypeError, "NumPy or CuPy array, got list", lambda: communicator.all_reduce([1.0])),
        (TypeError, "got float", lambda: communicator.broadcast(1.0)),
        (TypeError, "got str", lambda: communicator.all_gather("x")),
        (ValueError, "not C-contiguous", lambda: communicator.all_reduce(good[:, 1])),
        (ValueError, "not C-contiguous", lambda: communicator.broadcast(good.T[1:])),
        (ValueError, "not C-contiguous", lambda: communicator.all_gather(good[::2, ::2])),
        (ValueError, "read-only", lambda: communicator.all_reduce(read_only)),
        (ValueError, "read-only", lambda: communicator.broadcast(read_only)),
        (ValueError, '"max" or "min", got \'mean\'', lambda: communicator.all_reduce(good, "mean")),
        (TypeError, "complex64", lambda: communicator.all_reduce(good.astype(np.complex64))),
        (TypeError, "bool", lambda: communicator.all_reduce(good.astype(np.bool_))),
        (TypeError, ">f4", lambda: communicator.all_reduce(good.astype(">f4"))),
        (TypeError, "Python objects", lambda: communicator.broadcast(objects)),
        (TypeError, "Python objects", lambda: communicator.all_gather(objects)),
        (ValueError, "expected an array with one axis", lambda: communicator.reduce_scatter(good)),
        (TypeError, "bool", lambda: communicator.reduce_scatter(np.ones(3, np.bool_))),
        (ValueError, "read-only", lambda: communicator.all_gather_parts(read_only)),
        (ValueError, "expected an array with one axis", lambda: communicator.all_gather_parts(good)),
        (ValueError, "expected one array for each", lambda: communicator.all_to_all([])),
        (ValueError, "without axes", lambda: communicator.all_gather_rows(np.array(1.0))),
        (ValueError, "not C-contiguous", lambda: communicator.all_gather_rows(good.T[1:])),
        (ValueError, '"max" or "min", got \'mean\'', lambda: communicator.prepare_all_reduce(good, "mean")),
        (ValueError, f"got {size}", lambda: communicator.broadcast(good, root=size)),
        (ValueError, "got -1", lambda: communicator.broadcast_object(1, root=-1)),
        (ValueError, "color must be >= 0, got -1", lambda: communicator.split(-1)),
    ]
    before = communicator.sequence
    for kind, message, call in wrong:
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value)
        assert f"rank {communicator.rank} of {size}" in str(caught.value)
    assert communicator.sequence == before
    assert (communicator.all_reduce(good).wait() == size).all()


@contract
def a_read_only_array_can_be_gathered(communicator):
    values = np.arange(3)
    values.flags.writeable = False
    assert communicator.all_gather(values).wait().shape == (communicator.size, 3)


@contract
def collectives_are_counted(communicator):
    before = communicator.sequence, communicator.calls["all_reduce"], communicator.calls["barrier"]
    communicator.all_reduce(np.ones(2_000_000)).wait()
    communicator.all_reduce(np.ones(1)).wait()
    communicator.barrier()
    after = communicator.sequence, communicator.calls["all_reduce"], communicator.calls["barrier"]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 2, 1]


@contract
def a_closed_communicator_refuses_to_work(communicator):
    group = communicator.split(0)
    group.close()
    group.close()
    with pytest.raises(CommunicatorError, match=r"all_reduce.* on a closed communicator"):
        group.all_reduce(np.ones(1))
    communicator.barrier()
