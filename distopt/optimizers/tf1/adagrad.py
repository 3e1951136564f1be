"""TensorFlow 1's Adagrad, and Adagrad by dual averaging."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from distopt.elementwise import elementwise, maximum, sign, sqrt
from distopt.optimizers import adagrad as rules
from distopt.optimizers.tf1.optimizer import Optimizer
from distopt.scopes.global_step import get_global_step
from distopt.variables import Variable

__all__ = ["AdagradDAOptimizer", "AdagradOptimizer", "adagrad_da", "check_positive", "check_strength"]


@elementwise
def adagrad_da(
    value: Any,
    gradient: Any,
    total: Any,
    squared: Any,
    *,
    learning_rate: float,
    threshold: float,
    damping: float,
) -> Any:
    """Dual averaging: G += g, Q += g*g, w = -lr sign(G) max(|G| - threshold, 0) / (damping + sqrt(Q))."""
    total = total + gradient
    squared = squared + gradient * gradient
    shrunk = sign(total) * maximum(abs(total) - threshold, 0)
    value = -learning_rate * shrunk / (damping + sqrt(squared))
    return value, total, squared


class AdagradOptimizer(Optimizer):
    """Adagrad, `A += g^2`, `w -= lr * g / sqrt(A)`, as `tf.train.AdagradOptimizer`: there is no epsilon.

    A sparse gradient updates the listed rows only.

    Args:
        learning_rate: number, schedule or callable; not negative.
        initial_accumulator_value: where A starts; positive.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = rules.adagrad
    slots = {"accumulator": "initial_accumulator_value"}  # noqa: RUF012  (a constant of the class)
    settings = ("initial_accumulator_value",)

    def __init__(
        self,
        learning_rate: Any,
        initial_accumulator_value: float = 0.1,
        use_locking: bool = False,
        name: str = "Adagrad",
        **options: Any,
    ) -> None:
        check_positive("initial_accumulator_value", initial_accumulator_value)
        self.initial_accumulator_value = float(initial_accumulator_value)
        super().__init__(use_locking, name, {"learning_rate": learning_rate}, **options)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"epsilon_inside": False}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        return {"learning_rate": values["learning_rate"], "epsilon": 0.0}


class AdagradDAOptimizer(Optimizer):
    """Adagrad by dual averaging, for sparse linear models, as `tf.train.AdagradDAOptimizer`.

    With T = global_step + 1, read before it grows:

        G += g;  Q += g^2;  w = -lr sign(G) max(|G| - l1 T, 0) / (l2 T lr + sqrt(Q))

    (Duchi, Hazan and Singer 2011, section 5.1.) The variable is solved for anew: its old value, and so its
    initial one, has no influence. A sparse gradient updates the listed rows only, with the global T.

    Args:
        learning_rate: number, schedule or callable; not negative.
        global_step: integer variable, also to be passed to `minimize` or `apply_gradients`; otherwise
            T stays 1. One on a GPU is waited for in every step.
        initial_gradient_squared_accumulator_value: where Q starts; positive.
        l1_regularization_strength: makes weights exactly zero; not negative.
        l2_regularization_strength: not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
        TypeError: `global_step` is no integer variable.
    """

    rule = adagrad_da
    slots = {  # noqa: RUF012  (a constant of the class)
        "gradient_accumulator": 0.0,
        "gradient_squared_accumulator": "initial_gradient_squared_accumulator_value",
    }
    settings = ("initial_gradient_squared_accumulator_value",)

    def __init__(
        self,
        learning_rate: Any,
        global_step: Variable,
        initial_gradient_squared_accumulator_value: float = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        use_locking: bool = False,
        name: str = "AdagradDA",
        **options: Any,
    ) -> None:
        start = initial_gradient_squared_accumulator_value
        check_positive("initial_gradient_squared_accumulator_value", start)
        if not isinstance(global_step, Variable) or global_step.dtype.kind not in "iu":
            raise TypeError(
                f"global_step must be an integer Variable that apply_gradients counts up, got {global_step!r}"
            )
        self.initial_gradient_squared_accumulator_value = float(start)
        self._global_step = global_step
        hyperparameters = {
            "learning_rate": learning_rate,
            "l1_regularization_strength": l1_regularization_strength,
            "l2_regularization_strength": l2_regularization_strength,
        }
        super().__init__(use_locking, name, hyperparameters, **options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Make the optimizer that `get_config` described.

        Args:
            config: what `get_config` returned. It has no global step.
            custom_objects: schedules by the names of their classes, and the variable "global_step"; the
                default graph's global step when it is not there.

        Raises:
            ValueError: there is no global step.
        """
        own = dict(custom_objects or {})
        given = [config.get("global_step"), own.pop("global_step", None), get_global_step()]
        step = next((step for step in given if step is not None), None)
        if step is None:
            raise ValueError(
                "AdagradDAOptimizer needs a global step, which a configuration doesn't hold: pass "
                "custom_objects={'global_step': variable}, or make one with get_or_create_global_step()"
            )
        return super().from_config({**config, "global_step": step}, own)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_strength(key, value)

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        t = float(self._global_step) + 1.0
        return {
            "learning_rate": values["learning_rate"],
            "threshold": values["l1_regularization_strength"] * t,
            "damping": values["l2_regularization_strength"] * t * values["learning_rate"],
        }


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless the start of an accumulator that is divided by is positive."""
    if not value > 0:
        raise ValueError(f"{name} must be positive: {value}; the step is divided by its root")


def check_strength(key: str, value: float) -> None:
    """Raise ValueError where the strength of a regularization is negative."""
    if key.endswith("_regularization_strength") and not value >= 0:
        raise ValueError(f"{key} {value:f} needs to be positive or zero")
