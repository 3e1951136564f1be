"""Clipping by the statistics of the norms seen so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from distopt.backend import device_of, namespace
from distopt.transforms.norms import norm_of
from distopt.transforms.pairs import Pair, scaled, values_of
from distopt.variables import Operand, Variable

__all__ = ["AdaptiveClipping", "adaptive_clipping_fn"]


class AdaptiveClipping:
    """Scale all gradients down when their global norm is far above its moving average.

    With `n` the global norm and `x = log(n + epsilon)`, moving averages of `x` and its square are updated
    first: `mean += (1 - d) * (x - mean)`, `sq_mean += (1 - d) * (x * x - sq_mean)`. Then, with
    `std = sqrt(max(epsilon, sq_mean - mean * mean))`, gradients are multiplied by 1 if
    `n < exp(mean + std_factor * std)` and by `exp(mean) / n` otherwise; with `static_max_norm` by
    `static_max_norm / n` where that is less. A gradient that is None stays None.

    `d` is `decay`, or `min(decay, s / (s + 1))` where a global step `s` is given. The averages start at 0
    and are not corrected for it: without a global step the first steps are clipped hard, with it the first
    norm is the first average. As the norm enters the averages before it is judged, a spike early in a run
    is usually not clipped. A norm that is infinite or NaN makes the averages so for good, as in
    TensorFlow; the loss scale and the Trainer stop such gradients before they come here.

    All of it is float32, as in TensorFlow: with the first norm the two sides of the comparison can be equal,
    and which is then the larger one is up to the rounding. Logarithm and exponential are computed in
    float64 and rounded, so that processors don't differ in it. The averages are held where the gradients
    are: on a GPU the host doesn't wait, unless the global step is a Variable there.

    Args:
        std_factor: how many standard deviations above the mean a norm may be.
        decay: of the moving averages, in [0, 1].
        static_max_norm: a largest norm besides.
        global_step: number, Variable or callable without arguments, read at every call.
        report_summary: whether to keep the largest norm of the last call in `max_norm`, for whoever logs
            it. (TensorFlow writes a summary here.)
        epsilon: keeps the logarithm and the root away from 0.
        name: of the averages, "AdaptiveMaxNorm" when not given.

    Attributes:
        mean: moving average of the logarithm of the norm; a Variable.
        sq_mean: moving average of its square; a Variable.
        max_norm: above which norm the last call clipped, a scalar on the gradients' device; None before
            the first call and where `report_summary` is False.

    Raises:
        ValueError: `decay` is not in [0, 1], `static_max_norm` is negative, or `epsilon` not positive.
    """

    def __init__(
        self,
        std_factor: float = 2.0,
        decay: float = 0.95,
        static_max_norm: float | None = None,
        global_step: Any = None,
        report_summary: bool = False,
        epsilon: float = 1e-8,
        name: str | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], got {decay}. 0.95 is usual.")
        if static_max_norm is not None and not static_max_norm >= 0.0:
            raise ValueError(f"static_max_norm must be 0 or more, got {static_max_norm}. Use None for none.")
        if not epsilon > 0.0:
            raise ValueError(f"epsilon must be above 0, got {epsilon}. 1e-8 is usual.")
        self.std_factor = std_factor
        self.decay = decay
        self.static_max_norm = static_max_norm
        self.global_step = global_step
        self.report_summary = report_summary
        self.epsilon = epsilon
        self.max_norm: Any = None
        prefix = name or "AdaptiveMaxNorm"
        self.mean = Variable(np.float32(0.0), trainable=False, name=f"{prefix}/mean")
        self.sq_mean = Variable(np.float32(0.0), trainable=False, name=f"{prefix}/sq_mean")

    def variables(self) -> list[Variable]:
        """Return what a checkpoint needs: `mean` and `sq_mean`."""
        return [self.mean, self.sq_mean]

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Update the averages by the norm of the gradients, and return the scaled pairs."""
        pairs = list(pairs)
        given = [gradient for gradient, _ in pairs if gradient is not None]
        norm = norm_of(given)
        if given:
            self._move_to(values_of(given[0]))
        xp = namespace(norm)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            norm = _single(norm)
            mean, deviation = self._update(_wide(xp.log, norm + _single(self.epsilon)))
            largest = _wide(xp.exp, mean + _single(self.std_factor) * deviation)
            factor = xp.where(norm < largest, np.float32(1.0), _wide(xp.exp, mean) / norm)
            if self.static_max_norm is not None:
                factor = xp.minimum(_single(self.static_max_norm) / norm, factor)
        self.max_norm = largest if self.report_summary else None
        return [(scaled(gradient, variable, factor), variable) for gradient, variable in pairs]

    def _update(self, logarithm: Any) -> tuple[Any, Any]:
        """Take a logarithm of a norm into the averages; return mean and standard deviation."""
        xp = namespace(logarithm)
        rate = _single(1.0 - self._decay_now(xp))
        mean, squares = self.mean.value, self.sq_mean.value
        mean += rate * (logarithm - mean)
        squares += rate * (logarithm * logarithm - squares)
        return mean, xp.sqrt(xp.maximum(_single(self.epsilon), squares - mean * mean))

    def _decay_now(self, xp: Any) -> Any:
        if self.global_step is None:
            return self.decay
        step: Any = self.global_step() if callable(self.global_step) else self.global_step
        step = step.value if isinstance(step, Operand) else step
        if namespace(step) is not xp or xp is np:
            step = float(step)  # waits for the device where the norm is on the host and the step is not
            return min(self.decay, step / (step + 1.0))
        return xp.minimum(self.decay, step / (step + 1.0))

    def _move_to(self, values: Any) -> None:
        """Hold the averages on the device of the gradients."""
        device = device_of(values)
        for variable in self.variables():
            if variable.device != device:
                variable.value, variable.device = device.asarray(variable.value), device


def adaptive_clipping_fn(
    std_factor: float = 2.0,
    decay: float = 0.95,
    static_max_norm: float | None = None,
    global_step: Any = None,
    report_summary: bool = False,
    epsilon: float = 1e-8,
    name: str | None = None,
) -> AdaptiveClipping:
    """Return an `AdaptiveClipping`, under the name of `tf.contrib.layers`; arguments and errors are its.

    The result goes into `gradient_transformers` of an optimizer or `clip_gradients` of `optimize_loss`.
    """
    return AdaptiveClipping(std_factor, decay, static_max_norm, global_step, report_summary, epsilon, name)


def _single(value: Any) -> Any:
    """Return a number or a scalar on a device as float32."""
    return value.astype(np.float32) if hasattr(value, "astype") else np.float32(value)


def _wide(function: Any, value: Any) -> Any:
    """Apply a function in float64 to a float32 scalar, and round."""
    return function(value.astype(np.float64)).astype(np.float32)
