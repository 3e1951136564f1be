"""LAMB."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from distopt.backend import Array
from distopt.elementwise import elementwise, sqrt
from distopt.optimizers import layerwise
from distopt.optimizers.adam import check_adam
from distopt.optimizers.gradient_descent import gradient_descent
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.weight_decay import matches, patterns
from distopt.variables import Variable

__all__ = ["LAMB", "lamb_direction"]


@elementwise
def lamb_direction(
    value: Any,
    gradient: Any,
    m: Any,
    v: Any,
    direction: Any,
    *,
    beta_1: float,
    beta_2: float,
    correction_1: float,
    correction_2: float,
    epsilon: float,
    weight_decay: float,
) -> Any:
    """Adam's moments, both corrected, and u = m^ / (sqrt(v^) + epsilon) + wd * w."""
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * (gradient * gradient)
    direction = (m / correction_1) / (sqrt(v / correction_2) + epsilon) + weight_decay * value
    return m, v, direction


class LAMB(Optimizer):
    """LAMB (You et al. 2020, "Large batch optimization for deep learning", arxiv.org/abs/1904.00962).

    With t = iterations + 1, m and v as Adam's:

        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + weight_decay * w
        r = |w| / |u| if both norms are above 0, else 1
        w -= lr * r * u

    Each variable is a layer: norms are over all of it. These are the numerics of TensorFlow Addons, with
    the paper's phi the identity. epsilon sits beside the root of the corrected v, unlike `Adam`'s. The decay
    is a part of u, hence multiplied by lr and r. A sparse gradient is the dense one with zeros: everything
    moves.

    Norms are deterministic and stay on the GPU; see `distopt.transforms`.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: keeps the division finite; not negative, and 0 is taken as 0.
        weight_decay: number, schedule or callable; not negative.
        exclude_from_weight_decay: regular expressions; variables in whose names one is found anywhere
            have no decay.
        exclude_from_layer_adaptation: the same for r, which is 1 for them; when None, the variables
            excluded from weight decay.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Example:
        >>> w = Variable([3.0, 4.0])
        >>> LAMB(0.1, epsilon=0).apply_gradients([([2.0, 2.0], w)])  # u = [1, 1], r = 5 / sqrt(2)
        1
        >>> print(w.numpy().round(4))
        [2.6464 3.6464]
    """

    rule = lamb_direction
    slots = {"m": 0.0, "v": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "all"
    layerwise: ClassVar[bool] = True
    settings = ("exclude_from_weight_decay", "exclude_from_layer_adaptation")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-6,
        weight_decay: Any = 0.0,
        exclude_from_weight_decay: Iterable[str] | None = None,
        exclude_from_layer_adaptation: Iterable[str] | None = None,
        name: str = "LAMB",
        **kwargs: Any,
    ) -> None:
        self.exclude_from_weight_decay = patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        self.exclude_from_layer_adaptation = (
            self.exclude_from_weight_decay
            if exclude_from_layer_adaptation is None
            else patterns("exclude_from_layer_adaptation", exclude_from_layer_adaptation)
        )
        hyperparameters = {
            "learning_rate": learning_rate,
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
        }
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)
        if key == "weight_decay" and not value >= 0:
            raise ValueError(f"weight_decay must not be negative, got {value}")

    def group(self, variable: Variable) -> Hashable:
        """See `Optimizer.group`: whether a variable decays, and whether its rate adapts."""
        return (
            not matches(self.exclude_from_weight_decay, variable.name),
            not matches(self.exclude_from_layer_adaptation, variable.name),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        t = step + 1
        corrections = {f"correction_{n}": 1.0 - values[f"beta_{n}"] ** t for n in (1, 2)}
        own = ("learning_rate", "beta_1", "beta_2", "epsilon", "weight_decay")
        return {name: values[name] for name in own} | corrections

    def grouped(self, scalars: dict[str, float], group: Any) -> dict[str, float]:
        """See `Optimizer.grouped`."""
        decays, adapts = group
        return {**scalars, "adapts": adapts, **({} if decays else {"weight_decay": 0.0})}

    def update(
        self,
        value: Array,
        gradient: Array,
        slots: Sequence[Array | None],
        scalars: Mapping[str, float],
        variable: Variable | None,
    ) -> None:
        """See `Optimizer.update`: the direction, then a step along it by the layer's own rate."""
        settings: dict[str, Any] = dict(scalars)
        adapts, rate = settings.pop("adapts"), settings.pop("learning_rate")
        direction = layerwise.scratch(value)
        lamb_direction(value, gradient, *slots, direction, **settings)
        if adapts:
            of_value, of_direction = layerwise.norm(value), layerwise.norm(direction)
            ratio = layerwise.trust_ratio(of_value, of_direction, of_value, of_direction)
            layerwise.call(
                gradient_descent, value, direction, scalars={}, per_layer={"learning_rate": rate * ratio}
            )
        else:
            gradient_descent(value, direction, learning_rate=rate)
