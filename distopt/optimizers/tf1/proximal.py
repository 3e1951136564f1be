"""TensorFlow 1's proximal gradient descent, with one rate or with Adagrad's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.elementwise import elementwise, maximum, sign, sqrt
from distopt.optimizers.tf1.adagrad import check_positive, check_strength
from distopt.optimizers.tf1.optimizer import Optimizer

__all__ = ["ProximalAdagradOptimizer", "ProximalGradientDescentOptimizer", "proximal"]


@elementwise
def proximal(
    value: Any,
    gradient: Any,
    accumulator: Any,
    *,
    learning_rate: float,
    l1: float,
    l2: float,
    adaptive: bool,
) -> Any:
    """FOBOS: p = w - r g, w = sign(p) max(|p| - r l1, 0) / (1 + r l2); r = lr, or lr / sqrt(A += g*g)."""
    if adaptive:
        accumulator = accumulator + gradient * gradient
        rate = learning_rate / sqrt(accumulator)
    else:
        rate = learning_rate
    proposed = value - rate * gradient
    value = sign(proposed) * maximum(abs(proposed) - rate * l1, 0) / (1 + rate * l2)
    return value, accumulator


class _Proximal(Optimizer):
    """What both have: the rule and its scalars."""

    rule = proximal

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_strength(key, value)

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        return {
            "learning_rate": values["learning_rate"],
            "l1": values["l1_regularization_strength"],
            "l2": values["l2_regularization_strength"],
        }


class ProximalGradientDescentOptimizer(_Proximal):
    """Gradient descent with l1 and l2 penalties solved for, as `tf.train.ProximalGradientDescentOptimizer`.

    p = w - lr g;  w = sign(p) max(|p| - lr l1, 0) / (1 + lr l2)  (FOBOS: Duchi and Singer 2009, "Efficient
    online and batch learning using forward backward splitting"). A sparse gradient updates the listed rows
    only, so penalties act on those alone. Variables of float64 work, which they did not in TensorFlow.

    Args:
        learning_rate: number, schedule or callable; not negative.
        l1_regularization_strength: makes weights exactly zero; not negative.
        l2_regularization_strength: not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    slots = {"accumulator": 0.0}  # noqa: RUF012  (never made: the rule does not use it without `adaptive`)

    def __init__(
        self,
        learning_rate: Any,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        use_locking: bool = False,
        name: str = "ProximalGradientDescent",
        **options: Any,
    ) -> None:
        hyperparameters = {
            "learning_rate": learning_rate,
            "l1_regularization_strength": l1_regularization_strength,
            "l2_regularization_strength": l2_regularization_strength,
        }
        super().__init__(use_locking, name, hyperparameters, **options)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"adaptive": False}


class ProximalAdagradOptimizer(_Proximal):
    """Adagrad with l1 and l2 penalties solved for, as `tf.train.ProximalAdagradOptimizer`.

    A += g^2, then the rule of `ProximalGradientDescentOptimizer` with lr / sqrt(A), element by element, in
    the place of lr. A sparse gradient updates the listed rows only.

    Args:
        learning_rate: number, schedule or callable; not negative.
        initial_accumulator_value: where A starts; positive.
        l1_regularization_strength: makes weights exactly zero; not negative.
        l2_regularization_strength: not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    slots = {"accumulator": "initial_accumulator_value"}  # noqa: RUF012  (a constant of the class)
    settings = ("initial_accumulator_value",)

    def __init__(
        self,
        learning_rate: Any,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        use_locking: bool = False,
        name: str = "ProximalAdagrad",
        **options: Any,
    ) -> None:
        check_positive("initial_accumulator_value", initial_accumulator_value)
        self.initial_accumulator_value = float(initial_accumulator_value)
        hyperparameters = {
            "learning_rate": learning_rate,
            "l1_regularization_strength": l1_regularization_strength,
            "l2_regularization_strength": l2_regularization_strength,
        }
        super().__init__(use_locking, name, hyperparameters, **options)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"adaptive": True}
