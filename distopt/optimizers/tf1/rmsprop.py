"""TensorFlow 1's RMSProp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.optimizers import rmsprop as rules
from distopt.optimizers.adam import check_adam
from distopt.optimizers.gradient_descent import check_momentum
from distopt.optimizers.tf1.optimizer import Optimizer

__all__ = ["RMSPropOptimizer"]

_ORDER = ("rms", "mg", "momentum")


class RMSPropOptimizer(Optimizer):
    """RMSProp as `tf.train.RMSPropOptimizer`: epsilon inside the root, and r starts at 1.

    r = decay r + (1-decay) g^2;  a = momentum a + lr g / sqrt(r + epsilon);  w -= a;  with `centered` also
    c = decay c + (1-decay) g, and r - c^2 in the place of r. The slot of a exists without momentum, too.
    A sparse gradient updates the listed rows only.

    Args:
        learning_rate: number, schedule or callable; not negative.
        decay: of the averages, in [0, 1).
        momentum: decay of a, in [0, 1].
        epsilon: inside the root; not negative.
        use_locking: see `Optimizer`.
        centered: divide by the standard deviation instead of the root of the mean square.
        name: for messages and slots.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = rules.rmsprop
    slots = {"rms": 1.0, "momentum": 0.0, "mg": 0.0}  # noqa: RUF012  (a constant of the class)
    settings = ("centered",)

    def __init__(
        self,
        learning_rate: Any,
        decay: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: Any = 1e-10,
        use_locking: bool = False,
        centered: bool = False,
        name: str = "RMSProp",
        **options: Any,
    ) -> None:
        self.centered = bool(centered)
        hyperparameters = {
            "learning_rate": learning_rate,
            "decay": decay,
            "momentum": momentum,
            "epsilon": epsilon,
        }
        super().__init__(use_locking, name, hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)
        if key == "decay" and not 0 <= value < 1:
            raise ValueError(f"decay must be in [0, 1), got {value}; it is the decay rate of the averages")
        if key == "momentum":
            check_momentum(value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"has_momentum": True, "centered": self.centered, "epsilon_inside": True}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        found = {key: values[key] for key in ("learning_rate", "momentum", "epsilon")}
        return {**found, "rho": values["decay"]}

    def _used_slots(self) -> list[str]:
        # The order of TensorFlow's creation decides what "w/RMSProp_1" is.
        return sorted(super()._used_slots(), key=_ORDER.index)
