"""What Keras 2.11 gave to all optimizers: weight decay and averages of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distopt.aggregators import Pair
from distopt.optimizers import optimizer as engine
from distopt.optimizers.moving_averages import update_average
from distopt.optimizers.updates import ApplyState
from distopt.optimizers.weight_decay import shrink
from distopt.variables import Variable

__all__ = ["Optimizer"]


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
    _extra_slots: ClassVar[tuple[str, ...]] = ("average",)
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
        """Set variables to their averages, at the end of training; collective where slots are divided.

        Raises:
            KeyError: a variable had no gradient yet.
            RuntimeError: the optimizer keeps no averages.
        """
        if not self.use_ema:
            raise RuntimeError("there are no averages of the variables: pass use_ema=True to the optimizer")
        listed = list(var_list)
        for variable in listed:
            if self._slots.find(variable, "average") is None:
                self.get_slot(variable, "average")  # raises, and says why
            elif not self._slots.is_partial(variable, "average"):
                (average,) = self._slots.of_variable(variable, ["average"])
                variable.value[...] = average
            else:
                for part, (average,) in self._slots.pieces(variable, ["average"]):
                    variable.value.reshape(-1)[part] = average
        self._share_values(listed)

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
            with variable.device.activate():
                if not self._slots.is_partial(variable, "average"):
                    (average,) = self._slots.of_variable(variable, ["average"])
                    update_average(average, variable.value, 1.0 - self.ema_momentum)
                    continue
                for part, (average,) in self._slots.pieces(variable, ["average"]):
                    update_average(average, variable.value.reshape(-1)[part], 1.0 - self.ema_momentum)
        every = self.ema_overwrite_frequency
        if every is not None and (self.step + 1) % every == 0:
            self.finalize_variable_values(self._averaged)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
