"""Adadelta."""

from __future__ import annotations

from typing import Any

from distopt.elementwise import elementwise, sqrt
from distopt.optimizers.adam import check_adam, default_epsilon
from distopt.optimizers.optimizer import Optimizer

__all__ = ["Adadelta", "adadelta"]


@elementwise
def adadelta(
    value: Any, gradient: Any, grown: Any, moved: Any, *, learning_rate: float, rho: float, epsilon: float
) -> Any:
    """Adadelta: A = rho A + (1-rho) g*g, d = sqrt(U + e) / sqrt(A + e) g, U = rho U + (1-rho) d*d."""
    grown = rho * grown + (1 - rho) * (gradient * gradient)
    direction = sqrt(moved + epsilon) / sqrt(grown + epsilon) * gradient
    moved = rho * moved + (1 - rho) * (direction * direction)
    value = value - learning_rate * direction
    return value, grown, moved


class Adadelta(Optimizer):
    """Adadelta (Zeiler 2012, https://arxiv.org/abs/1212.5701).

    A = rho A + (1-rho) g^2;  d = sqrt(U + epsilon) / sqrt(A + epsilon) g;  w -= lr d;
    U = rho U + (1-rho) d^2.

    epsilon is inside both roots, as in the paper; U holds steps without the learning rate, which the
    paper does not have (its steps are those of `learning_rate=1`). PyTorch does the same with epsilon
    1e-6 and learning rate 1. A sparse gradient updates the listed rows of the variable and both slots.

    Args:
        learning_rate: number, schedule or callable; not negative.
        rho: decay of both averages, in [0, 1).
        epsilon: sets the size of the first steps; not negative. None and, as in Keras, 0 become 1e-7.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = adadelta
    slots = {"accum_grad": 0.0, "accum_var": 0.0}  # noqa: RUF012  (a constant of the class)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: Any = 1e-7,
        name: str = "Adadelta",
        **kwargs: Any,
    ) -> None:
        hyperparameters = {"learning_rate": learning_rate, "rho": rho, "epsilon": default_epsilon(epsilon)}
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)
