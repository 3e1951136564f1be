"""TensorFlow 1's Adadelta."""

from __future__ import annotations

from typing import Any

from distopt.optimizers import adadelta as rules
from distopt.optimizers.adam import check_adam
from distopt.optimizers.tf1.optimizer import Optimizer

__all__ = ["AdadeltaOptimizer"]


class AdadeltaOptimizer(Optimizer):
    """Adadelta as `tf.train.AdadeltaOptimizer`: the rule of `distopt.optimizers.Adadelta`.

    A sparse gradient updates the listed rows of the variable and both slots.

    Args:
        learning_rate: number, schedule or callable; not negative.
        rho: decay of both averages, in [0, 1).
        epsilon: inside both roots; not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = rules.adadelta
    slots = {"accum": 0.0, "accum_update": 0.0}  # noqa: RUF012  (a constant of the class)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "Adadelta",
        **options: Any,
    ) -> None:
        hyperparameters = {"learning_rate": learning_rate, "rho": rho, "epsilon": epsilon}
        super().__init__(use_locking, name, hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)
