"""Decoupled weight decay: AdamW, SGDW, and an extension that gives it to any optimizer."""

from __future__ import annotations

import re
from collections.abc import Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from distopt.backend import Array
from distopt.elementwise import Rule, decayed, elementwise
from distopt.optimizers import adam, gradient_descent
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.updates import ApplyState
from distopt.variables import IndexedSlices, Variable

__all__ = ["AdamW", "DecayConvention", "DecoupledWeightDecay", "SGDW", "matches", "patterns", "shrink"]

DecayConvention: TypeAlias = Literal["keras", "tfa"]
"""How much a weight decays in a step. "keras": `learning_rate * weight_decay` of itself, as in Keras from
2.11 on and in PyTorch; a sparse gradient counts as the dense one with zeros, so all rows decay. "tfa":
`weight_decay` of itself, whatever the learning rate, as in TensorFlow Addons and tf.contrib.opt; with
a sparse gradient the listed rows alone decay."""

# Derived here, not at first use, so that whoever goes through all rules finds them.
for _rule in (adam.adam, gradient_descent.gradient_descent, gradient_descent.velocity):
    decayed(_rule)


@elementwise
def shrink(value: Any, *, shrinkage: float) -> Any:
    """Weight decay by itself: w -= shrinkage * w."""
    value = value - shrinkage * value
    return value  # noqa: RET504  (the name tells what is updated)


class DecoupledWeightDecay(Optimizer):
    """Weight decay before the update of the class that follows in the order of inheritance.

    `class AdamW(DecoupledWeightDecay, Adam)`, whose constructor calls `_decay_weights`, is Adam with decay:
    the decay is put in front of the rule (see `distopt.elementwise.decayed`), so it costs no pass of its
    own. What decays is chosen variable by variable.
    """

    decay_convention: DecayConvention = "tfa"
    exclude_from_weight_decay: Sequence[str] = ()
    _decay_var_list: Sequence[Variable | str] | None = None
    _decay_done = False

    def _decay_weights(
        self,
        weight_decay: Any,
        decay_convention: DecayConvention,
        exclude_from_weight_decay: Iterable[str] | None,
        decay_var_list: Iterable[Variable | str] | None,
    ) -> None:
        """Settle the decay; called at the end of a constructor.

        Args:
            weight_decay: number, schedule or callable; not negative. None is 0.
            decay_convention: see `DecayConvention`.
            exclude_from_weight_decay: regular expressions; variables in whose names one is found anywhere
                don't decay.
            decay_var_list: variables, or names of some, that decay; None for all.

        Raises:
            ValueError: a negative decay, another convention, or a rule that can't have a decay.
            TypeError: the regular expressions or names aren't a list of strings.
        """
        if decay_convention not in ("keras", "tfa"):
            raise ValueError(
                f"decay_convention must be 'keras' (learning_rate * weight_decay of the weights) or 'tfa' "
                f"(weight_decay of the weights), got {decay_convention!r}"
            )
        if self.rule is not None:
            decayed(self.rule)  # refused here rather than at the first update
        self._set_hyper("weight_decay", 0.0 if weight_decay is None else weight_decay)
        self.decay_convention = decay_convention
        self.exclude_from_weight_decay = patterns("exclude_from_weight_decay", exclude_from_weight_decay)
        self.decay_var_list = decay_var_list
        if decay_convention == "keras":
            self.sparse = "all"

    @property
    def decay_var_list(self) -> Sequence[Variable | str] | None:
        """The variables, or names of variables, that decay; None for all that aren't excluded."""
        return self._decay_var_list

    @decay_var_list.setter
    def decay_var_list(self, given: Iterable[Variable | str] | None) -> None:
        listed = given if given is None else list(given)
        if isinstance(given, str) or not all(isinstance(item, Variable | str) for item in listed or ()):
            raise TypeError(f"decay_var_list must be a list of variables or of their names, got {given!r}")
        self._decay_var_list = listed

    def decays(self, variable: Variable) -> bool:
        """Whether a variable decays."""
        if matches(self.exclude_from_weight_decay, variable.name):
            return False
        listed = self._decay_var_list
        return listed is None or any(item is variable or item == variable.name for item in listed)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        if key == "weight_decay" and not value >= 0:
            raise ValueError(f"weight_decay must not be negative, got {value}")

    def get_config(self) -> dict[str, Any]:
        """See `Optimizer.get_config`; variables in `decay_var_list` are given by their names."""
        config = super().get_config()
        if config.get("decay_var_list") is not None:
            config["decay_var_list"] = [getattr(item, "name", item) for item in config["decay_var_list"]]
        return config

    def minimize(self, *args: Any, decay_var_list: Iterable[Variable] | None = None, **kwargs: Any) -> Any:
        """Compute gradients and apply them, as the class without weight decay does.

        Args:
            args: of the class without weight decay.
            decay_var_list: variables that decay in this update; None for the optimizer's own choice.
            kwargs: of the class without weight decay.
        """
        with self._decaying_only(decay_var_list):
            return super().minimize(*args, **kwargs)

    def apply_gradients(
        self, *args: Any, decay_var_list: Iterable[Variable] | None = None, **kwargs: Any
    ) -> Any:
        """Apply gradients, as the class without weight decay does.

        Args:
            args: of the class without weight decay.
            decay_var_list: variables that decay in this update; None for the optimizer's own choice.
            kwargs: of the class without weight decay.
        """
        with self._decaying_only(decay_var_list):
            return super().apply_gradients(*args, **kwargs)

    @contextmanager
    def _decaying_only(self, given: Iterable[Variable] | None) -> Generator[None]:
        own = self._decay_var_list
        if given is not None:
            self.decay_var_list = given
        try:
            yield
        finally:
            self._decay_var_list = own

    # The decay as a part of the rule.

    def _own_rule(self) -> Rule:
        return decayed(super()._own_rule())

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        share = {"decay_share": self._decay_share(values)}
        return super().scalars({**values, **share}, step) | share

    def group(self, variable: Variable) -> Hashable:
        """See `Optimizer.group`."""
        return not self._decay_done and self.decays(variable), super().group(variable)

    def grouped(self, scalars: dict[str, float], group: Any) -> dict[str, float]:
        """See `Optimizer.grouped`."""
        found = super().grouped(scalars, group[1])
        return found if group[0] else {**found, "decay_share": 0.0}

    def _decay_share(self, values: Mapping[str, float]) -> float:
        """Return the share of the weights that a step takes off."""
        rate = values["learning_rate"] if self.decay_convention == "keras" else 1.0
        return rate * values["weight_decay"]

    # Where the rule can't do it: rows decay, but all rows are updated; or there is no rule but hooks.

    def _apply_slices(
        self, gradient: IndexedSlices, variable: Variable, scalars: Any, apply_state: ApplyState
    ) -> None:
        if self.sparse == "all" and self.decay_convention == "tfa":
            with self._decayed_before(variable, gradient.indices):
                super()._apply_slices(gradient, variable, scalars, apply_state)
        else:
            super()._apply_slices(gradient, variable, scalars, apply_state)

    def _call_hook(self, hook: Any, apply_state: ApplyState, *arguments: Any) -> Any:
        _, variable, *indices = arguments
        with self._decayed_before(variable, *indices):
            return super()._call_hook(hook, apply_state, *arguments)

    @contextmanager
    def _decayed_before(self, variable: Variable, indices: Array | None = None) -> Generator[None]:
        """Decay a variable, or its listed rows, now, and not in the update that follows."""
        before = self._decay_done
        if self.decays(variable) and not before:
            share = self._decay_share(self._values or self._read_hyperparameters())
            with variable.device.activate():
                if indices is None or self.decay_convention == "keras":
                    shrink(variable.value, shrinkage=share)
                else:
                    rows = variable.device.xp.unique(indices)
                    shrink.rows(rows, variable.value, shrinkage=share)
        self._decay_done = True
        try:
            yield
        finally:
            self._decay_done = before


class AdamW(DecoupledWeightDecay, adam.Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    First the weights shrink, then `Adam` does its update, in one pass:

        decay_convention="keras":  w -= lr * weight_decay * w    (all rows, also with a sparse gradient)
        decay_convention="tfa":    w -= weight_decay * w         (with a sparse gradient the listed rows)

    "keras" is that of Keras from 2.11 on and of PyTorch; a schedule of the learning rate then scales
    the decay too. "tfa" is that of TensorFlow Addons and tf.contrib.opt; give `weight_decay` the same
    shape of schedule to have the paper's form, in which a multiplier of the schedule scales both and
    the base rate only Adam's step. One turns into the other by dividing `weight_decay` by the rate: 0.01
    at a rate of 0.001 is "tfa" with 1e-5.

    epsilon sits where `Adam` has it, beside the root of the uncorrected v. PyTorch adds it to the corrected
    root, and takes 1e-8 and a decay of 0.01 where nothing is given.

    Args:
        learning_rate: number, schedule or callable; not negative.
        weight_decay: number, schedule or callable; not negative. None is 0.
        beta_1: decay of the first moment, in [0, 1).
        beta_2: decay of the second moment, in [0, 1).
        epsilon: keeps the division finite; not negative. None and 0 become 1e-7.
        amsgrad: divide by the root of the largest v so far; slot "vhat".
        name: for messages and slots.
        decay_convention: "keras" or "tfa", see above.
        exclude_from_weight_decay: regular expressions; variables in whose names one is found anywhere
            don't decay: "bias" or "gamma|beta", but "b" is in "embedding" too.
        decay_var_list: variables, or names of some, that decay; None for all. Excluded ones don't.
        kwargs: those of `Optimizer`.

    Example:
        >>> w = Variable(2.0)
        >>> AdamW(0.1, weight_decay=0.5).apply_gradients([(0.0, w)])
        1
        >>> print(w.numpy().round(6))
        1.9
    """

    settings = ("amsgrad", "decay_convention", "exclude_from_weight_decay", "decay_var_list")

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: Any = 0.004,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = 1e-7,
        amsgrad: bool = False,
        name: str = "AdamW",
        *,
        decay_convention: DecayConvention = "keras",
        exclude_from_weight_decay: Iterable[str] | None = None,
        decay_var_list: Iterable[Variable | str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, beta_1, beta_2, epsilon, amsgrad, name, **kwargs)
        self._decay_weights(weight_decay, decay_convention, exclude_from_weight_decay, decay_var_list)


class SGDW(DecoupledWeightDecay, gradient_descent.SGD):
    """Gradient descent with decoupled weight decay (Loshchilov and Hutter 2019).

    First the weights shrink, then `SGD` does its update, in one pass:

        decay_convention="keras":  w -= lr * weight_decay * w    (all rows, also with a sparse gradient)
        decay_convention="tfa":    w -= weight_decay * w         (with a sparse gradient the listed rows)

    With "keras" a sparse gradient is the dense one with zeros, as in Keras from 2.11 on: velocities of
    all rows go on. With "tfa" the listed rows alone decay, have their velocity changed, and move.

    PyTorch's `SGD(weight_decay=...)` is something else: it adds `weight_decay * w` to the gradient, so the
    decay goes through the momentum.

    Args:
        learning_rate: number, schedule or callable; not negative.
        weight_decay: number, schedule or callable; not negative. None is 0.
        momentum: decay of the velocity, in [0, 1].
        nesterov: step by Nesterov's rule, see `SGD`.
        name: for messages and slots.
        decay_convention: "keras" or "tfa", see above.
        exclude_from_weight_decay: regular expressions; variables in whose names one is found anywhere
            don't decay.
        decay_var_list: variables, or names of some, that decay; None for all. Excluded ones don't.
        kwargs: those of `Optimizer`.

    Example:
        >>> w = Variable(2.0)
        >>> SGDW(0.1, weight_decay=0.25, decay_convention="tfa").apply_gradients([(1.0, w)])
        1
        >>> print(w.numpy().round(6))
        1.4
    """

    settings = ("nesterov", "decay_convention", "exclude_from_weight_decay", "decay_var_list")

    def __init__(
        self,
        learning_rate: Any = 0.01,
        weight_decay: Any = 0.0,
        momentum: Any = 0.0,
        nesterov: bool = False,
        name: str = "SGDW",
        *,
        decay_convention: DecayConvention = "keras",
        exclude_from_weight_decay: Iterable[str] | None = None,
        decay_var_list: Iterable[Variable | str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, momentum, nesterov, name, **kwargs)
        self._decay_weights(weight_decay, decay_convention, exclude_from_weight_decay, decay_var_list)


def patterns(argument: str, given: Iterable[str] | None) -> list[str]:
    """Return regular expressions as a list, checked.

    Args:
        argument: whose, for messages.
        given: None for none.

    Raises:
        TypeError: it is a string by itself, or something in it is no string.
        ValueError: one is no regular expression.
    """
    listed = [] if given is None else list(given)
    if isinstance(given, str) or not all(isinstance(item, str) for item in listed):
        raise TypeError(f"{argument} must be a list of regular expressions, got {given!r}")
    for pattern in listed:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{argument} has {pattern!r}, which is no regular expression: {error}"
            ) from error
    return listed


def matches(expressions: Iterable[str], name: str) -> bool:
    """Whether one of the regular expressions is found anywhere in a name."""
    return any(re.search(expression, name) for expression in expressions)
