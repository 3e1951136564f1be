"""distopt: exact data-parallel training for NumPy and CuPy over MPI."""

from distopt import blas as _blas

_blas.prefer_wide_kernels()
