import errno
import os

import numpy as np
import pytest

from distopt.communicators import shared_memory
from distopt.communicators.shared_memory import FOLDER, SharedMemory
from distopt.testing import world

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm here")


SIZE = 30_000_000


def memory_of(communicator):
    """Shared memory of threads: each maps the region for itself, as a process would."""

    def agree(problem):
        found = [text for text in communicator.all_gather_object(problem) if text]
        return found[0] if found else None

    return SharedMemory(communicator, agree)


def large_files():
    """What stands in the folder, but for the small segments of other programs."""
    return {path.name for path in FOLDER.iterdir() if path.is_file() and path.stat().st_size > SIZE}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_sees_what_the_others_write(ranks):
    def run(communicator):
        memory = memory_of(communicator)
        own = memory.allocate(1001, np.dtype(np.float32))
        assert own.shape == (1001,)
        assert not own.any()
        own[...] = communicator.rank + 1
        communicator.barrier()
        views = memory.views(own[10:20])
        assert [view.tolist() for view in views] == [[rank + 1.0] * 10 for rank in range(ranks)]
        communicator.barrier()
        views[(communicator.rank + 1) % ranks][3] = 100 + communicator.rank
        communicator.barrier()
        assert own[13] == 100 + (communicator.rank - 1) % ranks
        assert own[14] == communicator.rank + 1

    world(ranks, run)


def test_at_no_time_does_anything_stand_in_the_folder(monkeypatch):
    before, reserve = large_files(), os.posix_fallocate

    def look(file, start, length):
        reserve(file, start, length)
        assert not large_files() - before  # a rank may be killed here

    monkeypatch.setattr(os, "posix_fallocate", look)

    def run(communicator):
        memory = memory_of(communicator)
        assert memory.allocate(SIZE, np.dtype(np.uint8)).size == SIZE
        assert not large_files() - before

    world(2, run)


def test_arrays_outlive_the_memory_object():
    def run(communicator):
        memory = memory_of(communicator)
        own = memory.allocate(5, np.dtype(np.int64))
        memory.close()
        assert memory.locate(own) is None
        del memory
        own[...] = communicator.rank
        communicator.barrier()
        return own.sum()

    assert world(2, run) == [0, 5]


def test_only_arrays_that_lie_wholly_inside_are_found():
    def run(communicator):
        memory = memory_of(communicator)
        assert memory.locate(np.zeros(3)) is None
        first = memory.allocate(1024, np.dtype(np.float32))
        second = memory.allocate(7, np.dtype(np.float16))
        assert memory.locate(np.zeros(3)) is None
        region, offset = memory.locate(second[2:])
        assert (region.number, offset) == (1, 4)
        region, offset = memory.locate(first[100:])
        assert (region.number, offset) == (0, 400)

    world(2, run)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_where_one_rank_finds_no_room_all_do_without(culprit, monkeypatch):
    reserve = os.posix_fallocate

    def full(file, start, length):
        if start == culprit * length:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, start, length)

    def run(communicator):
        memory = memory_of(communicator)
        monkeypatch.setattr(os, "posix_fallocate", full)
        assert memory.allocate(2_000_000, np.dtype(np.float32)) is None
        assert memory.problem == "/dev/shm has no room for 7.6 MiB more: No space left on device"
        communicator.barrier()
        monkeypatch.setattr(os, "posix_fallocate", reserve)
        communicator.barrier()
        assert memory.allocate(10, np.dtype(np.float32)) is not None
        assert memory.problem is None

    world(3, run)


def test_a_machine_without_the_folder_is_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path / "absent")

    def run(communicator):
        memory = memory_of(communicator)
        assert memory.make_region(100) is None
        return memory.problem

    assert world(2, run) == [f"{tmp_path / 'absent'}: No such file or directory"] * 2


def test_a_neighbour_that_can_not_open_the_file_is_told_apart(monkeypatch):
    """As in containers of one host that don't see each other's processes."""
    opened = os.open

    def blind(path, flags, mode=0o777):
        if str(path).startswith("/proc/"):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", blind)

    def run(communicator):
        memory = memory_of(communicator)
        assert memory.make_region(100) is None
        return memory.problem

    for problem in world(2, run):
        assert "of the first rank of this host can't be opened: No such file" in problem


def test_a_file_of_another_process_is_not_taken_for_the_first_rank_s(monkeypatch, tmp_path):
    """As where containers count their processes each from 1."""
    other = tmp_path / "other"
    other.write_bytes(b"precious")
    opened = os.open

    def confused(path, flags, mode=0o777):
        return opened(other if str(path).startswith("/proc/") else path, flags, mode)

    monkeypatch.setattr(os, "open", confused)

    def run(communicator):
        memory = memory_of(communicator)
        assert memory.make_region(100) is None
        return memory.problem

    for problem in world(2, run):
        assert "is another process's" in problem
    assert other.read_bytes() == b"precious"


def test_other_systems_have_no_such_memory(monkeypatch):
    monkeypatch.setattr(shared_memory.sys, "platform", "darwin")

    def run(communicator):
        memory = memory_of(communicator)
        assert memory.allocate(10, np.dtype(np.float32)) is None
        return memory.problem

    assert world(2, run) == ["shared memory is made by /dev/shm, which darwin does not have"] * 2
