"""Adam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.elementwise import elementwise, maximum, sqrt
from distopt.optimizers.optimizer import Optimizer

__all__ = ["Adam", "adam", "adam_rate", "check_adam", "default_epsilon"]


@elementwise
def adam(
    value: Any,
    gradient: Any,
    m: Any,
    v: Any,
    vhat: Any,
    *,
    rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    amsgrad: bool = False,
    use_nesterov: bool = False,
) -> Any:
    """Adam: m += (1-b1)(g-m), v += (1-b2)(g*g-v), w -= rate m / (sqrt(v) + epsilon), rate corrected.

    With `amsgrad` vhat = max(vhat, v) stands for v in the root, with `use_nesterov` b1 m + (1-b1) g for m.
    """
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * (gradient * gradient)
    direction = beta_1 * m + (1 - beta_1) * gradient if use_nesterov else m
    if amsgrad:
        vhat = maximum(vhat, v)
        value = value - rate * direction / (sqrt(vhat) + epsilon)
    else:
        value = value - rate * direction / (sqrt(v) + epsilon)
    return value, m, v, vhat


def adam_rate(learning_rate: float, beta_1_power: float, beta_2_power: float) -> float:
    """Return the rate that corrects both moments for their start at 0, from beta ** t."""
    return learning_rate * (1.0 - beta_2_power) ** 0.5 / (1.0 - beta_1_power)


def check_adam(key: str, value: float) -> None:
    """Raise ValueError where a hyperparameter of Adam's family is out of range."""
    if key in ("beta_1", "beta_2", "beta1", "beta2", "rho") and not 0 <= value < 1:
        raise ValueError(f"{key} must be in [0, 1), got {value}; it is the decay rate of a moment")
    if key == "epsilon" and not value >= 0:
        raise ValueError(f"epsilon must not be negative, got {value}")


def default_epsilon(epsilon: Any) -> Any:
    """Return Keras' 1e-7 for None and, as Keras does, for 0."""
    return epsilon or 1e-7


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), with TensorFlow's epsilon.

    With t = iterations + 1:  m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;
    w -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + epsilon).

    epsilon is added to the root of the uncorrected v (the paper's "epsilon hat", end of section 2), as
    in TensorFlow. PyTorch and the paper's Algorithm 1 add it to the corrected root, so that the same
    number acts more weakly there in the first steps.

    A sparse gradient updates everything, as TensorFlow's does: rows without a gradient go on moving
    while their m is not zero. `LazyAdam` leaves them alone.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: keeps the division finite; not negative. None and, as in Keras, 0 become 1e-7.
        amsgrad: divide by the root of the largest v so far (Reddi et al. 2018, "On the convergence of Adam
            and beyond"), which is kept in the slot "vhat".
        name: for messages and slots.
        kwargs: those of `Optimizer`.
    """

    rule = adam
    slots = {"m": 0.0, "v": 0.0, "vhat": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "all"
    settings = ("amsgrad",)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        name: str = "Adam",
        **kwargs: Any,
    ) -> None:
        self.amsgrad = bool(amsgrad)
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

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"amsgrad": self.amsgrad}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        found = {key: values[key] for key in ("beta_1", "beta_2", "epsilon")}
        t = step + 1
        rate = adam_rate(values["learning_rate"], values["beta_1"] ** t, values["beta_2"] ** t)
        return {"rate": rate, **found}
