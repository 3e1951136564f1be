"""TensorFlow 1's gradient descent, plain and with momentum."""

from __future__ import annotations

from typing import Any

from distopt.optimizers import gradient_descent as rules
from distopt.optimizers.tf1.optimizer import Optimizer

__all__ = ["GradientDescentOptimizer", "MomentumOptimizer"]


class GradientDescentOptimizer(Optimizer):
    """Plain gradient descent, `w -= learning_rate * g`.

    Args:
        learning_rate: number, schedule or callable; not negative.
        use_locking: see `Optimizer`.
        name: for messages and slots.
        options: those of `Optimizer`.
    """

    rule = rules.gradient_descent

    def __init__(
        self,
        learning_rate: Any,
        use_locking: bool = False,
        name: str = "GradientDescent",
        **options: Any,
    ) -> None:
        super().__init__(use_locking, name, {"learning_rate": learning_rate}, **options)


class MomentumOptimizer(Optimizer):
    """Gradient descent with momentum: `a = mu * a + g`; `w -= lr * a`, or `w -= lr * g + lr * mu * a`.

    The accumulator holds gradients, not steps: a change of the learning rate rescales the whole history at
    once. Keras' `SGD` keeps the rate inside; for a constant rate both agree.

    Args:
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the accumulator, in [0, 1].
        use_locking: see `Optimizer`.
        name: for messages and slots.
        use_nesterov: step by Nesterov's rule, the second form above (Sutskever et al. 2013).
        options: those of `Optimizer`.
    """

    rule = rules.momentum
    slots = {"momentum": 0.0}  # noqa: RUF012  (a constant of the class)
    settings = ("use_nesterov",)

    def __init__(
        self,
        learning_rate: Any,
        momentum: Any,
        use_locking: bool = False,
        name: str = "Momentum",
        use_nesterov: bool = False,
        **options: Any,
    ) -> None:
        self.use_nesterov = bool(use_nesterov)
        hyperparameters = {"learning_rate": learning_rate, "momentum": momentum}
        super().__init__(use_locking, name, hyperparameters, **options)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        if key == "momentum":
            rules.check_momentum(value)
