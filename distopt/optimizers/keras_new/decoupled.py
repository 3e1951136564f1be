"""Those of Keras' new optimizers that are named for their weight decay, or came with it."""

from __future__ import annotations

from typing import Any

from distopt.optimizers import lion
from distopt.optimizers.keras_new.forms import Adam
from distopt.optimizers.keras_new.optimizer import Optimizer

__all__ = ["AdamW", "Lion"]


class AdamW(Adam):
    """`Adam` with a weight decay from the start; the order of arguments is Keras'.

    Args:
        learning_rate: number, schedule or callable; not negative.
        weight_decay: not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative, may be 0.
        amsgrad: divide by the root of the largest v so far.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range, or `weight_decay` is None.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float | None = 0.004,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        if weight_decay is None:
            raise ValueError(
                "Missing value of `weight_decay` which is required and must be a float value; 0.0 is for none"
            )
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, **options)


class Lion(Optimizer):
    """`distopt.optimizers.Lion` with Keras' learning rate and averages of the weights.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: share of m in the direction, in (0, 1].
        beta_2: decay of m, in [0, 1).
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    rule = lion.lion
    slots = lion.Lion.slots
    sparse = "all"

    def __init__(
        self,
        learning_rate: Any = 0.0001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.99,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        hyperparameters = {"learning_rate": learning_rate, "beta_1": beta_1, "beta_2": beta_2}
        super().__init__(weight_decay=weight_decay, hyperparameters=hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `distopt.optimizers.Optimizer.check`."""
        super().check(key, value)
        lion.check_lion(key, value)
