"""Which matrix kernels this process computes with, and a warning where the user's settings slow them."""

from __future__ import annotations

import os

from threadpoolctl import threadpool_info

__all__ = ["kernels", "warn_of_choice"]


def kernels() -> list[str]:
    """Return the BLAS libraries in this process with the processor that their kernels are made for."""
    return [
        f"{found['internal_api']} {found['version']}, {found.get('architecture', 'unknown')} kernels, "
        f"{found['num_threads']} thread(s)"
        for found in threadpool_info()
        if found["user_api"] == "blas"
    ]


def warn_of_choice() -> None:
    """Print a warning where OPENBLAS_CORETYPE keeps OpenBLAS from choosing its kernels itself."""
    if "OPENBLAS_CORETYPE" in os.environ:
        print(
            f"warning: OPENBLAS_CORETYPE={os.environ['OPENBLAS_CORETYPE']} chooses OpenBLAS' kernels; "
            "unset it to let it take those that fit this processor"
        )
