"""Array kernels of the primitives: plain functions of arrays, without a tape."""
