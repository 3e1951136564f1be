"""Adam."""

from __future__ import annotations

from typing import Any

from distopt.elementwise import elementwise, sqrt
from distopt.optimizers.optimizer import Optimizer

__all__ = ["Adam", "adam"]


@elementwise
def adam(
    value: Any, gradient: Any, m: Any, v: Any, *, rate: float, beta_1: float, beta_2: float, epsilon: float
) -> Any:
    """Adam: m += (1-b1)(g-m), v += (1-b2)(g*g-v), w -= rate m / (sqrt(v) + epsilon), rate corrected."""
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * (gradient * gradient)
    value = value - rate * m / (sqrt(v) + epsilon)
    return value, m, v


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), with TensorFlow's epsilon.

    With t = iterations + 1:  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    w -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + epsilon).

    epsilon is added to the root of the uncorrected v (the paper's "epsilon hat", end of section 2), as
    in TensorFlow. PyTorch and the paper's Algorithm 1 add it to the corrected root, so that the same
    number acts more weakly there in the first steps.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: keeps the division finite; not negative.
        name: for messages and slots.
        options: those of `Optimizer`.
    """

    rule = adam
    slots = {"m": 0.0, "v": 0.0}  # noqa: RUF012  (a ClassVar of the base)
    # As TensorFlow's: rows without a gradient go on moving while their m is not zero.
    sparse_rows_only = False

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        *,
        name: str = "Adam",
        **options: Any,
    ) -> None:
        hyperparameters = {
            "learning_rate": learning_rate,
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
        }
        super().__init__(name, hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        if key in ("beta_1", "beta_2") and not 0 <= value < 1:
            raise ValueError(f"{key} must be in [0, 1), got {value}; it is the decay rate of a moment")
        if key == "epsilon" and not value >= 0:
            raise ValueError(f"epsilon must not be negative, got {value}")

    def scalars(self) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        found = super().scalars()
        step = self.iterations + 1
        correction = (1 - found["beta_2"] ** step) ** 0.5 / (1 - found["beta_1"] ** step)
        rate = found.pop("learning_rate") * correction
        return {**found, "rate": rate}
