"""The optimizers of Keras 2.11 to 2.15, where they differ from the older ones in `distopt.optimizers`.

Sparse gradients update all rows, as dense ones with zeros would; epsilon is taken as it is given; and all
have `weight_decay` and averages of the weights. The rules are those of the older ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distopt.aggregators import Pair
from distopt.optimizers import adadelta, adagrad, adam, adamax, ftrl, gradient_descent, lion, nadam, rmsprop
from distopt.optimizers import optimizer as engine
from distopt.optimizers.moving_averages import update_average
from distopt.optimizers.updates import ApplyState
from distopt.optimizers.weight_decay import shrink
from distopt.variables import Variable

__all__ = [
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Ftrl",
    "Lion",
    "Nadam",
    "Optimizer",
    "RMSprop",
]


class Optimizer(engine.Optimizer):
    """What Keras 2.11 gave to all optimizers: weight decay and averages of the weights.

    A step is: clip the global gradients, w -= lr * weight_decay * w (all rows, also for a sparse gradient,
    of the variables that have one), the update, the constraint, the averages. Keras averages before the
    constraint, and applies constraints after sparse gradients too, which raise RuntimeError here.

    `learning_rate` can be set at any time, a schedule as well, where Keras raises TypeError.

    One clip at most acts, as in Keras: the first in the order clipnorm, global_clipnorm, clipvalue that is
    given and not 0.

    Args:
        arguments: those of the class.
        weight_decay: not negative, or None for none. It is multiplied by the learning rate.
        use_ema: keep an average of each variable in the slot "average":
            average = ema_momentum * average + (1 - ema_momentum) * w, from the initial value.
        ema_momentum: in [0, 1].
        ema_overwrite_frequency: after every so many updates the variables are set to their averages; None:
            only `finalize_variable_values` does that.
        jit_compile: kept for code from Keras, where it turns on a compiler. Rules are compiled anyway.
        name: for messages and slots; the class's name when None.
        options: those of `distopt.optimizers.Optimizer` but `decay` and `lr`. `is_legacy_optimizer`, which
            Keras' configurations have in them, is accepted, and says nothing.

    Raises:
        ValueError: an argument out of range, or `decay`.
        TypeError: an unknown argument.
    """

    _has_decay: ClassVar[bool] = False
    settings = ("weight_decay", "use_ema", "ema_momentum", "ema_overwrite_frequency", "jit_compile")

    def __init__(
        self,
        *arguments: Any,
        weight_decay: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        jit_compile: bool = True,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if weight_decay is not None and not weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {weight_decay}; None is for none")
        if not 0 <= ema_momentum <= 1:
            raise ValueError(f"`ema_momentum` must be in the range [0, 1]. Received: {ema_momentum}")
        if ema_overwrite_frequency is not None and not _is_count(ema_overwrite_frequency):
            raise ValueError(
                "`ema_overwrite_frequency` must be an integer >= 1 or None. Received: "
                f"{ema_overwrite_frequency!r}"
            )
        options.pop("is_legacy_optimizer", None)
        if "decay" in options:
            raise ValueError(
                "decay is deprecated in the new Keras optimizer: give an InverseTimeDecay as learning_rate, "
                f"or take distopt.optimizers.{type(self).__name__}"
            )
        self.weight_decay = None if weight_decay is None else float(weight_decay)
        self.use_ema = bool(use_ema)
        self.ema_momentum = float(ema_momentum)
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.jit_compile = bool(jit_compile)
        self._undecayed: set[int] = set()
        self._undecayed_names: list[str] = []
        self._averaged: Sequence[Variable] = ()
        super().__init__(*arguments, name=type(self).__name__ if name is None else name, **options)

    def get_config(self) -> dict[str, Any]:
        """See `distopt.optimizers.Optimizer.get_config`; clips that aren't used are in it as None."""
        return {**self._clip_limits, **super().get_config(), "is_legacy_optimizer": False}

    def _clips_for(self, limits: Mapping[str, Any]) -> list[Callable[[list[Pair]], Iterable[Pair]]]:
        super()._clips_for(limits)  # refuses what is out of range
        for key in ("clipnorm", "global_clipnorm", "clipvalue"):
            if limits[key]:
                return super()._clips_for({key: limits[key]})
        return []

    def build(self, var_list: Iterable[Variable]) -> None:
        """Make the slots of variables before the first update."""
        self._create_all_weights(list(var_list))

    def exclude_from_weight_decay(
        self, var_list: Iterable[Variable] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Leave variables out of weight decay.

        Args:
            var_list: which.
            var_names: regular expressions; a variable is left out if one is found in its name.
        """
        self._undecayed |= {variable.number for variable in var_list or ()}
        self._undecayed_names += var_names or ()

    def finalize_variable_values(self, var_list: Iterable[Variable]) -> None:
        """Set variables to their averages, at the end of training.

        Raises:
            KeyError: a variable had no gradient yet.
            RuntimeError: the optimizer keeps no averages.
        """
        if not self.use_ema:
            raise RuntimeError("there are no averages of the variables: pass use_ema=True to the optimizer")
        for variable in var_list:
            average = self.get_slot(variable, "average")
            assert average is not None  # get_slot raises
            variable.value[...] = average.value

    def _create_slots(self, var_list: Sequence[Variable]) -> None:
        super()._create_slots(var_list)
        for variable in var_list if self.use_ema else ():
            if self._slots.find(variable, "average") is None:
                self.add_slot(variable, "average", variable.value)

    def _apply_state(self, var_list: Sequence[Variable]) -> ApplyState:
        # Called when all gradients are checked and nothing has changed yet.
        self._averaged = var_list
        for variable in var_list if self.weight_decay else ():
            if not self._is_undecayed(variable):
                rate = (self._values or {})["learning_rate"] * (self.weight_decay or 0.0)
                with variable.device.activate():
                    shrink(variable.value, shrinkage=rate)
        return super()._apply_state(var_list)

    def _is_undecayed(self, variable: Variable) -> bool:
        found = any(re.search(pattern, variable.name) for pattern in self._undecayed_names)
        return found or variable.number in self._undecayed

    def finish(self) -> None:
        """Update the averages, and put them in the variables' place where it is time."""
        super().finish()
        if not self.use_ema:
            return
        for variable in self._averaged:
            average = self.get_slot(variable, "average")
            assert average is not None
            with variable.device.activate():
                update_average(average.value, variable.value, 1.0 - self.ema_momentum)
        every = self.ema_overwrite_frequency
        if every is not None and (self.step + 1) % every == 0:
            self.finalize_variable_values(self._averaged)


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


class AdamW(Adam):
    """`Adam` with a weight decay from the start; the order of arguments is Keras'.

    Args:
        learning_rate: number, schedule or callable; not negative.
        weight_decay: not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative, may be 0.
        amsgrad: divide by the root of the largest v so far.
        options: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range, or `weight_decay` is None.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float | None = 0.004,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        if weight_decay is None:
            raise ValueError(
                "Missing value of `weight_decay` which is required and must be a float value; 0.0 is for none"
            )
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay, **options)


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


class Lion(Optimizer):
    """`distopt.optimizers.Lion` with Keras' learning rate and averages of the weights.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: share of m in the direction, in (0, 1].
        beta_2: decay of m, in [0, 1).
        weight_decay: see `Optimizer`.
        options: those of `Optimizer`.
    """

    rule = lion.lion
    slots = lion.Lion.slots
    sparse = "all"

    def __init__(
        self,
        learning_rate: Any = 0.0001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.99,
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        hyperparameters = {"learning_rate": learning_rate, "beta_1": beta_1, "beta_2": beta_2}
        super().__init__(weight_decay=weight_decay, hyperparameters=hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `distopt.optimizers.Optimizer.check`."""
        super().check(key, value)
        lion.check_lion(key, value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
