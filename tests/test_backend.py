import threading

import numpy as np
import pytest

from distopt import backend
from distopt.backend import (
    Device,
    GpuStatus,
    MemoryPool,
    asnumpy,
    choose_device,
    current_device,
    device_of,
    namespace,
    parse_device,
)
from distopt.errors import BackendError

_BIG = (300, 1000)


def test_the_pool_hands_out_freed_memory_last_in_first_out():
    pool = MemoryPool()
    first, second = pool.empty(_BIG), pool.empty(_BIG)
    addresses = first.ctypes.data, second.ctypes.data
    del first
    del second
    assert pool.empty(_BIG).ctypes.data == addresses[1]
    assert (pool.misses, pool.bytes_held) == (2, 2 * 1_200_128)  # rounded up to pages


def test_the_pool_lends_memory_until_the_last_view_is_gone():
    pool = MemoryPool()
    array = pool.empty(_BIG)
    address = array.ctypes.data
    view = array[10:].T.reshape(-1)[::2].view()
    corner = array[-1, -1:]
    del array
    corner[0] = 7
    assert pool.empty(_BIG).ctypes.data != address
    assert corner[0] == 7
    del corner, view
    assert pool.empty(_BIG).ctypes.data == address


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1"])
@pytest.mark.parametrize("shape", [(), 0, 5, (0, 3), (3, 40_001), _BIG])
def test_pooled_arrays_are_aligned_contiguous_and_writable(shape, dtype):
    array = MemoryPool().empty(shape, dtype)
    assert array.shape == np.empty(shape).shape
    assert array.dtype == dtype
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array.fill(3)
    if array.nbytes >= 32 * 1024:
        assert array.ctypes.data % 64 == 0


def test_threads_never_get_the_same_memory():
    pool = MemoryPool()
    failures = []

    def work(number):
        for _ in range(300):
            array = pool.empty(20_000)
            array.fill(number)
            if not (array == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device("cpu", 0)),
        ("cpu:2", Device("cpu", 2)),
        ("cuda", Device("cuda", 0)),
        ("cuda:3", Device("cuda", 3)),
    ],
)
def test_devices_are_read_and_printed(text, device):
    assert parse_device(text) == device
    assert str(device) == (text if ":" in text else f"{text}:0")


@pytest.mark.parametrize("text", ["tpu", "cuda:x", "cpu:-1", "", ":1"])
def test_unknown_devices_are_refused(text):
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda'"):
        parse_device(text)


def test_without_a_gpu_the_cpu_is_chosen_and_the_reason_given(monkeypatch):
    monkeypatch.delenv("DISTOPT_DEVICE", raising=False)
    monkeypatch.setattr(backend, "gpu_status", lambda: GpuStatus(False, 0, "driver too old"))
    assert choose_device(None, 3) == (Device(), "no usable GPU: driver too old")
    assert choose_device("cpu:1", 3)[0] == Device("cpu", 1)
    with pytest.raises(BackendError, match=r"'cuda' was asked for, but no GPU is usable: driver too old"):
        choose_device("cuda", 0)
    monkeypatch.setenv("DISTOPT_DEVICE", "cuda")
    with pytest.raises(BackendError, match="no GPU is usable"):
        choose_device(None, 0)


def test_each_rank_of_a_host_gets_its_own_gpu(monkeypatch):
    monkeypatch.delenv("DISTOPT_DEVICE", raising=False)
    monkeypatch.setattr(backend, "gpu_status", lambda: GpuStatus(True, 2, "2 GPU(s) visible"))
    assert [str(choose_device(None, rank)[0]) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert "ranks share it" in choose_device(None, 2)[1]
    assert "share" not in choose_device(None, 1)[1]
    assert choose_device("cuda", 1)[0] == Device("cuda", 1)
    assert choose_device("cuda:1", 0)[0] == Device("cuda", 1)
    with pytest.raises(BackendError, match=r"'cuda:2' was asked for, but this process sees 2 GPU"):
        choose_device("cuda:2", 0)


def test_gpu_status_never_raises_and_gives_a_reason():
    status = backend.gpu_status()
    assert status.reason
    assert status.count >= 0


def test_activation_is_per_thread_and_ends_with_the_block():
    seen = []
    with Device("cpu", 1).activate():
        assert current_device() == Device("cpu", 1)
        thread = threading.Thread(target=lambda: seen.append(current_device()))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), Device("cpu", 2).activate():
            raise KeyError
        assert current_device() == Device("cpu", 1)
    assert current_device() == seen[0] == Device()


def test_numpy_arrays_belong_to_numpy_and_the_cpu():
    array = np.zeros(3)
    assert namespace(array, 1.0) is np
    assert device_of(array) == Device()
    assert asnumpy(array) is array
    assert Device().asarray(array) is array
    assert Device().zeros((2, 2)).tolist() == [[0, 0], [0, 0]]


def test_a_stopwatch_adds_up_its_spans(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(backend.time, "perf_counter", lambda: next(times))
    watch = Device().stopwatch()
    for _ in range(2):
        watch.start()
        watch.stop()
    assert watch.seconds() == 2.5
    assert watch.seconds() == 2.5
