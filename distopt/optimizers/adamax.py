"""Adamax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.elementwise import elementwise, maximum
from distopt.optimizers.adam import check_adam, default_epsilon
from distopt.optimizers.optimizer import Optimizer

__all__ = ["Adamax", "adamax"]


@elementwise
def adamax(
    value: Any,
    gradient: Any,
    m: Any,
    v: Any,
    *,
    rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
) -> Any:
    """Adamax: m = b1 m + (1-b1) g, v = max(b2 v, |g|), w -= rate m / (v + epsilon), rate corrected."""
    m = beta_1 * m + (1 - beta_1) * gradient
    v = maximum(beta_2 * v, abs(gradient))
    value = value - rate * m / (v + epsilon)
    return value, m, v


class Adamax(Optimizer):
    """Adamax (Kingma and Ba 2015, section 7.1, https://arxiv.org/abs/1412.6980).

    With t = iterations + 1:  m = b1 m + (1-b1) g;  v = max(b2 v, |g|);
    w -= lr / (1 - b1^t) * m / (v + epsilon).

    The paper has no epsilon; PyTorch adds it to |g| inside the maximum. A sparse gradient updates the
    listed rows only; t counts all updates.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the largest gradient, in [0, 1).
        epsilon: keeps the division finite; not negative. None and, as in Keras, 0 become 1e-7.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = adamax
    slots = {"m": 0.0, "v": 0.0}  # noqa: RUF012  (a constant of the class)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        name: str = "Adamax",
        **kwargs: Any,
    ) -> None:
        hyperparameters = {
            "learning_rate": learning_rate,
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": default_epsilon(epsilon),
        }
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        found = {key: values[key] for key in ("beta_1", "beta_2", "epsilon")}
        return {"rate": values["learning_rate"] / (1.0 - values["beta_1"] ** (step + 1)), **found}
