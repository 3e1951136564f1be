"""distopt: exact data-parallel training for NumPy and CuPy over MPI."""
