"""Arrays of libraries that need not be installed: as little as each protocol asks for."""

import numpy as np


class SpeaksDlpack:
    """A DLPack producer in host memory and nothing else."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class HasInterface:
    """An array by `__array_interface__`, as PIL's images are."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.__array_interface__ = self.values.__array_interface__


class HasArray:
    """An array by `__array__`; JAX's are read-only like these."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.values.flags.writeable = False
        self.shape, self.dtype = self.values.shape, "dtype of another library"

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)


class NeedsDetaching(HasArray):
    """An array that a tape of its own watches."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on a tensor that requires grad.")

    def detach(self):
        return HasArray(self.values)


class OnGpu:
    """An array on a CUDA device, whose library doesn't copy by itself, as PyTorch's."""

    def __init__(self, index=0):
        self._index = index
        self.streams = []

    def __dlpack_device__(self):
        return 2, self._index

    def __dlpack__(self, **options):
        self.streams.append(options)
        return "capsule"


class OnGpuCopies(OnGpu):
    """One whose library copies to the host by itself, as JAX's."""

    def __array__(self, dtype=None, copy=None):
        return np.arange(3.0)


class HasCudaInterface:
    """A device array by `__cuda_array_interface__` alone, as Numba's."""

    def __init__(self):
        data = {"shape": (3,), "typestr": "<f4", "data": (4096, False), "version": 3}
        self.__cuda_array_interface__ = data


HOST = [SpeaksDlpack, HasInterface, HasArray]
