"""Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distopt.elementwise import decayed, elementwise, sign
from distopt.optimizers.weight_decay import DecayConvention, DecoupledWeightDecay
from distopt.variables import Variable

__all__ = ["Lion", "check_lion", "lion"]


@elementwise
def lion(value: Any, gradient: Any, m: Any, *, learning_rate: float, beta_1: float, beta_2: float) -> Any:
    """Lion: w -= lr sign(b1 m + (1-b1) g), then m = b2 m + (1-b2) g."""
    value = value - learning_rate * sign(beta_1 * m + (1 - beta_1) * gradient)
    m = beta_2 * m + (1 - beta_2) * gradient
    return value, m


decayed(lion)  # now, so that whoever goes through all rules finds it


class Lion(DecoupledWeightDecay):
    """Lion (Chen et al. 2023, "Symbolic discovery of optimization algorithms", arxiv.org/abs/2302.06675).

        w -= lr * weight_decay * w;   w -= lr * sign(b1 m + (1-b1) g);   m = b2 m + (1-b2) g

    Every element moves by the learning rate, so it wants one 3 to 10 times smaller than Adam's and a weight
    decay as much larger; there is no epsilon. Where m and g are zero nothing moves.

    These are the paper's recurrence and Keras' (2.12 and later; there without decay by default). A sparse
    gradient is the dense one with zeros, as in Keras: rows without a gradient move while their m isn't 0.

    Args:
        learning_rate: number, schedule or callable; not negative. The paper takes 1e-4.
        beta_1: share of m in the direction, in (0, 1].
        beta_2: decay of m, in [0, 1).
        weight_decay: number, schedule or callable; not negative. None is 0.
        name: for messages and slots.
        decay_convention: "keras", which is the paper's, or "tfa", see `AdamW`; with "tfa" a sparse gradient
            still updates everything but decays the listed rows only.
        exclude_from_weight_decay: regular expressions; variables in whose names one is found anywhere
            don't decay.
        decay_var_list: variables, or names of some, that decay; None for all. Excluded ones don't.
        kwargs: those of `Optimizer`.

    Example:
        >>> w = Variable([1.0, 2.0, 3.0])
        >>> Lion(0.1).apply_gradients([([5.0, 0.0, -0.01], w)])
        1
        >>> print(w.numpy().round(6))
        [0.9 2.  3.1]
    """

    rule = lion
    slots = {"m": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "all"
    settings = ("decay_convention", "exclude_from_weight_decay", "decay_var_list")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.99,
        weight_decay: Any = 0.0,
        name: str = "Lion",
        *,
        decay_convention: DecayConvention = "keras",
        exclude_from_weight_decay: Iterable[str] | None = None,
        decay_var_list: Iterable[Variable | str] | None = None,
        **kwargs: Any,
    ) -> None:
        hyperparameters = {"learning_rate": learning_rate, "beta_1": beta_1, "beta_2": beta_2}
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)
        self._decay_weights(weight_decay, decay_convention, exclude_from_weight_decay, decay_var_list)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_lion(key, value)


def check_lion(key: str, value: float) -> None:
    """Raise ValueError where a hyperparameter of Lion is out of range."""
    if key == "beta_1" and not 0 < value <= 1:
        raise ValueError(
            f"`beta_1`={value} must be between ]0, 1]. Otherwise, the optimizer degenerates to SignSGD."
        )
    if key == "beta_2" and not 0 <= value < 1:
        raise ValueError(f"beta_2 must be in [0, 1), got {value}; it is the decay rate of the momentum")
