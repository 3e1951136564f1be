"""TensorFlow 1's Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distopt.optimizers import adam as rules
from distopt.optimizers.tf1.optimizer import Optimizer
from distopt.variables import Variable

__all__ = ["AdamOptimizer"]


class AdamOptimizer(Optimizer):
    """Adam, `w -= lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + epsilon)`, as `tf.train.AdamOptimizer`.

    The powers of the betas are two float32 variables that are multiplied once per `apply_gradients`, as in
    TensorFlow: two calls for two halves of a model count as two steps for both. A sparse gradient
    updates everything, as the dense one with zeros would.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.
    """

    rule = rules.adam
    slots = {"m": 0.0, "v": 0.0, "vhat": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "all"
    _powered: ClassVar[tuple[str, ...]] = ("beta1", "beta2")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: Any = 0.9,
        beta2: Any = 0.999,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
        **options: Any,
    ) -> None:
        self._powers: tuple[Variable, ...] | None = None
        hyperparameters = {
            "learning_rate": learning_rate,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
        }
        super().__init__(use_locking, name, hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        rules.check_adam(key, value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"amsgrad": False}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        power_1, power_2 = (float(power) for power in self._get_beta_accumulators())
        return {
            "rate": rules.adam_rate(values["learning_rate"], power_1, power_2),
            "beta_1": values["beta1"],
            "beta_2": values["beta2"],
            "epsilon": values["epsilon"],
        }

    def finish(self) -> None:
        """Multiply the powers by the betas of this step."""
        super().finish()
        for power, name in zip(self._get_beta_accumulators(), self._powered, strict=True):
            power.value[...] *= np.float32((self._values or {})[name])

    def _get_beta_accumulators(self) -> tuple[Variable, ...]:
        """Return the variables that hold beta1 ** t and beta2 ** t for the next update."""
        if self._powers is None:
            self._powers = tuple(
                self.add_weight(f"{name}_power", initializer=self.hyperparameter(name))
                for name in self._powered
            )
        return self._powers

    def _create_all_weights(self, var_list: Sequence[Variable]) -> None:
        self._get_beta_accumulators()
        super()._create_all_weights(var_list)
