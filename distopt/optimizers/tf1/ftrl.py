"""TensorFlow 1's FTRL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.optimizers import ftrl as rules
from distopt.optimizers.tf1.optimizer import Optimizer
from distopt.variables import Variable

__all__ = ["FtrlOptimizer"]


class FtrlOptimizer(Optimizer):
    """FTRL-proximal as `tf.train.FtrlOptimizer`: the rule of `distopt.optimizers.Ftrl` without beta.

    Args:
        learning_rate: number, schedule or callable; positive.
        learning_rate_power: not positive; -0.5 is fast, others need a general power.
        initial_accumulator_value: where n starts; not negative.
        l1_regularization_strength: makes weights exactly zero; not negative.
        l2_regularization_strength: of the penalty on the solution; not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        accum_name: takes the optimizer's name in the name of the variable of slot "accum".
        linear_name: the same for slot "linear".
        l2_shrinkage_regularization_strength: of a penalty that acts as a gradient, in z but not in n; not
            negative.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = rules.ftrl
    slots = {"accum": "initial_accumulator_value", "linear": 0.0}  # noqa: RUF012  (a constant of the class)
    settings = (
        "initial_accumulator_value",
        "accum_name",
        "linear_name",
        "l2_shrinkage_regularization_strength",
    )

    def __init__(
        self,
        learning_rate: Any,
        learning_rate_power: Any = -0.5,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        use_locking: bool = False,
        name: str = "Ftrl",
        accum_name: str | None = None,
        linear_name: str | None = None,
        l2_shrinkage_regularization_strength: float = 0.0,
        **options: Any,
    ) -> None:
        shrinkage = float(l2_shrinkage_regularization_strength)
        rules.check_ftrl("initial_accumulator_value", initial_accumulator_value)
        rules.check_ftrl("l2_shrinkage_regularization_strength", shrinkage)
        self.initial_accumulator_value = float(initial_accumulator_value)
        self.l2_shrinkage_regularization_strength = shrinkage
        self.accum_name, self.linear_name = accum_name, linear_name
        hyperparameters = {
            "learning_rate": learning_rate,
            "learning_rate_power": learning_rate_power,
            "l1_regularization_strength": l1_regularization_strength,
            "l2_regularization_strength": l2_regularization_strength,
        }
        super().__init__(use_locking, name, hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        rules.check_ftrl(key, value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"square_root": rules.takes_root(self, self._values)}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        return rules.ftrl_scalars(values, self.l2_shrinkage_regularization_strength, beta=0.0)

    def _slot_variable_name(self, variable: Variable, slot_name: str) -> str:
        given = {"accum": self.accum_name or self._name, "linear": self.linear_name or self._name}
        repeats = slot_name == "linear" and given["linear"] == given["accum"]
        return f"{variable.name}/{given[slot_name]}" + ("_1" if repeats else "")
