"""AdamW and SGDW as TensorFlow Addons has them: the decay comes first, and isn't scaled by the rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distopt.optimizers.adam import Adam
from distopt.optimizers.gradient_descent import SGD
from distopt.optimizers.weight_decay import DecoupledWeightDecay

__all__ = ["AdamW", "SGDW"]


class AdamW(DecoupledWeightDecay, Adam):
    """`distopt.optimizers.AdamW(decay_convention="tfa")` with the signature of `tfa.optimizers.AdamW`.

    `w -= weight_decay * w`, then Adam. `minimize` and `apply_gradients` take a `decay_var_list`.

    Args:
        weight_decay: number, schedule or callable; not negative.
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; None and 0 become 1e-7.
        amsgrad: divide by the root of the largest v so far; slot "vhat".
        name: for messages and slots.
        exclude_from_weight_decay: regular expressions that are searched in variables' names.
        kwargs: those of `Optimizer`.
    """

    settings = ("amsgrad", "exclude_from_weight_decay")

    def __init__(
        self,
        weight_decay: Any,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        name: str = "AdamW",
        exclude_from_weight_decay: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, name, **kwargs)
        self._decay_weights(weight_decay, "tfa", exclude_from_weight_decay, None)


class SGDW(DecoupledWeightDecay, SGD):
    """`distopt.optimizers.SGDW(decay_convention="tfa")` with the signature of `tfa.optimizers.SGDW`.

    `w -= weight_decay * w`, then SGD. `minimize` and `apply_gradients` take a `decay_var_list`.

    Args:
        weight_decay: number, schedule or callable; not negative.
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the velocity, in [0, 1].
        nesterov: step by Nesterov's rule.
        name: for messages and slots.
        exclude_from_weight_decay: regular expressions that are searched in variables' names.
        kwargs: those of `Optimizer`.
    """

    settings = ("nesterov", "exclude_from_weight_decay")

    def __init__(
        self,
        weight_decay: Any,
        learning_rate: Any = 0.001,
        momentum: Any = 0.0,
        nesterov: bool = False,
        name: str = "SGDW",
        exclude_from_weight_decay: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, momentum, nesterov, name, **kwargs)
        self._decay_weights(weight_decay, "tfa", exclude_from_weight_decay, None)
