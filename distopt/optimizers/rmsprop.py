"""RMSprop."""

from __future__ import annotations

from typing import Any

from distopt.elementwise import elementwise, sqrt
from distopt.optimizers.adam import check_adam, default_epsilon
from distopt.optimizers.gradient_descent import check_momentum
from distopt.optimizers.optimizer import Optimizer

__all__ = ["RMSprop", "rmsprop"]


@elementwise
def rmsprop(
    value: Any,
    gradient: Any,
    rms: Any,
    velocity: Any,
    mg: Any,
    *,
    learning_rate: float,
    rho: float,
    momentum: float,
    epsilon: float,
    has_momentum: bool,
    centered: bool,
    epsilon_inside: bool,
) -> Any:
    """RMSprop: r = rho r + (1-rho) g*g, step = lr g / sqrt(r [- mg*mg]) with epsilon in or outside."""
    rms = rho * rms + (1 - rho) * (gradient * gradient)
    if centered:
        mg = rho * mg + (1 - rho) * gradient
        variance = rms - mg * mg
    else:
        variance = rms
    root = sqrt(variance + epsilon) if epsilon_inside else sqrt(variance) + epsilon
    step = learning_rate * gradient / root
    if has_momentum:
        velocity = momentum * velocity + step
        value = value - velocity
    else:
        value = value - step
    return value, rms, velocity, mg


class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton 2012, lecture 6.5 of "Neural networks for machine learning").

    r = rho r + (1-rho) g^2, from 0; with `centered` also c = rho c + (1-rho) g, and r - c^2 takes the place
    of r below (Graves 2013, https://arxiv.org/abs/1308.0850). Then, as in Keras 2.4 to 2.10,

    - without momentum:  w -= lr g / (sqrt(r) + epsilon), epsilon outside the root;
    - with momentum:  a = momentum a + lr g / sqrt(r + epsilon);  w -= a, epsilon inside the root.

    TensorFlow 1's (`tf1.RMSPropOptimizer`) has epsilon inside in both cases and starts r at 1; Keras 2.11's
    (`keras_new.RMSprop`) has it inside and starts at 0; PyTorch's has it outside, starts at 0, and keeps
    the learning rate out of a. A sparse gradient updates the listed rows; without momentum, r and c
    of all rows decay.

    Args:
        learning_rate: number, schedule or callable; not negative.
        rho: decay of the averages, in [0, 1).
        momentum: decay of the velocity, in [0, 1]. Whether there is one is settled here: setting it
            later has no effect if it was 0.
        epsilon: keeps the division finite; not negative. None and, as in Keras, 0 become 1e-7.
        centered: divide by the standard deviation instead of the root of the mean square. With gradients
            that hardly change the difference r - c^2 rounds to less than zero, and then, as in
            TensorFlow, the variable becomes NaN unless a larger epsilon inside the root prevents it.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Raises:
        ValueError: an argument out of range.
    """

    rule = rmsprop
    slots = {"rms": 0.0, "momentum": 0.0, "mg": 0.0}  # noqa: RUF012  (a constant of the class)
    settings = ("centered",)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: Any = 0.9,
        momentum: Any = 0.0,
        epsilon: Any = 1e-7,
        centered: bool = False,
        name: str = "RMSprop",
        **kwargs: Any,
    ) -> None:
        self.centered = bool(centered)
        self._has_momentum = callable(momentum) or momentum != 0
        self.sparse = "rows" if self._has_momentum else "hybrid"
        hyperparameters = {
            "learning_rate": learning_rate,
            "rho": rho,
            "momentum": momentum,
            "epsilon": default_epsilon(epsilon),
        }
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key, value)
        if key == "momentum":
            check_momentum(value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {
            "has_momentum": self._has_momentum,
            "centered": self.centered,
            "epsilon_inside": self._has_momentum,
        }
