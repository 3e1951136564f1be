"""The large-batch optimizers of tf.contrib.opt: TensorFlow 1's interface, on the rules of the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distopt.elementwise import decayed
from distopt.optimizers import adamax, gradient_descent, tf1
from distopt.optimizers.lars import LayerwiseMomentum
from distopt.optimizers.weight_decay import DecoupledWeightDecay

__all__ = [
    "AdaMaxOptimizer",
    "AdamWOptimizer",
    "LARSOptimizer",
    "LazyAdamOptimizer",
    "MomentumWOptimizer",
    "NadamOptimizer",
]

decayed(gradient_descent.momentum)  # now, so that whoever goes through all rules finds it


class AdamWOptimizer(DecoupledWeightDecay, tf1.AdamOptimizer):
    """`w -= weight_decay * w`, then `tf1.AdamOptimizer`, as `tf.contrib.opt.AdamWOptimizer`.

    The decay isn't multiplied by the learning rate. With a sparse gradient the listed rows decay and then all
    rows have Adam's update. `minimize` and `apply_gradients` take a `decay_var_list`.

    Args:
        weight_decay: number, schedule or callable; not negative.
        learning_rate: number, schedule or callable; not negative.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative.
        use_locking: see `tf1.Optimizer`.
        name: for messages and slots.
        exclude_from_weight_decay: regular expressions that are searched in variables' names; contrib had
            none.
        options: those of `tf1.Optimizer`.
    """

    settings = ("exclude_from_weight_decay",)

    def __init__(
        self,
        weight_decay: Any,
        learning_rate: Any = 0.001,
        beta1: Any = 0.9,
        beta2: Any = 0.999,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "AdamW",
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, beta1, beta2, epsilon, use_locking, name, **options)
        self._decay_weights(weight_decay, "tfa", exclude_from_weight_decay, None)


class MomentumWOptimizer(DecoupledWeightDecay, tf1.MomentumOptimizer):
    """`w -= weight_decay * w`, then `tf1.MomentumOptimizer`, as `tf.contrib.opt.MomentumWOptimizer`.

    The decay isn't multiplied by the learning rate. With a sparse gradient the listed rows alone decay and
    move. `minimize` and `apply_gradients` take a `decay_var_list`.

    Args:
        weight_decay: number, schedule or callable; not negative.
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the accumulator, in [0, 1].
        use_locking: see `tf1.Optimizer`.
        name: for messages and slots.
        use_nesterov: step by Nesterov's rule.
        exclude_from_weight_decay: regular expressions that are searched in variables' names; contrib had
            none.
        options: those of `tf1.Optimizer`.
    """

    settings = ("use_nesterov", "exclude_from_weight_decay")

    def __init__(
        self,
        weight_decay: Any,
        learning_rate: Any,
        momentum: Any,
        use_locking: bool = False,
        name: str = "MomentumW",
        use_nesterov: bool = False,
        *,
        exclude_from_weight_decay: Iterable[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, momentum, use_locking, name, use_nesterov, **options)
        self._decay_weights(weight_decay, "tfa", exclude_from_weight_decay, None)


class LazyAdamOptimizer(tf1.AdamOptimizer):
    """`tf1.AdamOptimizer`, except that a sparse gradient updates the listed rows of variable and slots only.

    As `tf.contrib.opt.LazyAdamOptimizer`: the bias correction goes by the count of all updates.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative.
        use_locking: see `tf1.Optimizer`.
        name: for messages and slots.
        options: those of `tf1.Optimizer`.
    """

    sparse = "rows"


class NadamOptimizer(tf1.AdamOptimizer):
    """Adam with Nesterov's momentum in the form of `tf.contrib.opt.NadamOptimizer`.

    `w -= rate * (b1 m + (1-b1) g) / (sqrt(v) + epsilon)` with the m, v and rate of `tf1.AdamOptimizer`, of
    this step. It has no schedule of the momentum, which Keras' and the paper's Nadam have
    (`distopt.optimizers.Nadam`). A sparse gradient decays m and v of all rows and moves the listed ones.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        epsilon: added to the root of the uncorrected v; not negative.
        use_locking: see `tf1.Optimizer`.
        name: for messages and slots.
        options: those of `tf1.Optimizer`.
    """

    sparse = "hybrid"

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: Any = 0.9,
        beta2: Any = 0.999,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "Adam",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, beta1, beta2, epsilon, use_locking, name, **options)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {**super().options(), "use_nesterov": True}


class AdaMaxOptimizer(tf1.AdamOptimizer):
    """`distopt.optimizers.Adamax` with the signature of `tf.contrib.opt.AdaMaxOptimizer`.

    `m = b1 m + (1-b1) g;  v = max(b2 v, |g|);  w -= lr / (1 - b1^t) * m / (v + epsilon)`. The power of beta1
    is a variable, multiplied once per `apply_gradients`. A sparse gradient updates the listed rows only.

    Args:
        learning_rate: number, schedule or callable; not negative.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the largest gradient, in [0, 1).
        epsilon: keeps the division finite; not negative.
        use_locking: see `tf1.Optimizer`.
        name: for messages and slots.
        options: those of `tf1.Optimizer`.
    """

    rule = adamax.adamax
    slots = {"m": 0.0, "v": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "rows"
    _powered = ("beta1",)

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta1: Any = 0.9,
        beta2: Any = 0.999,
        epsilon: Any = 1e-8,
        use_locking: bool = False,
        name: str = "AdaMax",
        **options: Any,
    ) -> None:
        super().__init__(learning_rate, beta1, beta2, epsilon, use_locking, name, **options)

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        del step
        (power,) = self._get_beta_accumulators()
        return {
            "rate": values["learning_rate"] / (1.0 - float(power)),
            "beta_1": values["beta1"],
            "beta_2": values["beta2"],
            "epsilon": values["epsilon"],
        }


class LARSOptimizer(LayerwiseMomentum, tf1.Optimizer):
    """`distopt.optimizers.LARS` with the signature of `tf.contrib.opt.LARSOptimizer`.

    Where that one took only numbers for the learning rate, schedules and callables work too.

    Args:
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the accumulator, in [0, 1].
        weight_decay: added to the gradient as `weight_decay * w`; not negative.
        eeta: the trust coefficient.
        epsilon: added to the denominator of the trust ratio.
        name: for messages and slots.
        skip_list: parts of names; variables with one of them in their name have the trust ratio 1 and no
            decay.
        use_nesterov: step by Nesterov's rule.
        options: those of `tf1.Optimizer`.
    """

    settings = ("skip_list", "use_nesterov")

    def __init__(
        self,
        learning_rate: Any,
        momentum: Any = 0.9,
        weight_decay: Any = 0.0001,
        eeta: Any = 0.001,
        epsilon: Any = 0.0,
        name: str = "LARSOptimizer",
        skip_list: Sequence[str] | None = None,
        use_nesterov: bool = False,
        **options: Any,
    ) -> None:
        self.skip_list = self._skip(skip_list)
        self.nesterov = bool(use_nesterov)
        hyperparameters = {
            "learning_rate": learning_rate,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eeta": eeta,
            "epsilon": epsilon,
        }
        tf1.Optimizer.__init__(self, False, name, hyperparameters, **options)

    @property
    def use_nesterov(self) -> bool:
        """Whether it steps by Nesterov's rule."""
        return self.nesterov
