"""The older optimizers in the forms that Keras 2.11 gave them. The rules are those of the older ones."""

from __future__ import annotations

from typing import Any, ClassVar

from distopt.optimizers import adadelta, adagrad, adam, adamax, ftrl, gradient_descent, nadam, rmsprop
from distopt.optimizers.keras_new.optimizer import Optimizer

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "Adamax", "Ftrl", "Nadam", "RMSprop"]


class SGD(Optimizer, gradient_descent.SGD):
    """`distopt.optimizers.SGD`, but with a sparse gradient all rows go on with their velocity.

    Args:
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the velocity, in [0, 1].
        nesterov: step by Nesterov's rule.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    sparse = "all"
    settings = (*gradient_descent.SGD.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: Any = 0.0,
        nesterov: bool = False,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, momentum, nesterov, weight_decay=weight_decay, **options)


class Adam(Optimizer, adam.Adam):
    """`distopt.optimizers.Adam` with weight decay.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative, may be 0.
        amsgrad: divide by the root of the largest v so far.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    settings = (*adam.Adam.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay=weight_decay, **options
        )
        self.epsilon = epsilon


class Adagrad(Optimizer, adagrad.Adagrad):
    """Adagrad with epsilon inside the root: A += g^2;  w -= lr g / sqrt(A + epsilon).

    Args:
        learning_rate: number, schedule or callable; not negative.
        initial_accumulator_value: where A starts; not negative.
        epsilon: not negative, may be 0.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    settings = (*adagrad.Adagrad.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        initial_accumulator_value: float = 0.1,
        epsilon: Any = 1e-7,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate, initial_accumulator_value, epsilon, weight_decay=weight_decay, **options
        )
        self.epsilon = epsilon

    def options(self) -> dict[str, Any]:
        """See `distopt.optimizers.Optimizer.options`."""
        return {"epsilon_inside": True}


class Adadelta(Optimizer, adadelta.Adadelta):
    """`distopt.optimizers.Adadelta`, but with a sparse gradient both averages of all rows decay.

    Args:
        learning_rate: number, schedule or callable; not negative.
        rho: decay of both averages, in [0, 1).
        epsilon: inside both roots; not negative, may be 0.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    sparse = "all"
    settings = (*adadelta.Adadelta.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.95,
        epsilon: Any = 1e-7,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, rho, epsilon, weight_decay=weight_decay, **options)
        self.epsilon = epsilon


class Adamax(Optimizer, adamax.Adamax):
    """`distopt.optimizers.Adamax`, but with a sparse gradient all rows go on moving.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the largest gradient, in [0, 1).
        epsilon: added to the largest gradient; not negative, may be 0.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    sparse = "all"
    settings = (*adamax.Adamax.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay=weight_decay, **options)
        self.epsilon = epsilon


class Nadam(Optimizer, nadam.Nadam):
    """`distopt.optimizers.Nadam` with s = 1 in the momentum's schedule, and schedules as learning rate.

    mu_i = b1 (1 - 0.96^i / 2), with which the momentum reaches beta_1 within a hundred steps instead of
    tens of thousands. A sparse gradient moves all rows.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the corrected root; not negative, may be 0.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    sparse = "all"
    settings = (*nadam.Nadam.settings, *Optimizer.settings)
    _takes_schedules: ClassVar[bool] = True

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay=weight_decay, **options)
        self.epsilon = epsilon

    def _schedule_decay(self, values: Any) -> float:
        return 1.0


class RMSprop(Optimizer, rmsprop.RMSprop):
    """RMSprop with epsilon inside the root always; a sparse gradient updates all rows.

    r = rho r + (1-rho) g^2;  s = lr g / sqrt(r [- c^2] + epsilon);  w -= s, or a = momentum a + s;  w -= a.

    Args:
        learning_rate: number, schedule or callable; not negative.
        rho: decay of the averages, in [0, 1).
        momentum: decay of the velocity, in [0, 1].
        epsilon: inside the root; not negative, may be 0.
        centered: divide by the standard deviation instead of the root of the mean square.
        weight_decay: see `Optimizer`.
        ema_overwrite_frequency: see `Optimizer`; with `use_ema` the variables are set to their averages every
            hundred updates unless None is given, which is Keras' default for RMSprop alone.
        options: those of `Optimizer`.
    """

    settings = (*rmsprop.RMSprop.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: Any = 1e-7,
        centered: bool = False,
        weight_decay: float | None = None,
        ema_overwrite_frequency: int | None = 100,
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            rho,
            momentum,
            epsilon,
            centered,
            weight_decay=weight_decay,
            ema_overwrite_frequency=ema_overwrite_frequency,
            **options,
        )
        self.epsilon = epsilon
        self.sparse = "all"

    def options(self) -> dict[str, Any]:
        """See `distopt.optimizers.Optimizer.options`."""
        return {**super().options(), "epsilon_inside": True}


class Ftrl(Optimizer, ftrl.Ftrl):
    """`distopt.optimizers.Ftrl`, but with a sparse gradient all rows are solved for anew.

    A row that has had no gradient yet becomes 0.

    Args:
        learning_rate: number, schedule or callable; positive.
        learning_rate_power: not positive.
        initial_accumulator_value: where n starts; not negative.
        l1_regularization_strength: not negative.
        l2_regularization_strength: not negative.
        l2_shrinkage_regularization_strength: not negative.
        beta: not negative.
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    sparse = "all"
    settings = (*ftrl.Ftrl.settings, *Optimizer.settings)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        learning_rate_power: Any = -0.5,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: Any = 0.0,
        l2_regularization_strength: Any = 0.0,
        l2_shrinkage_regularization_strength: float = 0.0,
        beta: Any = 0.0,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            learning_rate_power,
            initial_accumulator_value,
            l1_regularization_strength,
            l2_regularization_strength,
            l2_shrinkage_regularization_strength=l2_shrinkage_regularization_strength,
            beta=beta,
            weight_decay=weight_decay,
            **options,
        )
