"""Primitives and the array kernels below them."""
