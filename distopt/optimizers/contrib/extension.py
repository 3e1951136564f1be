"""Decoupled weight decay for any optimizer class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distopt.optimizers.lamb import LAMB
from distopt.optimizers.lars import LayerwiseMomentum
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.weight_decay import DecoupledWeightDecay

__all__ = ["extend_with_decoupled_weight_decay"]


def extend_with_decoupled_weight_decay(base_optimizer: type[Optimizer]) -> type[DecoupledWeightDecay]:
    """Return a subclass of an optimizer's class that takes `weight_decay` as its first argument.

    As the functions of this name in tf.contrib.opt and TensorFlow Addons: `w -= weight_decay * w` before the
    update of `base_optimizer`, not multiplied by the learning rate, with a sparse gradient on the listed
    rows only; `minimize` and `apply_gradients` take a `decay_var_list`, the constructor
    `exclude_from_weight_decay`. The decay becomes a part of the optimizer's rule; an optimizer that
    overrides Keras' hooks instead of having a rule gets it right before them.

    Args:
        base_optimizer: a class derived from `Optimizer`, of the Keras or the TensorFlow 1 form.

    Raises:
        TypeError: it is no optimizer class, or has weight decay already, as AdamW, LAMB, LARS and Muon have.

    Example:
        >>> from distopt.optimizers import SGD
        >>> w = Variable(2.0)
        >>> extend_with_decoupled_weight_decay(SGD)(0.25, 0.1).apply_gradients([(1.0, w)])
        1
        >>> print(w.numpy().round(6))
        1.4
    """
    if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
        raise TypeError(f"expected a class derived from Optimizer, got {base_optimizer!r}")
    if issubclass(base_optimizer, DecoupledWeightDecay | LAMB | LayerwiseMomentum):
        raise TypeError(f"{base_optimizer.__name__} has a weight decay of its own; pass it `weight_decay`")

    class OptimizerWithDecoupledWeightDecay(DecoupledWeightDecay, base_optimizer):
        settings = (*base_optimizer.settings, "exclude_from_weight_decay")

        def __init__(
            self,
            weight_decay: Any,
            *args: Any,
            exclude_from_weight_decay: Iterable[str] | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            self._decay_weights(weight_decay, "tfa", exclude_from_weight_decay, None)

    OptimizerWithDecoupledWeightDecay.__doc__ = (
        f"{base_optimizer.__name__} with decoupled weight decay: `weight_decay`, then its own arguments."
    )
    return OptimizerWithDecoupledWeightDecay
