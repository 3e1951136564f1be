"""LARS."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from distopt.backend import Array
from distopt.elementwise import elementwise
from distopt.optimizers import layerwise
from distopt.optimizers.gradient_descent import check_momentum, momentum
from distopt.optimizers.optimizer import Optimizer
from distopt.variables import IndexedSlices, Variable

__all__ = ["LARS", "LayerwiseMomentum", "lars"]


@elementwise
def lars(
    value: Any,
    gradient: Any,
    accumulator: Any,
    *,
    rate: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> Any:
    """With d = L (g + wd w): a = mu a + d;  w -= a, or with Nesterov w -= d + mu a."""
    step = rate * (gradient + weight_decay * value)
    accumulator = momentum * accumulator + step
    value = value - (step + momentum * accumulator if nesterov else accumulator)
    return value, accumulator


class LayerwiseMomentum(Optimizer):
    """What `LARS` and tf.contrib.opt's form of it share; their constructors set the attributes."""

    rule = lars
    slots = {"momentum": 0.0}  # noqa: RUF012  (a constant of the class)
    layerwise: ClassVar[bool] = True
    skip_list: Sequence[str] | None = None
    nesterov: bool = False

    def _skip(self, skip_list: Iterable[str] | None) -> list[str] | None:
        """Return the list of substrings, checked."""
        listed = None if skip_list is None else list(skip_list)
        if isinstance(skip_list, str) or not all(isinstance(item, str) for item in listed or ()):
            raise TypeError(f"skip_list must be a list of parts of variables' names, got {skip_list!r}")
        return listed

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        if key == "momentum":
            check_momentum(value)
        if key in ("weight_decay", "eeta", "epsilon") and not value >= 0:
            raise ValueError(f"{key} must not be negative, got {value}")

    def group(self, variable: Variable) -> Hashable:
        """See `Optimizer.group`: whether a variable is skipped."""
        return any(part in variable.name for part in self.skip_list or ())

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`."""
        del step
        return {k: values[k] for k in ("learning_rate", "momentum", "weight_decay", "eeta", "epsilon")}

    def grouped(self, scalars: dict[str, float], group: Hashable) -> dict[str, float]:
        """See `Optimizer.grouped`."""
        return {**scalars, "skipped": bool(group)}

    def update(
        self,
        value: Array,
        gradient: Array,
        slots: Sequence[Array | None],
        scalars: Mapping[str, float],
        variable: Variable | None,
    ) -> None:
        """See `Optimizer.update`."""
        rate, decay = scalars["learning_rate"], scalars["weight_decay"]
        shared: dict[str, Any] = {
            "momentum": scalars["momentum"],
            "weight_decay": 0.0 if scalars["skipped"] else decay,
        }
        if scalars["skipped"]:
            lars(value, gradient, *slots, rate=rate, **shared, nesterov=self.nesterov)
            return
        of_value, of_gradient = layerwise.norm(value), layerwise.norm(gradient)
        trust = layerwise.trust_ratio(
            scalars["eeta"] * of_value,
            of_gradient + decay * of_value + scalars["epsilon"],
            of_value,
            of_gradient,
        )
        layerwise.call(
            lars,
            value,
            gradient,
            *slots,
            scalars=shared,
            per_layer={"rate": rate * trust},
            nesterov=self.nesterov,
        )

    def update_rows(self, gradient: IndexedSlices, variable: Variable, scalars: Mapping[str, float]) -> None:
        """Update rows by plain momentum, as tf.contrib.opt does: no trust ratio, no decay, rate outside."""
        accumulators = self._slots.of_variable(variable, ["momentum"])
        with variable.device.activate():
            momentum.rows(
                gradient.indices,
                variable.value,
                gradient.values,
                *accumulators,
                learning_rate=scalars["learning_rate"],
                momentum=scalars["momentum"],
                use_nesterov=self.nesterov,
            )


class LARS(LayerwiseMomentum):
    """LARS (You et al. 2017, "Large batch training of convolutional networks", arxiv.org/abs/1708.03888).

        trust = eeta * |w| / (|g| + weight_decay * |w| + epsilon) if |w| and |g| are above 0, else 1
        d = lr * trust * (g + weight_decay * w)
        a = momentum * a + d;   w -= a, or with nesterov w -= d + momentum * a

    Each variable is a layer: norms are over all of it. The rate is inside the accumulator, so steps in it
    keep the rate they were made with. These are the numerics of tf.contrib.opt's LARSOptimizer, and the
    paper's. A sparse gradient gets plain momentum on the listed rows, with no trust ratio and no decay, and
    with the rate outside of the accumulator (`w -= lr * a`), as there: don't mix dense and sparse gradients
    of one variable.

    Norms are deterministic and stay on the GPU; see `distopt.transforms`.

    Args:
        learning_rate: number, schedule or callable; not negative.
        momentum: decay of the accumulator, in [0, 1].
        weight_decay: number, schedule or callable; not negative.
        eeta: the trust coefficient.
        epsilon: added to the denominator of the trust ratio.
        skip_list: parts of names; variables with one of them in their name, as biases and those of
            normalization should be, have the trust ratio 1 and no decay.
        nesterov: step by Nesterov's rule.
        name: for messages and slots.
        kwargs: those of `Optimizer`.

    Example:
        >>> w = Variable([3.0, 4.0])
        >>> optimizer = LARS(1.0, weight_decay=0.0, eeta=0.1)
        >>> optimizer.apply_gradients([([0.0, 2.0], w)])  # trust = 0.1 * 5 / 2
        1
        >>> print(w.numpy().round(4))
        [3.  3.5]
    """

    settings = ("skip_list", "nesterov")

    def __init__(
        self,
        learning_rate: Any,
        momentum: Any = 0.9,
        weight_decay: Any = 0.0001,
        eeta: Any = 0.001,
        epsilon: Any = 0.0,
        skip_list: Iterable[str] | None = None,
        nesterov: bool = False,
        name: str = "LARS",
        **kwargs: Any,
    ) -> None:
        self.skip_list = self._skip(skip_list)
        self.nesterov = bool(nesterov)
        hyperparameters = {
            "learning_rate": learning_rate,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eeta": eeta,
            "epsilon": epsilon,
        }
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)
