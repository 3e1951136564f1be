"""Gradient descent, plain and with momentum."""

from __future__ import annotations

from typing import Any

from distopt.elementwise import elementwise
from distopt.optimizers.optimizer import Optimizer

__all__ = ["GradientDescent", "Momentum", "gradient_descent", "momentum"]


@elementwise
def gradient_descent(value: Any, gradient: Any, *, learning_rate: float) -> Any:
    """Gradient descent: w -= lr * g."""
    value = value - learning_rate * gradient
    return value  # noqa: RET504  (the name tells what is updated)


@elementwise
def momentum(
    value: Any, gradient: Any, accumulator: Any, *, learning_rate: float, momentum: float, use_nesterov: bool
) -> Any:
    """Momentum: a = mu * a + g;  w -= lr * a, or with Nesterov's step w -= lr * g + lr * mu * a."""
    accumulator = momentum * accumulator + gradient
    if use_nesterov:
        value = value - learning_rate * (gradient + momentum * accumulator)
    else:
        value = value - learning_rate * accumulator
    return value, accumulator


class GradientDescent(Optimizer):
    """Plain gradient descent, `w -= learning_rate * g`, as TensorFlow's GradientDescentOptimizer.

    Args:
        learning_rate: number, schedule or callable; not negative.
        name: for messages and slots.
        options: those of `Optimizer`: gradient_aggregator, gradient_transformers, clipnorm, clipvalue,
            global_clipnorm.

    Example:
        >>> x, y = Variable(5.0, name="x"), Variable(3.0, name="y")
        >>> optimizer = GradientDescent(0.1)
        >>> optimizer.minimize(lambda: x**2 + x * y + 3, [x, y])
        1
        >>> print(x.numpy().round(4), y.numpy().round(4))
        3.7 2.5
    """

    rule = gradient_descent

    def __init__(self, learning_rate: Any, *, name: str = "GradientDescent", **options: Any) -> None:
        super().__init__(name, {"learning_rate": learning_rate}, **options)


class Momentum(Optimizer):
    """Gradient descent with momentum, in the form of TensorFlow 1's MomentumOptimizer.

    The accumulator holds gradients, not steps: a change of the learning rate rescales the whole history
    at once. (Keras' SGD keeps the rate inside the accumulator; for a constant rate both agree. PyTorch's
    SGD is this form too.)

    Args:
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the accumulator, in [0, 1].
        use_nesterov: step by Nesterov's rule (Sutskever et al. 2013, "On the importance of
            initialization and momentum in deep learning", as TensorFlow approximates it).
        name: for messages and slots.
        options: those of `Optimizer`.
    """

    rule = momentum
    slots = {"momentum": 0.0}  # noqa: RUF012  (a ClassVar of the base)

    def __init__(
        self,
        learning_rate: Any,
        momentum: Any,
        *,
        use_nesterov: bool = False,
        name: str = "Momentum",
        **options: Any,
    ) -> None:
        self._use_nesterov = bool(use_nesterov)
        super().__init__(name, {"learning_rate": learning_rate, "momentum": momentum}, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        if key == "momentum" and not 0 <= value <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {value}; 0.9 is usual")

    def scalars(self) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        return {**super().scalars(), "use_nesterov": self._use_nesterov}
