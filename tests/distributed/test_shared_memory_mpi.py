"""What only real processes show of reductions in shared memory."""

import logging
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from distopt.communicators import connect, shared_memory
from distopt.communicators.communicator import cut
from distopt.communicators.mpi import MpiCommunicator
from distopt.communicators.shared_memory import FOLDER
from distopt.errors import CommunicatorError


@pytest.fixture(scope="module")
def shared(communicator):
    with connect("mpi", algorithm="shared") as forced:
        yield forced


def in_rank_order(communicator, values):
    """((a + b) + c) + ... of what all ranks have, by hand."""
    parts = communicator.all_gather(values.copy()).wait()
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def test_allocated_memory_is_that_of_all_ranks_of_the_host(shared):
    memory = shared.allocate(1001, np.float64)
    memory[...] = shared.rank
    shared.barrier()
    if shared.size > 1:
        assert [view[0] for view in shared._steps.memory.views(memory)] == list(range(shared.size))
    shared.barrier()


def test_sums_in_allocated_memory_are_in_rank_order(shared):
    for size in (1, 5, 4097, 1_000_003):
        memory = shared.allocate(size, np.float32)
        memory[...] = np.random.default_rng(shared.rank).standard_normal(size)
        expected = in_rank_order(shared, memory)
        shared.all_reduce(memory).wait()
        assert memory.tobytes() == expected.tobytes()


def test_an_all_reduce_has_the_bits_of_its_two_halves(shared):
    memory = shared.allocate(100_003, np.float32)
    mine = np.random.default_rng(shared.rank).standard_normal(memory.size).astype(np.float32)
    memory[...] = mine
    shared.all_reduce(memory).wait()
    whole = memory.copy()
    memory[...] = mine
    own = cut(memory.size, shared.size)[shared.rank]
    assert shared.reduce_scatter(memory).wait().tobytes() == whole[own].tobytes()
    shared.all_gather_parts(memory).wait()
    assert memory.tobytes() == whole.tobytes()


def test_a_late_rank_is_waited_for(shared):
    memory = shared.allocate(1000, np.float32)
    for late in range(shared.size):
        memory[...] = 1
        shared.barrier()
        if shared.rank == late:
            time.sleep(0.3)
        began, used = time.monotonic(), time.process_time()
        shared.all_reduce(memory).wait()
        assert (memory == shared.size).all()
        if shared.rank != late:
            assert time.monotonic() - began > 0.2
            assert time.process_time() - used < 0.25  # it naps: the late one may need the core


def test_regions_are_files_without_a_name(shared):
    memory = shared.allocate(10, np.float32)
    assert memory is not None
    shared.barrier()
    links = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    mine = [link for link in links if link.startswith(f"{FOLDER}/#")]
    assert all(link.endswith(" (deleted)") for link in mine)
    assert bool(mine) is (shared.size > 1)


def test_groups_have_memory_of_their_own(communicator):
    with communicator.split(communicator.rank % 2) as group:
        whole, part = communicator.allocate(500, np.float32), group.allocate(500, np.float32)
        for _ in range(3):
            whole[...], part[...] = 1, 1
            pending = communicator.all_reduce(whole)
            group.all_reduce(part).wait()
            pending.wait()
            assert (whole == communicator.size).all()
            assert (part == group.size).all()
        whole[...] = communicator.rank
        group.all_reduce(whole).wait()  # memory of another communicator is memory like any
        assert (
            whole == sum(rank for rank in range(communicator.size) if rank % 2 == communicator.rank % 2)
        ).all()


def test_memory_stays_when_its_communicator_is_closed():
    with MpiCommunicator() as short:
        memory = short.allocate(1000, np.int64)
        memory[...] = short.rank
        short.all_reduce(memory).wait()
    memory += 1
    assert (memory == short.size * (short.size - 1) // 2 + 1).all()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of JAX, where a test imported it
@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_forked_child_does_not_disturb_its_parent(shared):
    memory = shared.allocate(1000, np.float32)
    memory[...] = 1
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    shared.all_reduce(memory).wait()
    assert (memory == shared.size).all()


def test_where_one_rank_has_no_shared_memory_all_do_without(communicator, monkeypatch, caplog):
    if communicator.size == 1:
        pytest.skip("one rank shares nothing")
    if communicator.rank == communicator.size - 1:
        monkeypatch.setattr(shared_memory, "_reserve", lambda file, start, length: "no room")
    with caplog.at_level(logging.WARNING, "distopt"), MpiCommunicator() as poor:
        memory = poor.allocate(1000, np.float32)
        memory[...] = poor.rank
        poor.all_reduce(memory).wait()
        assert (memory == poor.size * (poor.size - 1) // 2).all()
        reason = f"no room (rank {poor.size - 1} on host {communicator.host})"
        assert f"no shared memory: {reason}" in poor.description
        assert poor.all_reduce_choices == {}  # there was nothing to choose
    told = [record.getMessage() for record in caplog.records]
    assert told == (
        [f"world reduces without shared memory, by MPI alone: {reason}"] if poor.rank == 0 else []
    )


def test_ranks_that_ask_for_different_algorithms_are_refused(communicator):
    if communicator.size == 1:
        pytest.skip("one rank can't differ")
    asked = "shared" if communicator.rank else "mpi"
    with pytest.raises(ValueError, match=r"must ask for the same .* got \['mpi', 'shared'"):
        MpiCommunicator(algorithm=asked)


def test_an_algorithm_that_is_not_possible_here_is_refused(communicator):
    if communicator.size == 1:
        pytest.skip("one rank needs no algorithm")
    with pytest.raises(ValueError, match="'hierarchical' is not available here"):
        MpiCommunicator(algorithm="hierarchical")


def test_the_environment_chooses_the_algorithm(communicator, monkeypatch):
    for name in ("mpi", "shared"):
        monkeypatch.setenv("DISTOPT_ALLREDUCE", name)
        with connect("mpi") as forced:
            values = np.full(1000, communicator.rank, np.float32)
            forced.all_reduce(values).wait()
            assert (values == forced.size * (forced.size - 1) // 2).all()
            assert forced.all_reduce_choices == {"all": f"{name} (asked for)"}


def test_what_was_chosen_is_the_same_on_all_ranks_and_can_be_read():
    with MpiCommunicator() as measured:
        memory = measured.allocate(1_000_000, np.float32)
        for size in (1, 1000, 1_000_000):
            measured.all_reduce(memory[:size]).wait()
            measured.all_reduce(np.zeros(size, np.float32)).wait()
        choices = measured.all_reduce_choices
        assert len(set(map(str, measured.all_gather_object(choices)))) == 1
        assert len(choices) == (6 if measured.size > 1 else 0)
        if measured.size > 1:
            assert choices["allocated memory, 1 MiB and more"].startswith(("shared (", "mpi ("))


def test_checked_ranks_find_that_one_did_not_allocate():
    with MpiCommunicator(checked=True) as checked:
        memory = checked.allocate(100, np.float32)
        values = memory if checked.rank == 0 else np.zeros(100, np.float32)
        if checked.size > 1:
            with pytest.raises(
                CommunicatorError, match=r"memory of `allocate` on some ranks .* \[True, False"
            ):
                checked.all_reduce(values)
        checked.barrier()


def test_a_prepared_reduction_in_place_allocates_nothing_that_lasts(shared):
    memory = shared.allocate(1_000_000, np.float32)
    start = shared.prepare_all_reduce(memory)
    start().wait()
    tracemalloc.start()
    for _ in range(20):
        start().wait()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # the array has 4 MB
