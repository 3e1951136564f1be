"""Adagrad."""

from __future__ import annotations

from typing import Any

from distopt.elementwise import elementwise, sqrt
from distopt.optimizers.adam import check_adam, default_epsilon
from distopt.optimizers.optimizer import Optimizer

__all__ = ["Adagrad", "adagrad"]


@elementwise
def adagrad(
    value: Any,
    gradient: Any,
    accumulator: Any,
    *,
    learning_rate: float,
    epsilon: float,
    epsilon_inside: bool = False,
) -> Any:
    """Adagrad: A += g*g, w -= lr g / (sqrt(A) + epsilon), or / sqrt(A + epsilon)."""
    accumulator = accumulator + gradient * gradient
    if epsilon_inside:
        value = value - learning_rate * gradient / sqrt(accumulator + epsilon)
    else:
        value = value - learning_rate * gradient / (sqrt(accumulator) + epsilon)
    return value, accumulator


class Adagrad(Optimizer):
    """Adagrad (Duchi, Hazan and Singer 2011, https://jmlr.org/papers/v12/duchi11a.html) in Keras' form.

    A = A + g^2;  w -= lr g / (sqrt(A) + epsilon), where A starts at `initial_accumulator_value`.

    TensorFlow 1's has no epsilon (`tf1.AdagradOptimizer`), Keras 2.11's has it inside the root
    (`keras_new.Adagrad`). PyTorch's starts A at 0 and has epsilon 1e-10. A sparse gradient updates the
    listed rows only, which is what the dense rule with zeros does.

    Args:
        learning_rate: number, schedule or callable; not negative.
        initial_accumulator_value: where A starts; not negative.
        epsilon: keeps the division finite; not negative. None and, as in Keras, 0 become 1e-7.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = adagrad
    slots = {"accumulator": "initial_accumulator_value"}  # noqa: RUF012  (a constant of the class)
    settings = ("initial_accumulator_value",)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: Any = 1e-7,
        name: str = "Adagrad",
        **kwargs: Any,
    ) -> None:
        if not initial_accumulator_value >= 0:
            raise ValueError(f"initial_accumulator_value must be non-negative: {initial_accumulator_value}")
        self.initial_accumulator_value = float(initial_accumulator_value)
        hyperparameters = {"learning_rate": learning_rate, "epsilon": default_epsilon(epsilon)}
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"epsilon_inside": False}
