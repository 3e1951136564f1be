import os
import sys
import threading
import types

import numpy as np
import pytest
from communicator_contract import CONTRACT

from distopt.communicators import Pending, connect
from distopt.communicators.mpi import MpiCommunicator
from distopt.errors import CommunicatorError


@pytest.fixture(scope="module", params=["measured", "mpi", "shared", "shared, allocated", "overlapping"])
def both(request, communicator):
    """Communicators that reduce in each of the ways there are."""
    if request.param == "measured":
        yield communicator
    elif request.param == "overlapping":
        with connect("mpi", overlap=True) as overlapping:
            yield overlapping
    else:
        with connect("mpi", algorithm=request.param.partition(",")[0]) as forced:
            if request.param == "shared, allocated":
                _put_everything_into_shared_memory(forced)
            yield forced


def _put_everything_into_shared_memory(communicator):
    """Let all reductions, of whatever array, run in memory of `allocate`."""
    memory = communicator.allocate(100_000_000, np.uint8)
    begin, plain = [0], {name: getattr(communicator, name) for name in IN_PLACE}

    def moved(values):
        start = begin[0] = 0 if begin[0] + values.nbytes > memory.size else begin[0]
        begin[0] += -(-values.nbytes // 8) * 8
        inside = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        inside[...] = values
        return inside

    def reduced(name):
        def call(values, *arguments):
            if not isinstance(values, np.ndarray) or values.dtype.hasobject or not values.flags.writeable:
                return plain[name](values, *arguments)  # raises
            if not values.flags.c_contiguous or values.dtype.byteorder == ">":
                return plain[name](values, *arguments)
            return _Moved(values, moved(values), lambda inside: plain[name](inside, *arguments))

        return call

    for name in IN_PLACE:
        setattr(communicator, name, reduced(name))


IN_PLACE = ("all_reduce", "reduce_scatter", "all_gather_parts")


class _Moved(Pending):
    """A collective of an array's copy in shared memory."""

    def __init__(self, values, inside, start):
        self.values, self.inside, self.pending = values, inside, start(inside)

    def test(self):
        return self.pending.test() and self.wait() is not None

    def wait(self):
        result = self.pending.wait()
        self.values[...] = self.inside
        if result.shape == self.values.shape:
            return self.values
        start = (result.ctypes.data - self.inside.ctypes.data) // max(result.itemsize, 1)
        return self.values[start : start + result.size]


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(both, check):
    check(both)


def test_within_one_host_all_reduce_is_done_when_it_returns(communicator):
    values = np.ones(10)
    communicator.all_reduce(values)
    assert communicator.local_size == communicator.size
    assert (values == communicator.size).all()
    assert "one host, blocking all_reduce" in communicator.description


def test_overlapping_reductions_are_finished_by_progress_alone(communicator):
    with connect("mpi", overlap=True) as overlapping:
        values = np.ones(5_000_000, np.float32)
        pending = overlapping.all_reduce(values)
        while overlapping._algorithms[0]._running:
            overlapping.progress()
        assert pending.test()
        assert (values == communicator.size).all()


def test_a_communicator_that_checks_its_calls_raises_on_all_ranks_and_works_on(communicator):
    with MpiCommunicator(checked=True) as checked:
        values = np.ones(3 + (checked.rank > 0))
        if checked.size > 1:
            with pytest.raises(CommunicatorError) as caught:
                checked.all_reduce(values)
            assert "rank 0 called all_reduce(float64[3], sum)" in str(caught.value)
            assert "rank 1 called all_reduce(float64[4], sum)" in str(caught.value)
        assert checked.all_gather_object(checked.rank) == list(range(checked.size))


def test_debug_mode_checks_the_calls(communicator, monkeypatch):
    monkeypatch.setenv("DISTOPT_DEBUG", "1")
    with MpiCommunicator() as debugging:
        if debugging.size > 1:
            with pytest.raises(CommunicatorError, match="disagree about collective number 1"):
                debugging.barrier() if debugging.rank == 0 else debugging.broadcast_object(1)


def test_other_users_of_mpi_are_not_disturbed(communicator):
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    request = world.isend(f"from {world.rank}", right, tag=7)
    communicator.all_reduce(np.ones(1000)).wait()
    assert world.recv(source=left, tag=7) == f"from {left}"
    request.wait()


def test_closing_stops_the_watchdog_thread(communicator):
    before = threading.active_count()
    with connect("mpi") as second:
        second.barrier()
        assert threading.active_count() == before + (1 if second.size > 1 else 0)
    assert threading.active_count() == before


class _DeviceArray:
    """As much of a CuPy array as the communicator touches, with its memory out of MPI's sight."""

    def __init__(self, values):
        self.hidden = np.array(values)
        self.shape, self.dtype, self.flags = values.shape, values.dtype, self.hidden.flags
        self.device = types.SimpleNamespace(id=0)

    def get(self):
        _DeviceArray.log.append("get")
        return self.hidden.copy()

    def __setitem__(self, key, values):
        assert isinstance(values, _DeviceArray)
        assert values.dtype == self.dtype
        self.hidden[key] = values.hidden


_DeviceArray.__module__ = "cupy"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_arrays_of_a_device_go_through_host_memory(both, monkeypatch, dtype):
    log = _DeviceArray.log = []

    class _Device:
        def __init__(self, index):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    stream = types.SimpleNamespace(synchronize=lambda: log.append("synchronize"))
    fake = types.ModuleType("cupy")
    fake.asarray = lambda values, dtype=None: _DeviceArray(np.asarray(values, dtype))
    fake.cuda = types.SimpleNamespace(Device=_Device, get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", fake)

    large = 2**40 if dtype == np.int64 else 0  # beyond float32
    values = _DeviceArray(np.full((2, 3), both.rank + 1 + large, dtype))
    assert both.all_reduce(values).wait() is values
    assert (values.hidden == both.size * (both.size + 1) // 2 + both.size * large).all()
    assert log == ["get", "synchronize"]

    values = _DeviceArray(np.full((2, 3), both.rank, dtype))
    both.broadcast(values, both.size - 1).wait()
    assert (values.hidden == both.size - 1).all()

    gathered = both.all_gather(_DeviceArray(np.full(2, both.rank, dtype))).wait()
    np.testing.assert_array_equal(gathered.hidden[:, 0], np.arange(both.size))


@pytest.mark.slow
@pytest.mark.timeout(250, method="thread")
def test_more_than_two_gigabytes_at_once(communicator):
    if communicator.size != 2:
        pytest.skip("once, on 2 ranks, is enough for 4 GB of memory")
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if communicator.all_reduce(np.array([free]), "min").wait()[0] < 8 * 2**30:
        pytest.skip("needs 8 GB of free memory")
    count = 2**31 + 11
    values = np.full(count, 3 + communicator.rank, np.uint8)
    communicator.all_reduce(values).wait()
    assert values[0] == values[2**31 - 1] == values[-1] == 7
    assert int(values[-1000:].sum()) == 7000
    values[-5:] = communicator.rank
    communicator.broadcast(values, 1).wait()
    assert values[-6:].tolist() == [7, 1, 1, 1, 1, 1]
