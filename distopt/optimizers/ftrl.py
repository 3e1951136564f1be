"""Follow the regularized leader, per coordinate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.elementwise import elementwise, sign, sqrt, where
from distopt.optimizers.optimizer import Optimizer

__all__ = ["Ftrl", "check_ftrl", "ftrl", "ftrl_scalars", "takes_root"]


@elementwise
def ftrl(
    value: Any,
    gradient: Any,
    accumulator: Any,
    linear: Any,
    *,
    learning_rate: float,
    power: float,
    l1: float,
    l2: float,
    shrinkage: float,
    square_root: bool,
) -> Any:
    """FTRL: n' = n + g*g, z += g + 2 s w - (n'^p - n^p) / lr w, w = (l1 sign(z) - z) / (n'^p / lr + 2 l2)."""
    grown = accumulator + gradient * gradient
    if square_root:
        before = sqrt(accumulator)
        after = sqrt(grown)
    else:
        before = accumulator**power
        after = grown**power
    linear = linear + (gradient + 2 * shrinkage * value) - (after - before) / learning_rate * value
    solved = (l1 * sign(linear) - linear) / (after / learning_rate + 2 * l2)
    value = where(abs(linear) <= l1, 0, solved)  # so asked, NaN gives NaN and not 0
    accumulator = grown
    return value, accumulator, linear


class Ftrl(Optimizer):
    """FTRL-proximal (McMahan et al. 2013, "Ad click prediction: a view from the trenches") in Keras' form.

    With p = -learning_rate_power and n from `initial_accumulator_value`, z from 0:

        n' = n + g^2
        z += g + 2 shrinkage w - (n'^p - n^p) / lr * w
        w = (l1 sign(z) - z) / (n'^p / lr + 2 l2)  where |z| > l1, else 0;  n = n'

    with l2 + beta / (2 lr) in the place of l2. The variable is solved for anew in every step: z knows the
    initial weights only through their change of scale, so a first gradient of zero sets the variable to
    0, as in TensorFlow. With `learning_rate_power=0` it is gradient descent from 0. A sparse gradient
    updates the listed rows only. PyTorch has no FTRL.

    Args:
        learning_rate: number, schedule or callable; positive.
        learning_rate_power: not positive; -0.5 is fast, others need a general power.
        initial_accumulator_value: where n starts; not negative.
        l1_regularization_strength: makes weights exactly zero; not negative.
        l2_regularization_strength: of the penalty on the solution; not negative.
        name: for messages and slots.
        l2_shrinkage_regularization_strength: of a penalty that acts as a gradient, in z but not in n; not
            negative.
        beta: the paper's; not negative.
        kwargs: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = ftrl
    slots = {  # noqa: RUF012  (a constant of the class)
        "accumulator": "initial_accumulator_value",
        "linear": 0.0,
    }
    settings = ("initial_accumulator_value", "l2_shrinkage_regularization_strength")
    _slots_variable_by_variable = True

    def __init__(
        self,
        learning_rate: Any = 0.001,
        learning_rate_power: Any = -0.5,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        name: str = "Ftrl",
        l2_shrinkage_regularization_strength: float = 0.0,
        beta: Any = 0.0,
        **kwargs: Any,
    ) -> None:
        shrinkage = float(l2_shrinkage_regularization_strength)
        check_ftrl("initial_accumulator_value", initial_accumulator_value)
        check_ftrl("l2_shrinkage_regularization_strength", shrinkage)
        self.initial_accumulator_value = float(initial_accumulator_value)
        self.l2_shrinkage_regularization_strength = shrinkage
        hyperparameters = {
            "learning_rate": learning_rate,
            "learning_rate_power": learning_rate_power,
            "l1_regularization_strength": l1_regularization_strength,
            "l2_regularization_strength": l2_regularization_strength,
            "beta": beta,
        }
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_ftrl(key, value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"square_root": takes_root(self, self._values)}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        return ftrl_scalars(values, self.l2_shrinkage_regularization_strength, values["beta"])


def check_ftrl(key: str, value: float) -> None:
    """Raise ValueError where an argument of FTRL is out of range."""
    if key == "learning_rate" and not value > 0:
        raise ValueError(f"lr is not a positive scalar: FTRL divides by learning_rate, got {value}")
    if key == "learning_rate_power" and not value <= 0:
        raise ValueError(f"learning_rate_power {value:f} needs to be negative or zero; -0.5 is usual")
    strengths = ("l1_regularization", "l2_regularization", "l2_shrinkage_regularization")
    limited = ("initial_accumulator_value", "beta", *(f"{name}_strength" for name in strengths))
    if key in limited and not value >= 0:
        raise ValueError(f"{key} {value:f} needs to be positive or zero")


def takes_root(optimizer: Optimizer, values: Mapping[str, float] | None) -> bool:
    """Return whether the power is the square root, which is exact, and as fast as the memory."""
    name = "learning_rate_power"
    return (optimizer.hyperparameter(name) if values is None else values[name]) == -0.5


def ftrl_scalars(values: Mapping[str, float], shrinkage: float, beta: float) -> dict[str, Any]:
    """Return the scalars of `ftrl` from the hyperparameters that both dialects have."""
    return {
        "learning_rate": values["learning_rate"],
        "power": -values["learning_rate_power"],
        "l1": values["l1_regularization_strength"],
        "l2": values["l2_regularization_strength"] + beta / (2.0 * values["learning_rate"]),
        "shrinkage": shrinkage,
    }
