"""Arrays that the contract is checked with: every dtype, and shapes that are easily forgotten."""

import ml_dtypes
import numpy as np

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
COPIED = [*FLOATS, *INTEGERS, np.bool_, np.complex64, np.complex128]  # can be sent, if not summed
SHAPES = [(), (0,), (1,), (7,), (3, 0), (3, 5), (101, 33)]
LARGE = 1_200_007  # elements: odd, and several pieces of what algorithms cut arrays into


def ramp(shape, dtype, offset):
    """0, 1, ... 6, 0, 1, ... plus an offset: small integers, exact in every dtype and every sum."""
    count = int(np.prod(shape))
    return (np.arange(count) % 7 + offset).reshape(shape).astype(dtype)
