"""Muon: momentum whose matrices are orthogonalised; AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from distopt.aggregators import Pair
from distopt.backend import Array, namespace
from distopt.elementwise import decayed, elementwise
from distopt.optimizers import layerwise
from distopt.optimizers.adam import adam, adam_rate, check_adam, default_epsilon
from distopt.optimizers.gradient_descent import check_momentum, gradient_descent
from distopt.optimizers.weight_decay import DecayConvention, DecoupledWeightDecay, matches, patterns
from distopt.variables import Variable

__all__ = ["Muon", "Scale", "muon_momentum", "orthogonalized"]

Scale: TypeAlias = Literal["original", "match_rms_adamw", "none"]
"""What the orthogonal matrix is multiplied by; see `Muon`."""

_SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda inputs, outputs: max(1.0, outputs / inputs) ** 0.5,
    "match_rms_adamw": lambda inputs, outputs: 0.2 * max(inputs, outputs) ** 0.5,
    "none": lambda inputs, outputs: 1.0,
}
# Keller Jordan's: steep at 0, so that small singular values grow fast, at the price of ending beside 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


@elementwise
def muon_momentum(gradient: Any, m: Any, direction: Any, *, momentum: float, nesterov: bool) -> Any:
    """Momentum before orthogonalisation: m = mu m + g;  d = m, or with Nesterov g + mu m."""
    m = momentum * m + gradient
    direction = gradient + momentum * m if nesterov else m
    return m, direction


def orthogonalized(matrix: Array, steps: int = 5) -> Array:
    """Return roughly U V^T of a matrix U S V^T: all singular values brought near 1.

    Newton-Schulz iteration: the matrix is divided by its Frobenius norm, then
    `X = a X + b (X X^T) X + c (X X^T)^2 X` with coefficients that converge fast to about 1 rather than
    slowly to exactly 1. After 5 steps the singular values that were above 1/500 of the norm are between
    0.68 and 1.21; smaller ones have grown 430 times and more. Zeros stay zero.

    Args:
        matrix: [rows, columns] of any floating dtype, not changed.
        steps: how many iterations.

    Returns:
        [rows, columns] in float32, float64 where the matrix is that.

    Cost: `steps` times two products of the short side squared by the long side, and one of the short side
    cubed. The products are BLAS', so their last bits may differ between kinds of processors.
    """
    xp = namespace(matrix)
    dtype = np.float64 if matrix.dtype == np.float64 else np.float32
    scale = xp.asarray(1.0 / (layerwise.norm(matrix.reshape(-1)) + 1e-7)).astype(dtype)
    tall = matrix.shape[0] > matrix.shape[1]
    a, b, c = _QUINTIC
    with np.errstate(invalid="ignore"):  # what isn't finite becomes NaN, as in the other rules
        x: Array = (matrix.T if tall else matrix).astype(dtype) * scale
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


class Muon(DecoupledWeightDecay):
    """Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with AdamW beside it.

    A variable with two axes or more is a matrix [inputs, outputs], the kernel of a convolution with its
    first axes flattened into the inputs; its update is momentum brought to singular values near 1:

        m = momentum * m + g;   d = g + momentum * m with nesterov, else m
        w -= lr * weight_decay * w;   w -= lr * scale * orthogonalized(d)

    Other variables (biases, those of normalization), and those that `exclude` names, are updated by `AdamW`
    with `adam_learning_rate`. Embeddings and the last layer should be among them, says the author.

    scale is, for "original", max(1, outputs / inputs) ** 0.5 (in PyTorch's layout [outputs, inputs] it
    reads rows / columns); for "match_rms_adamw", 0.2 * max(inputs, outputs) ** 0.5 (Liu et al. 2025,
    arxiv.org/abs/2502.16982), with which rates and decays for AdamW suit; for "none", 1.

    Differences: the author's later code and PyTorch's `torch.optim.Muon` average (m = mu m + (1-mu) g), which
    the orthogonalisation undoes, and iterate in bfloat16, here in float32 (float64 for variables of it). The
    author's takes the scale of a convolution from the window's two axes, which makes it 1. PyTorch's
    takes matrices only and defaults to lr 1e-3 and weight_decay 0.1. A sparse gradient is the dense one
    with zeros.

    Matrix products go through BLAS: replicas hold the same bits where they run on the same kind of
    processor with as many BLAS threads. On mixed ones compare checksums, or exclude what is large.

    Args:
        learning_rate: of the matrices: number, schedule or callable; not negative.
        momentum: decay of m, in [0, 1].
        nesterov: see above.
        weight_decay: number, schedule or callable; not negative. For AdamW's variables it is multiplied by
            their rate.
        adam_learning_rate: of the other variables: number, schedule or callable; not negative.
        adam_beta_1: AdamW's decay of the first moment, in [0, 1).
        adam_beta_2: AdamW's decay of the second moment, in [0, 1).
        epsilon: AdamW's; None and 0 become 1e-7.
        exclude: regular expressions; variables in whose names one is found anywhere are AdamW's. Or a
            callable Variable -> bool that always answers the same for a variable.
        scale: "original", "match_rms_adamw" or "none", see above.
        ns_steps: how many Newton-Schulz iterations.
        name: for messages and slots. Slots are "m", and for AdamW's variables "v" too.
        decay_convention: see `AdamW`.
        exclude_from_weight_decay: regular expressions; variables in whose names one is found anywhere
            don't decay.
        decay_var_list: variables, or names of some, that decay; None for all. Excluded ones don't.
        kwargs: those of `Optimizer`, except `decay`: there are two rates, which schedules can set.

    Raises:
        ValueError: a hyperparameter out of range, or an unknown scale.
        TypeError: `exclude` is neither.
    """

    rule = adam
    slots = {"m": 0.0, "v": 0.0, "vhat": 0.0}  # noqa: RUF012  (a constant of the class)
    sparse = "all"
    settings = (
        "nesterov",
        "exclude",
        "scale",
        "ns_steps",
        "decay_convention",
        "exclude_from_weight_decay",
        "decay_var_list",
    )
    _has_decay: ClassVar[bool] = False

    def __init__(
        self,
        learning_rate: Any = 0.02,
        momentum: Any = 0.95,
        nesterov: bool = True,
        weight_decay: Any = 0.0,
        adam_learning_rate: Any = 3e-4,
        adam_beta_1: Any = 0.9,
        adam_beta_2: Any = 0.95,
        epsilon: Any = 1e-7,
        exclude: Iterable[str] | Callable[[Variable], bool] | None = None,
        scale: Scale = "original",
        ns_steps: int = 5,
        name: str = "Muon",
        *,
        decay_convention: DecayConvention = "keras",
        exclude_from_weight_decay: Iterable[str] | None = None,
        decay_var_list: Iterable[Variable | str] | None = None,
        **kwargs: Any,
    ) -> None:
        if scale not in _SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, _SCALES))}, got {scale!r}")
        if not isinstance(ns_steps, int) or ns_steps < 1:
            raise ValueError(f"ns_steps must be 1 or more, got {ns_steps!r}; 5 are usual")
        self.nesterov = bool(nesterov)
        self.scale = scale
        self.ns_steps = ns_steps
        self.exclude = exclude if callable(exclude) else patterns("exclude", exclude)
        hyperparameters = {
            "learning_rate": learning_rate,
            "momentum": momentum,
            "adam_learning_rate": adam_learning_rate,
            "adam_beta_1": adam_beta_1,
            "adam_beta_2": adam_beta_2,
            "epsilon": default_epsilon(epsilon),
        }
        super().__init__(name, hyperparameters=hyperparameters, **kwargs)
        self._decay_weights(weight_decay, decay_convention, exclude_from_weight_decay, decay_var_list)

    def orthogonalizes(self, variable: Variable) -> bool:
        """Whether a variable is a matrix that Muon updates; AdamW updates the others."""
        if variable.ndim < 2 or not variable.size:
            return False
        if callable(self.exclude):
            return not self.exclude(variable)
        return not matches(self.exclude, variable.name)

    def check(self, key: str, value: float) -> None:
        """See `Optimizer.check`."""
        super().check(key, value)
        check_adam(key.removeprefix("adam_"), value)
        if key == "momentum":
            check_momentum(value)
        if key == "adam_learning_rate" and not value >= 0:
            raise ValueError(f"adam_learning_rate must not be negative, got {value}")

    def get_config(self) -> dict[str, Any]:
        """See `Optimizer.get_config`.

        Raises:
            TypeError: `exclude` is a callable.
        """
        if callable(self.exclude):
            raise TypeError(
                f"exclude is {self.exclude!r}, which a configuration can't hold; give regular expressions"
            )
        return super().get_config()

    def options(self) -> dict[str, Any]:
        """See `Optimizer.options`."""
        return {"amsgrad": False}

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """See `Optimizer.scalars`: those of both kinds of variables, which `grouped` tells apart."""
        t, beta_1, beta_2 = step + 1, values["adam_beta_1"], values["adam_beta_2"]
        adams = {**values, "learning_rate": values["adam_learning_rate"]}
        return {
            "learning_rate": values["learning_rate"],
            "momentum": values["momentum"],
            "decay_share": self._decay_share(values),
            "rate": adam_rate(adams["learning_rate"], beta_1**t, beta_2**t),
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": values["epsilon"],
            "adam_decay_share": self._decay_share(adams),
        }

    def group(self, variable: Variable) -> Hashable:
        """See `Optimizer.group`: whether a variable is a matrix, and whether it decays."""
        return self.orthogonalizes(variable), super().group(variable)

    def grouped(self, scalars: dict[str, float], group: Any) -> dict[str, float]:
        """See `Optimizer.grouped`."""
        matrix, decay = group
        if matrix:
            own = {name: scalars[name] for name in ("learning_rate", "momentum", "decay_share")}
        else:
            own = {name: scalars[name] for name in ("rate", "beta_1", "beta_2", "epsilon")}
            own["decay_share"] = scalars["adam_decay_share"]
        return super().grouped(own, decay)

    def _create_slots(self, var_list: Sequence[Variable]) -> None:
        super()._create_slots([variable for variable in var_list if not self.orthogonalizes(variable)])
        for variable in var_list:
            if self.orthogonalizes(variable):
                self.add_slot(variable, "m", 0.0)

    def _apply_runs(self, pairs: Sequence[Pair], scalars: Any) -> None:
        super()._apply_runs([pair for pair in pairs if not self.orthogonalizes(pair[1])], scalars)
        for gradient, variable in pairs:
            if self.orthogonalizes(variable):
                self._apply_one(gradient, variable, scalars)

    def _apply_one(self, gradient: Array, variable: Variable, scalars: Any) -> None:
        if not self.orthogonalizes(variable):
            super()._apply_one(gradient, variable, scalars)
            return
        own = scalars.of(variable.dtype, self.group(variable))
        (m,) = self._slots.of_variable(variable, ["m"])
        with variable.device.activate():
            direction = layerwise.scratch(m)
            muon_momentum(gradient, m, direction, momentum=own["momentum"], nesterov=self.nesterov)
            outputs = variable.shape[-1]
            matrix = direction.reshape(-1, outputs)
            update = orthogonalized(matrix, self.ns_steps).astype(variable.dtype)
            rate = own["learning_rate"] * _SCALES[self.scale](matrix.shape[0], outputs)
            decayed(gradient_descent)(
                variable.value,
                update.reshape(variable.shape),
                learning_rate=rate,
                decay_share=own["decay_share"],
            )
