"""Nadam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from distopt.elementwise import elementwise, sqrt
from distopt.optimizers.adam import check_adam, default_epsilon
from distopt.optimizers.optimizer import Optimizer
from distopt.schedules import LearningRateSchedule
from distopt.variables import Variable

__all__ = ["Nadam", "nadam"]


@elementwise
def nadam(
    value: Any,
    gradient: Any,
    m: Any,
    v: Any,
    *,
    learning_rate: float,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    gradient_weight: float,
    momentum_weight: float,
    correction: float,
) -> Any:
    """Nadam: Adam's moments; w -= lr (gw g + mw m) / (sqrt(v / correction) + epsilon)."""
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * (gradient * gradient)
    ahead = gradient_weight * gradient + momentum_weight * m
    value = value - learning_rate * ahead / (sqrt(v / correction) + epsilon)
    return value, m, v


class Nadam(Optimizer):
    """Adam with Nesterov's momentum on a schedule (Dozat 2016) in the form of Keras 2.4 to 2.10.

    With t = iterations + 1,  mu_i = b1 (1 - 0.96^(s i) / 2)  with s = `schedule_decay`,  and P_t the product
    of mu_1 to mu_t:

        m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2
        w -= lr ((1 - mu_t) g / (1 - P_t) + mu_(t+1) m / (1 - P_(t+1))) / (sqrt(v / (1 - b2^t)) + epsilon)

    epsilon is added to the corrected root. P is the weight "momentum_cache", of the dtype of the first
    variable. A sparse gradient decays m and v of all rows and moves the listed rows only. PyTorch's
    NAdam is the same rule (its `momentum_decay` is s), with epsilon 1e-8.

    Args:
        learning_rate: number or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: keeps the division finite; not negative. None and, as in Keras, 0 become 1e-7.
        name: for messages and slots.
        kwargs: those of `Optimizer`, and `schedule_decay`, 0.004 when not given. `decay` is another name of
            it, the one in `get_config`, and does not decay the learning rate: Keras uses it so.

    Raises:
        ValueError: an argument out of range, or the learning rate is a `LearningRateSchedule`.
    """

    rule = nadam
    slots = {"m": 0.0, "v": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "hybrid"
    _takes_schedules: ClassVar[bool] = False

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        name: str = "Nadam",
        **kwargs: Any,
    ) -> None:
        self._product: Variable | None = None
        if self._has_decay:
            given = [kwargs.pop("schedule_decay", None), kwargs.get("decay"), 0.004]
            kwargs["decay"] = next(value for value in given if value is not None)
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
        now, following = (self._momentum(values, step + ahead) for ahead in (1, 2))
        product = float(self._momentum_cache(None).value) * now
        found = {key: values[key] for key in ("learning_rate", "beta_1", "beta_2", "epsilon")}
        return {
            **found,
            "gradient_weight": (1.0 - now) / (1.0 - product),
            "momentum_weight": following / (1.0 - product * following),
            "correction": 1.0 - values["beta_2"] ** (step + 1),
        }

    def finish(self) -> None:
        """Multiply the product of the momenta by this step's."""
        super().finish()
        self._momentum_cache(None).value[...] *= self._momentum(self._values or {}, self.step + 1)

    def _momentum(self, values: Mapping[str, float], t: int) -> float:
        """Return mu_t."""
        return values["beta_1"] * (1.0 - 0.5 * 0.96 ** (self._schedule_decay(values) * t))

    def _schedule_decay(self, values: Mapping[str, float]) -> float:
        return values["decay"]

    def _momentum_cache(self, dtype: Any) -> Variable:
        if self._product is None:
            self._product = self.add_weight(f"{self._name}/momentum_cache", dtype=dtype, initializer="ones")
        return self._product

    def _create_slots(self, var_list: Sequence[Variable]) -> None:
        if var_list:
            self._momentum_cache(var_list[0].dtype)
        super()._create_slots(var_list)

    def _read_hyperparameters(self) -> dict[str, float]:
        # Keras takes `decay` for the momentum's schedule; the learning rate stays.
        return {key: self._hyper.value(key, self.step) for key in self._hyper}

    def _set_hyper(self, name: str, value: Any) -> None:
        is_schedule = name == "learning_rate" and isinstance(value, LearningRateSchedule | dict)
        if is_schedule and not self._takes_schedules:
            raise ValueError(
                "The Nadam optimizer does not support LearningRateSchedules as the learning rate, got "
                f"{value!r}; its momentum has a schedule of its own. Pass a number or a callable."
            )
        super()._set_hyper(name, value)
