"""THE NumPy/CuPy switch: which device a replica uses, its array namespace, its memory and its clock.

Everything above this module works on arrays and asks `namespace(array)` or a `Device` for what differs.
CuPy is imported on the first need of it, never at `import distopt`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np

from distopt import dlpack
from distopt.errors import BackendError

__all__ = [
    "Array",
    "Device",
    "GpuStatus",
    "MemoryPool",
    "Stopwatch",
    "adopted",
    "asnumpy",
    "choose_device",
    "current_device",
    "device_of",
    "gpu_status",
    "memory_pool",
    "namespace",
    "parse_device",
]

# NumPy's type for the type checker; CuPy's arrays behave alike.
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_POOLED_FROM_BYTES = 32 * 1024  # malloc is good below; above, every new page costs a fault
_PAGE = 4096


class _Block:
    """A piece of memory lent by a `MemoryPool`; goes back when the last array on it is gone."""

    __slots__ = ("__array_interface__", "_buffer", "_free")

    def __init__(self, buffer: Array, free: list[Array]) -> None:
        self._buffer = buffer
        self._free = free
        self.__array_interface__ = buffer.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._buffer)


class MemoryPool:
    """Memory for NumPy arrays that is used again instead of being given back to the system.

    A training step asks for the same sizes every time, so from the second step on nothing is allocated
    and no page is touched for the first time (CuPy's arrays have a pool of this kind from the start).
    Freed blocks are handed out last in, first out: the one that is still in the cache comes first.
    Safe to use from several threads.

    Attributes:
        misses: requests that needed new memory.
        bytes_held: size of all blocks, lent and free.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Array]] = {}
        self.misses = 0
        self.bytes_held = 0

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Return an uninitialised, C-contiguous, 64-byte aligned array."""
        dtype = np.dtype(dtype)
        dimensions = (shape,) if isinstance(shape, int) else tuple(shape)
        count = 1
        for length in dimensions:
            count *= length
        nbytes = count * dtype.itemsize
        if nbytes < _POOLED_FROM_BYTES:
            return np.empty(dimensions, dtype)
        rounded = -(-nbytes // _PAGE) * _PAGE
        free = self._free.setdefault(rounded, [])
        try:
            buffer = free.pop()
        except IndexError:
            raw = np.empty(rounded + 64, np.uint8)
            start = -raw.ctypes.data % 64
            buffer = raw[start : start + rounded]
            self.misses += 1
            self.bytes_held += rounded
        block: Array = np.asarray(_Block(buffer, free))
        return block[:nbytes].view(dtype).reshape(dimensions)


memory_pool = MemoryPool()
"""The pool that all CPU devices of the process share."""


class Stopwatch:
    """Measures spans of a device's time: events on a GPU, the monotonic clock on a CPU.

    Use `start()`, `stop()`, any number of times; `seconds()` waits for the device and gives the total.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._total = 0.0
        self._begun: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """Begin a span."""
        self._begun = self._now()

    def stop(self) -> None:
        """End the span begun last."""
        self._spans.append((self._begun, self._now()))

    def seconds(self) -> float:
        """Total of all spans so far, in seconds. Waits for the device."""
        for begin, end in self._spans:
            if self._device.kind == "cuda":
                end.synchronize()
                self._total += self._device.xp.cuda.get_elapsed_time(begin, end) / 1000.0
            else:
                self._total += end - begin
        self._spans.clear()
        return self._total

    def _now(self) -> Any:
        if self._device.kind == "cuda":
            event = self._device.xp.cuda.Event()
            event.record()
            return event
        return time.perf_counter()


@dataclass(frozen=True)
class Device:
    """One processor that a replica computes on.

    `cpu:0`, `cpu:1` ... are logical devices of one processor: they have arenas of their own, as GPUs
    would. `cuda:0` ... are GPUs, numbered as CUDA shows them to this process.
    """

    kind: Literal["cpu", "cuda"] = "cpu"
    index: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    @property
    def xp(self) -> Any:
        """The array namespace: the module `numpy` or `cupy`."""
        return np if self.kind == "cpu" else _cupy()

    @contextlib.contextmanager
    def activate(self) -> Generator[None]:
        """Make this the device on which new arrays are made, in this thread."""
        before = current_device()
        _current.device = self
        try:
            if self.kind == "cuda":
                with self.xp.cuda.Device(self.index):
                    yield
            else:
                yield
        finally:
            _current.device = before

    def empty(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Return an uninitialised array from the device's memory pool."""
        if self.kind == "cpu":
            return memory_pool.empty(shape, dtype)
        with self.activate():
            return self.xp.empty(shape, dtype)  # type: ignore[no-any-return]

    def zeros(self, shape: int | Sequence[int], dtype: Any = np.float32) -> Array:
        """Return an array of zeros."""
        with self.activate():
            array = self.empty(shape, dtype)
            array.fill(0)
        return array

    def asarray(self, values: Any, dtype: Any = None) -> Array:
        """Return `values` as an array on this device; copies only when they are elsewhere.

        Args:
            values: array of any library that `adopted` takes, number or list.
            dtype: of the result; None keeps that of `values`.
        """
        values = adopted(values)
        if self.kind == "cpu":
            return np.asarray(asnumpy(values), dtype)
        with self.activate():
            if _is_cupy(values) and device_of(values) != self:
                values = values.copy()  # which CuPy makes on the current device
            return self.xp.asarray(values, dtype)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""
        if self.kind == "cuda":
            self.xp.cuda.Device(self.index).synchronize()

    def stopwatch(self) -> Stopwatch:
        """Return a new stopwatch of this device."""
        return Stopwatch(self)


class _Current(threading.local):
    device = Device()


_current = _Current()


def current_device() -> Device:
    """Return the device that `Device.activate` made current in this thread; the CPU at first."""
    return _current.device


def _is_cupy(array: object) -> bool:
    return type(array).__module__.partition(".")[0] == "cupy"


def namespace(*arrays: object) -> Any:
    """Return the module, `numpy` or `cupy`, that the arrays belong to."""
    return sys.modules["cupy"] if any(_is_cupy(array) for array in arrays) else np


def device_of(array: Any) -> Device:
    """Return the device that holds an array. All NumPy arrays are on `cpu:0`."""
    return Device("cuda", int(array.device.id)) if _is_cupy(array) else Device()


def adopted(value: Any) -> Any:
    """Return an array of another library as one of NumPy or CuPy, on the same memory where it can be.

    Arrays of PyTorch, JAX and others come in through DLPack (https://dmlc.github.io/dlpack/latest/), the
    array interfaces of NumPy and CUDA, or `__array__`. A tensor that requires a gradient is detached.

    Args:
        value: array of any library; arrays of NumPy and CuPy, numbers, lists and all else stay what they are.

    Returns:
        An array that must not be written to: its memory is the caller's, and may be read-only. bfloat16 has
        the dtype of `ml_dtypes`. Memory of a GPU becomes a CuPy array; where there is no CuPy, it is copied
        to the host if its library does that by itself (JAX does).

    Raises:
        TypeError: the memory can't be reached: another kind of device, or a layout that is no plain array.
        BackendError: it is on a GPU, and CuPy can't be imported.
    """
    kind = type(value)
    if kind is np.ndarray or kind.__module__.partition(".")[0] in _NOT_FOREIGN:
        return value
    if isinstance(value, np.ndarray) or not any(hasattr(value, name) for name in _PROTOCOLS):
        return value
    if callable(getattr(value, "detach", None)):
        value = value.detach()
    try:
        return _adopted_from_gpu(value) if _is_on_gpu(value) else _adopted_from_host(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(
            f"the memory of this {kind.__module__}.{kind.__qualname__} can't be read as an array: "
            f"{str(error).rstrip('.')}. Pass a dense array that lies in host memory or on a CUDA device."
        ) from error


_NOT_FOREIGN = frozenset({"builtins", "numpy", "cupy", "distopt", "ml_dtypes"})
_PROTOCOLS = ("__dlpack__", "__cuda_array_interface__", "__array_interface__", "__array__")


def _is_on_gpu(value: Any) -> bool:
    try:
        kind = int(value.__dlpack_device__()[0])
    except (
        AttributeError,
        BufferError,
        ValueError,
    ):  # none; or of several devices, which `__array__` may gather
        return hasattr(value, "__cuda_array_interface__")
    return kind not in dlpack.HOST_DEVICES


def _adopted_from_gpu(value: Any) -> Array:
    try:
        cupy = _cupy()
    except BackendError:
        if not hasattr(value, "__array__"):
            raise
        with contextlib.suppress(TypeError):  # PyTorch won't: that CuPy is missing is the help then
            return np.asarray(value)
        raise
    # Both protocols make CuPy's stream wait for the work that still writes the array.
    return cupy.from_dlpack(value) if hasattr(value, "__dlpack__") else cupy.asarray(value)  # type: ignore[no-any-return]


def _adopted_from_host(value: Any) -> Array:
    if any(hasattr(value, name) for name in _PROTOCOLS[2:]):
        try:
            return np.asarray(value)
        except TypeError:
            if not dlpack.is_bfloat16(value):
                raise
    return dlpack.from_bfloat16(value) if dlpack.is_bfloat16(value) else np.from_dlpack(value)


def asnumpy(array: Any) -> Array:
    """Return a NumPy array; copies from the GPU where needed (and waits for it)."""
    array = adopted(array)
    return array.get() if _is_cupy(array) else np.asarray(array)


def _cupy() -> ModuleType:
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise BackendError(
            f"a CUDA device was asked for, but CuPy can't be imported ({error}). "
            "Install it with `pip install 'distopt[cuda13]'`, or ask for the CPU with --device cpu."
        ) from error


@dataclass(frozen=True)
class GpuStatus:
    """Whether this process can use a GPU, how many it sees, and why (not)."""

    usable: bool
    count: int
    reason: str


def gpu_status() -> GpuStatus:
    """Look for a usable GPU; never raises. Compiles and runs one kernel where there is one."""
    try:
        import cupy
    except ImportError as error:
        return GpuStatus(False, 0, f"CuPy is not installed ({error}); pip install 'distopt[cuda13]'")
    except Exception as error:  # a broken CUDA set-up raises anything at import
        return GpuStatus(False, 0, f"CuPy {type(error).__name__} at import: {error}")
    if not cupy.cuda.is_available():
        return GpuStatus(False, 0, "CuPy is installed, but there is no usable NVIDIA driver or GPU")
    count = int(cupy.cuda.runtime.getDeviceCount())
    try:
        total = int((cupy.arange(4, dtype=cupy.int32) + 1).sum())
    except Exception as error:  # an old driver, or NVRTC missing: the text is the help
        return GpuStatus(False, count, f"a test kernel failed: {type(error).__name__}: {error}")
    if total != 10:
        return GpuStatus(False, count, f"a test kernel computed {total} where 10 is right")
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return GpuStatus(True, count, f"{count} GPU(s) visible, the first is {name}")


def parse_device(text: str) -> Device:
    """Turn "cpu", "cpu:1", "cuda" or "cuda:3" into a `Device`.

    Raises:
        ValueError: it is none of these.
    """
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(
            f"device must be 'cpu', 'cuda', or one of them with a number, as in 'cuda:1'; got {text!r}"
        )
    return Device("cpu" if kind == "cpu" else "cuda", int(index or 0))


def choose_device(request: str | None, local_rank: int) -> tuple[Device, str]:
    """Choose this rank's first device: one process per GPU, by its rank on the host.

    Args:
        request: "cpu", "cuda", "cuda:1", or None to take a GPU where one is usable. None reads the
            environment variable DISTOPT_DEVICE first.
        local_rank: the rank's number on its host, as the communicator tells it.

    Returns:
        The device, and a sentence that says why it was chosen.

    Raises:
        BackendError: a GPU was asked for and none is usable, or it has no such number.
        ValueError: `request` can't be read.
    """
    request = request or os.environ.get("DISTOPT_DEVICE") or None
    wanted = parse_device(request) if request else None
    if wanted is not None and wanted.kind == "cpu":
        return wanted, f"{wanted} was asked for"
    status = gpu_status()
    if not status.usable:
        if wanted is not None:
            raise BackendError(
                f"device {request!r} was asked for, but no GPU is usable: {status.reason}. "
                "Mend that (see `distopt doctor`), or pass --device cpu."
            )
        return Device(), f"no usable GPU: {status.reason}"
    if request and ":" in request and wanted is not None:
        if wanted.index >= status.count:
            raise BackendError(
                f"device {request!r} was asked for, but this process sees {status.count} GPU(s): "
                f"cuda:0 to cuda:{status.count - 1}."
            )
        return wanted, f"{wanted} was asked for"
    chosen = Device("cuda", local_rank % status.count)
    shared = " (ranks share it: more ranks than GPUs)" if local_rank >= status.count else ""
    return chosen, f"rank {local_rank} of its host, {status.reason}{shared}"
