"""bfloat16 through DLPack, which NumPy itself can't read (https://dmlc.github.io/dlpack/latest/c_api.html)."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["HOST_DEVICES", "from_bfloat16", "is_bfloat16"]

HOST_DEVICES = (1, 3)
"""Kinds of DLPack's devices whose memory the host reads: kDLCPU and kDLCUDAHost (pinned)."""

_BFLOAT, _UINT = 4, 1  # DLDataTypeCode
# DLTensor: data (8 bytes), device (4 + 4), ndim (4), then the dtype: code (1), bits (1), lanes (2).
_CODE_OFFSET = 20


def is_bfloat16(value: Any) -> bool:
    """Return whether an array of another library says that it holds bfloat16."""
    if not hasattr(value, "__dlpack__"):
        return False
    capsule = value.__dlpack__()
    return _code(capsule).value == _BFLOAT


def from_bfloat16(value: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a bfloat16 array of another library in host memory as NumPy's, on the same memory."""
    bits: Any = np.from_dlpack(_AsBits(value))
    return bits.view(ml_dtypes.bfloat16)  # type: ignore[no-any-return]


class _AsBits:
    """The same array, said to be of uint16."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._value.__dlpack_device__()  # type: ignore[no-any-return]

    def __dlpack__(self, **options: Any) -> Any:
        del options  # those of a newer version; a capsule of the first is always allowed
        capsule = self._value.__dlpack__()
        _code(capsule).value = _UINT
        return capsule


def _code(capsule: Any) -> ctypes.c_uint8:
    """Return the type code in a capsule, to be used while the capsule is there."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.c_uint8.from_address(int(pointer(capsule, b"dltensor")) + _CODE_OFFSET)
