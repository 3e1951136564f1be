"""Gradient descent, plain, with momentum, and with decoupled weight decay."""

from __future__ import annotations

from typing import Any

from distopt.elementwise import elementwise
from distopt.optimizers.optimizer import Optimizer

__all__ = ["SGD", "check_momentum", "gradient_descent", "momentum", "velocity"]


@elementwise
def gradient_descent(value: Any, gradient: Any, *, learning_rate: float) -> Any:
    """Gradient descent: w -= lr * g."""
    value = value - learning_rate * gradient
    return value  # noqa: RET504  (the name tells what is updated)


@elementwise
def momentum(
    value: Any, gradient: Any, accumulator: Any, *, learning_rate: float, momentum: float, use_nesterov: bool
) -> Any:
    """TensorFlow 1's momentum: a = mu * a + g;  w -= lr * a, or with Nesterov w -= lr * g + lr * mu * a."""
    accumulator = momentum * accumulator + gradient
    if use_nesterov:
        value = value - learning_rate * (gradient + momentum * accumulator)
    else:
        value = value - learning_rate * accumulator
    return value, accumulator


@elementwise
def velocity(
    value: Any, gradient: Any, velocity: Any, *, learning_rate: float, momentum: float, nesterov: bool
) -> Any:
    """Keras' momentum: a = mu * a - lr * g;  w += a, or with Nesterov w += mu * a - lr * g."""
    velocity = momentum * velocity - learning_rate * gradient
    step = momentum * velocity - learning_rate * gradient if nesterov else velocity
    value = value + step
    return value, velocity


class SGD(Optimizer):
    """Gradient descent in Keras' form, plain or with momentum.

    Without momentum `w -= lr * g`. With it `a = mu * a - lr * g` and `w += a`, or with `nesterov`
    `w += mu * a - lr * g`. The learning rate is inside the velocity: when it changes, steps already in
    the velocity keep the old one. (TensorFlow 1's MomentumOptimizer and PyTorch's SGD keep gradients
    instead; for a constant rate all agree.)

    Whether there is a velocity is settled here: setting `momentum` later has no effect if it was 0.

    Args:
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the velocity, in [0, 1].
        nesterov: step by Nesterov's rule (Sutskever et al. 2013, "On the importance of initialization and
            momentum in deep learning"); without momentum it changes nothing.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Example:
        >>> x, y = Variable(5.0, name="x"), Variable(3.0, name="y")
        >>> optimizer = SGD(0.1)
        >>> optimizer.minimize(lambda: x**2 + x * y + 3, [x, y])
        1
        >>> print(x.numpy().round(4), y.numpy().round(4))
        3.7 2.5
    """

    settings = ("nesterov",)

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: Any = 0.0,
        nesterov: bool = False,
        name: str = "SGD",
        **kwargs: Any,
    ) -> None:
        self.nesterov = bool(nesterov)
        hyperparameters = {"learning_rate": learning_rate, "momentum": momentum}
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)
        if type(self).rule is not None:
            return  # a subclass has a rule of its own
        if callable(momentum) or momentum != 0:
            self.rule, self.slots = velocity, {"momentum": 0.0}
        else:
            self.rule, self.slots = gradient_descent, {}

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        if key == "momentum":
            check_momentum(value)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"nesterov": self.nesterov} if self.rule is velocity else {}


def check_momentum(value: float) -> None:
    """Raise ValueError unless a momentum is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"`momentum` must be between [0, 1], got {value}; 0.9 is usual.")
