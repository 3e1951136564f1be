"""Make NumPy's OpenBLAS use the widest kernels that the processor has. Must run before NumPy loads.

The OpenBLAS in NumPy's wheels (0.3.31) does not know AMD's family 26 (Zen 5) and falls back to its
AVX2 kernels there, at half the speed: a 2048x2048 float32 product on one thread took 107 GFLOP/s with
them and 202 with the AVX-512 ones (docs/results/blas.md). `OPENBLAS_CORETYPE` overrides the choice, but only
when it is set before the library loads, so this module imports nothing and `distopt/__init__.py` calls
it first. A value that the user has set is left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["choose_core_type", "prefer_wide_kernels"]

_FIRST_UNKNOWN_AMD_FAMILY = 26
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512cd"}


def choose_core_type(cpuinfo: str) -> str | None:
    """Return the `OPENBLAS_CORETYPE` to set for a processor, or None where OpenBLAS chooses right.

    Args:
        cpuinfo: the text of `/proc/cpuinfo`.
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if not key.strip():
            break  # the first processor tells enough
        fields[key.strip()] = value.strip()
    family = fields.get("cpu family", "")
    known = (
        fields.get("vendor_id") != "AuthenticAMD"
        or not family.isdigit()
        or int(family) < _FIRST_UNKNOWN_AMD_FAMILY
    )
    if known or not _AVX512 <= set(fields.get("flags", "").split()):
        return None
    return "SkylakeX"


def prefer_wide_kernels() -> str | None:
    """Set `OPENBLAS_CORETYPE` where it helps; return what was set, or None.

    Does nothing once NumPy is imported, when the variable is set already, or off Linux.
    """
    if "numpy" in sys.modules or "OPENBLAS_CORETYPE" in os.environ:
        return None
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: OpenBLAS decides
        return None
    core_type = choose_core_type(cpuinfo)
    if core_type is not None:
        os.environ["OPENBLAS_CORETYPE"] = core_type
    return core_type
