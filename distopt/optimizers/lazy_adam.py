"""LazyAdam: Adam that leaves rows without a gradient alone."""

from __future__ import annotations

from typing import Any

from distopt.optimizers.adam import Adam

__all__ = ["LazyAdam"]


class LazyAdam(Adam):
    """`Adam`, except that a sparse gradient updates the listed rows only, of the variable and the moments.

    Rows that have no gradient neither move nor forget, which for large embedding tables is much cheaper and
    not the same result as `Adam`'s. The bias correction goes by the count of all updates, not by how often a
    row came up: as in TensorFlow Addons, in tf.contrib.opt, and in PyTorch's `SparseAdam`, which takes
    sparse gradients only and 1e-8 for epsilon. Dense gradients are `Adam`'s.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: keeps the division finite; not negative. None and 0 become 1e-7.
        amsgrad: divide by the root of the largest v so far; slot "vhat".
        name: for messages and slots.
        kwargs: those of `Optimizer`.
    """

    sparse = "rows"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        name: str = "LazyAdam",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, name, **kwargs)
