"""The contract, operation by operation: each twice, with every shape, size and dtype that it may be given.

Part of `communicator_contract.CONTRACT`.
"""

import numpy as np
import pytest
from contract_arrays import COPIED, FLOATS, INTEGERS, LARGE, SHAPES, ramp

from distopt.communicators.communicator import cut
from distopt.errors import CommunicatorError

DETAILS = []


def detail(check):
    DETAILS.append(check)
    return check


def summed(communicator, shape):
    size = communicator.size
    return ramp(shape, np.int64, 0) * size + size * (size - 1) // 2


@detail
def prepared_reductions_take_every_dtype_shape_and_operation(communicator):
    rank, size = communicator.rank, communicator.size
    for dtype in FLOATS + INTEGERS:
        for shape in SHAPES:
            values = ramp(shape, dtype, rank)
            start = communicator.prepare_all_reduce(values)
            for _ in range(2):
                values[...] = ramp(shape, dtype, rank)
                assert start().wait() is values
                np.testing.assert_array_equal(values.astype(np.int64), summed(communicator, shape))
    for op, expected in (("max", size - 1), ("min", 0)):
        values = np.zeros(3)
        start = communicator.prepare_all_reduce(values, op)
        for _ in range(2):
            values[...] = rank
            start().wait()
            assert (values == expected).all()


@detail
def prepared_reductions_may_be_pending_together(communicator):
    arena = np.zeros(LARGE, np.float32)
    parts = cut(LARGE, 5)
    starts = [communicator.prepare_all_reduce(arena[part]) for part in parts]
    for step in range(2):
        arena[...] = communicator.rank + step
        for pending in [start() for start in starts]:
            pending.wait()
        assert (arena == communicator.size * (communicator.size - 1) / 2 + step * communicator.size).all()


@detail
def preparing_sends_nothing(communicator):
    before = communicator.sequence
    for _ in range(communicator.rank):  # as often as it likes
        communicator.prepare_all_reduce(np.ones(3))
    assert communicator.sequence == before
    communicator.barrier()


@detail
def largest_and_smallest_of_every_shape(communicator):
    rank, size = communicator.rank, communicator.size
    for shape in [*SHAPES, (70_001,)]:
        for dtype in (np.float16, np.float32, np.int16):
            for _ in range(2):
                values = ramp(shape, dtype, rank)
                communicator.all_reduce(values, "max").wait()
                np.testing.assert_array_equal(values, ramp(shape, dtype, size - 1))
                values = ramp(shape, dtype, rank)
                communicator.all_reduce(values, "min").wait()
                np.testing.assert_array_equal(values, ramp(shape, dtype, 0))


@detail
def contiguous_parts_of_larger_arrays_are_reduced_in_place(communicator):
    whole = np.ones((5, 4, 3), np.float32)
    for _ in range(2):
        whole[...] = 1
        communicator.all_reduce(whole[2]).wait()
        communicator.all_reduce(whole[3, 1]).wait()
        communicator.all_reduce(whole[4, 2, 1:2]).wait()
        changed = np.zeros((5, 4, 3), bool)
        changed[2] = changed[3, 1] = changed[4, 2, 1] = True
        np.testing.assert_array_equal(whole, np.where(changed, communicator.size, 1))


@detail
def large_arrays_of_odd_length_are_scattered_and_gathered(communicator):
    rank, size = communicator.rank, communicator.size
    for dtype in (np.float32, np.float16):
        for _ in range(2):
            values = ramp((LARGE,), dtype, rank)
            own = cut(LARGE, size)[rank]
            result = communicator.reduce_scatter(values).wait()
            np.testing.assert_array_equal(result.astype(np.int64), summed(communicator, (LARGE,))[own])
            values[: own.start] = values[own.stop :] = 0
            assert communicator.all_gather_parts(values).wait() is values
            np.testing.assert_array_equal(values.astype(np.int64), summed(communicator, (LARGE,)))


@detail
def fewer_elements_than_ranks_are_scattered_and_gathered(communicator):
    rank, size = communicator.rank, communicator.size
    for length in range(size + 2):
        for _ in range(2):
            values = ramp((length,), np.float64, rank)
            result = communicator.reduce_scatter(values).wait()
            own = cut(length, size)[rank]
            assert result.shape == (own.stop - own.start,)
            communicator.all_gather_parts(values).wait()
            np.testing.assert_array_equal(values, summed(communicator, (length,)))


@detail
def a_slice_of_an_arena_is_scattered_and_gathered_and_nothing_beside_it(communicator):
    arena = np.full(1001, 5.0, np.float32)
    for _ in range(2):
        arena[...] = 5
        communicator.reduce_scatter(arena[3:-4]).wait()
        communicator.all_gather_parts(arena[3:-4]).wait()
        assert (arena[3:-4] == 5 * communicator.size).all()
        assert (arena[:3] == 5).all()
        assert (arena[-4:] == 5).all()


@detail
def parts_of_every_dtype_are_gathered(communicator):
    for dtype in COPIED:
        for _ in range(2):
            expected = ramp((11,), dtype, 1)
            values = np.zeros(11, dtype)
            own = cut(11, communicator.size)[communicator.rank]
            values[own] = expected[own]
            communicator.all_gather_parts(values).wait()
            np.testing.assert_array_equal(values, expected)


@detail
def what_is_sent_to_each_rank_may_be_large_empty_and_of_every_dtype(communicator):
    rank, size = communicator.rank, communicator.size
    for dtype in COPIED:
        for lengths in ([0] * size, [1] * size, list(range(size))):
            for _ in range(2):
                received = communicator.all_to_all([ramp((n,), dtype, rank) for n in lengths])
                for source, part in enumerate(received):
                    assert part.dtype == dtype
                    np.testing.assert_array_equal(part, ramp((lengths[rank],), dtype, source))
    for _ in range(2):
        parts = [np.full(LARGE // size + to, rank * size + to, np.float32) for to in range(size)]
        for source, part in enumerate(communicator.all_to_all(parts)):
            assert part.shape == (LARGE // size + rank,)
            assert (part == source * size + rank).all()
        # One rank has it all.
        parts = [np.full(LARGE if rank == size - 1 else 0, to, np.int32) for to in range(size)]
        received = communicator.all_to_all(parts)
        assert [part.size for part in received] == [0] * (size - 1) + [LARGE]
        assert (received[-1] == rank).all()


@detail
def what_is_sent_may_be_read_only_and_stays_as_it_is(communicator):
    rank, size = communicator.rank, communicator.size
    values = np.arange(6.0) + rank
    values.flags.writeable = False
    for _ in range(2):
        for source, part in enumerate(communicator.all_to_all([values] * size)):
            assert (part == np.arange(6.0) + source).all()
            part[...] = -1  # it is this rank's own
        for source, rows in enumerate(communicator.all_gather_rows(values)):
            assert (rows == np.arange(6.0) + source).all()
            rows[...] = -1
        communicator.barrier()
        assert (values == np.arange(6.0) + rank).all()


@detail
def rows_may_be_large_and_of_every_dtype(communicator):
    rank, size = communicator.rank, communicator.size
    for dtype in COPIED:
        for _ in range(2):
            for source, rows in enumerate(communicator.all_gather_rows(ramp((rank, 2), dtype, rank))):
                np.testing.assert_array_equal(rows, ramp((source, 2), dtype, source))
    for _ in range(2):
        large = LARGE // (3 * size)
        mine = np.full((large if rank == size - 1 else rank, 3), rank, np.float32)
        gathered = communicator.all_gather_rows(mine)
        assert [len(rows) for rows in gathered] == [*range(size - 1), large]
        assert all((rows == source).all() for source, rows in enumerate(gathered))
    assert [len(rows) for rows in communicator.all_gather_rows(np.zeros((0, 4)))] == [0] * size


@detail
def every_dtype_and_shape_is_broadcast_twice(communicator):
    root = communicator.size - 1
    for dtype in COPIED:
        for shape in SHAPES:
            for _ in range(2):
                values = ramp(shape, dtype, communicator.rank)
                communicator.broadcast(values, root).wait()
                np.testing.assert_array_equal(values, ramp(shape, dtype, root))


@detail
def memory_of_any_size_and_dtype_is_allocated(communicator):
    rank, size = communicator.rank, communicator.size
    for dtype in [*FLOATS, *INTEGERS]:
        for length in (0, 1, 7, 4097):
            first, second = communicator.allocate(length, dtype), communicator.allocate(length, dtype)
            assert first.shape == second.shape == (length,)
            assert first.dtype == second.dtype == dtype
            assert first.flags.c_contiguous
            assert first.flags.writeable
            assert not first.any()
            for _ in range(2):
                first[...] = rank
                second[...] = 1
                communicator.all_reduce(first).wait()
                assert (first.astype(np.int64) == size * (size - 1) // 2).all()
                assert (second == 1).all()  # memory of its own
            communicator.reduce_scatter(second).wait()
            communicator.all_gather_parts(second).wait()
            assert (second.astype(np.int64) == size).all()


@detail
def large_objects_and_arrays_in_objects_travel(communicator):
    sent = {"array": np.arange(300_000) + communicator.rank, "empty": [], "bytes": b"x" * 2_000_003}
    for _ in range(2):
        everyone = communicator.all_gather_object(sent)
        for rank, received in enumerate(everyone):
            np.testing.assert_array_equal(received["array"], np.arange(300_000) + rank)
            assert received["empty"] == []
        received = communicator.broadcast_object(sent if communicator.rank == 0 else None)
        assert len(received["bytes"]) == 2_000_003
        assert communicator.all_gather_object(None) == [None] * communicator.size


@detail
def groups_of_one_and_of_all_are_communicators_too(communicator):
    for _ in range(2):
        with communicator.split(communicator.rank * 1000) as alone:
            assert (alone.rank, alone.size, alone.local_size) == (0, 1, 1)
            assert alone.all_reduce(np.ones(3)).wait().tolist() == [1.0] * 3
            assert alone.all_gather_object("x") == ["x"]
        with communicator.split(7, key=communicator.rank) as whole:
            assert (whole.rank, whole.size) == (communicator.rank, communicator.size)
            assert (whole.reduce_scatter(np.ones(9)).wait() == communicator.size).all()
    communicator.barrier()


def wrong_calls(communicator):
    """Every operation with what it does not take: (error, part of its message, call)."""
    good = np.ones((4, 4), np.float32)
    flat = np.ones(8, np.float32)
    read_only = flat.copy()
    read_only.flags.writeable = False
    objects = np.array([None, {}], object)
    size = communicator.size
    reductions = {
        "all_reduce": communicator.all_reduce,
        "prepare_all_reduce": communicator.prepare_all_reduce,
        "reduce_scatter": communicator.reduce_scatter,
    }
    in_place = reductions | {
        "broadcast": communicator.broadcast,
        "all_gather_parts": communicator.all_gather_parts,
    }
    copying = {
        "all_gather": communicator.all_gather,
        "all_gather_rows": communicator.all_gather_rows,
        "all_to_all": lambda part: communicator.all_to_all([part] * size),
    }
    for name, call in (in_place | copying).items():
        yield TypeError, "NumPy or CuPy array, got list", name, lambda call=call: call([1.0])
        yield TypeError, "got NoneType", name, lambda call=call: call(None)
        yield TypeError, "Python objects", name, lambda call=call: call(objects)
        yield ValueError, "not C-contiguous", name, lambda call=call: call(flat[::2])
        yield ValueError, "not C-contiguous", name, lambda call=call: call(good[:, 1])
        yield ValueError, "not C-contiguous", name, lambda call=call: call(flat[::-1])
    for name, call in in_place.items():
        yield ValueError, "read-only", name, lambda call=call: call(read_only)
    for name, call in reductions.items():
        for dtype in (np.bool_, np.complex128, np.dtype(">f8"), np.dtype("S3"), np.dtype("M8[s]")):
            wrong = np.zeros(3, dtype)
            yield TypeError, "can't be reduced", name, lambda call=call, wrong=wrong: call(wrong)
    flat_only = ("reduce_scatter", "all_gather_parts", "all_to_all")
    for name in flat_only:
        call = (in_place | copying)[name]
        yield ValueError, "one axis, got shape ()", name, lambda call=call: call(np.array(1.0))
        yield ValueError, "one axis, got shape (4, 4)", name, lambda call=call: call(good)
    yield ValueError, "without axes", "all_gather_rows", lambda: communicator.all_gather_rows(np.array(1.0))
    for count in (0, size - 1, size + 1):
        parts = [flat] * count
        message = f"got {count}"
        yield ValueError, message, "all_to_all", lambda parts=parts: communicator.all_to_all(parts)
    if size > 1:
        mixed = [flat] * (size - 1) + [np.ones(3)]
        yield TypeError, "one dtype", "all_to_all", lambda: communicator.all_to_all(mixed)
    for op in ("mean", "SUM", None):
        yield ValueError, f"got {op!r}", "all_reduce", lambda op=op: communicator.all_reduce(good, op)
    for root in (-1, size):
        message = f"got {root}"
        yield ValueError, message, "broadcast", lambda root=root: communicator.broadcast(good, root)
        yield ValueError, message, "object", lambda root=root: communicator.broadcast_object(1, root)
    yield ValueError, "size must be >= 0, got -1", "allocate", lambda: communicator.allocate(-1, np.float32)
    yield TypeError, "Python objects", "allocate", lambda: communicator.allocate(3, object)
    yield ValueError, "color must be >= 0, got -2", "split", lambda: communicator.split(-2)
    yield TypeError, "color must be an integer, got str", "split", lambda: communicator.split("a")
    yield TypeError, "color must be an integer, got float", "split", lambda: communicator.split(1.5)


@detail
def wrong_arguments_of_every_operation_raise_on_every_rank_and_leave_all_usable(communicator):
    before = communicator.sequence
    seen = set()
    for kind, message, name, call in wrong_calls(communicator):
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value), name
        assert f"rank {communicator.rank} of {communicator.size}" in str(caught.value), name
        seen.add(name)
    assert len(seen) == 11
    assert communicator.sequence == before  # nothing was sent
    assert (communicator.all_reduce(np.ones(3)).wait() == communicator.size).all()
    assert communicator.all_gather_object(communicator.rank) == list(range(communicator.size))


def differing_calls(communicator):
    """Every operation called differently by the last rank: (words of the message, call)."""
    odd = int(communicator.rank == communicator.size - 1)
    size = communicator.size
    single = [np.float64, np.float32][odd]

    def shaped(*shape):
        return np.ones((*shape, 3 + odd))

    yield "all_reduce(float64[4], sum)", lambda: communicator.all_reduce(shaped()).wait()
    yield "all_reduce(float32[3], sum)", lambda: communicator.all_reduce(np.ones(3, single)).wait()
    yield (
        "all_reduce(float64[3], max)",
        lambda: communicator.all_reduce(np.ones(3), ["sum", "max"][odd]).wait(),
    )
    yield "all_reduce(float64[4], sum)", lambda: communicator.prepare_all_reduce(shaped())().wait()
    yield "reduce_scatter(float64[4])", lambda: communicator.reduce_scatter(shaped()).wait()
    yield "all_gather_parts(float64[4])", lambda: communicator.all_gather_parts(shaped()).wait()
    yield "all_gather(float64[2, 4])", lambda: communicator.all_gather(shaped(2)).wait()
    yield "all_gather_rows(float64[-1, 4])", lambda: communicator.all_gather_rows(shaped(2))
    yield "all_to_all(float32)", lambda: communicator.all_to_all([np.ones(3, single)] * size)
    yield "broadcast(float64[3], root=1)", lambda: communicator.broadcast(np.ones(3), odd).wait()
    yield "broadcast_object(root=1)", lambda: communicator.broadcast_object(1, odd)
    yield "allocate(float64[4])", lambda: communicator.allocate(3 + odd, np.float64)
    yield "barrier()", lambda: communicator.barrier() if odd else communicator.all_gather_object(1)
    yield "split()", lambda: communicator.split(0) if odd else communicator.barrier()


def calls_that_differ_raise_on_every_rank_and_leave_all_usable(communicator):
    """For communicators that compare calls: threads always, MPI where it is `checked`."""
    if communicator.size == 1:
        return
    for said, call in differing_calls(communicator):
        with pytest.raises(CommunicatorError) as caught:
            call()
        text = str(caught.value)
        assert f"rank {communicator.size - 1} called {said}" in text, text
        assert "rank 0 called" in text
        values = np.full(3, communicator.rank)
        communicator.all_reduce(values).wait()
        assert (values == communicator.size * (communicator.size - 1) // 2).all()
    assert communicator.all_gather_object(communicator.rank) == list(range(communicator.size))
