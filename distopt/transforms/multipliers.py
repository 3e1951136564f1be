"""Factors on the gradients of some variables."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from distopt.backend import device_of, namespace
from distopt.transforms.pairs import Pair, scaled, values_of
from distopt.variables import Operand, Variable

__all__ = ["GradientMultipliers"]


class GradientMultipliers:
    """Multiply the gradients of some variables, as `optimize_loss(gradient_multipliers=...)` does.

    A key is a variable or a name; a variable's own key comes before its name. Names are distopt's
    ("conv1/weights") or TensorFlow's full ones ("conv1/weights:0"); where both are given the full one
    counts. (In TensorFlow a name without ":0" silently has no effect.) None stays None; of IndexedSlices
    the rows are multiplied. Variables that are not in the mapping keep their gradients.

    Args:
        multipliers: variable or name -> factor: a number, a Variable, an array that broadcasts to the
            gradient (a mask, for instance; with slices, to the rows that are listed), or a callable without
            arguments that gives one of these, read at every call.

    Raises:
        TypeError: `multipliers` is no mapping, or a key is neither a variable nor a name.
    """

    def __init__(self, multipliers: Mapping[Variable | str, Any]) -> None:
        if not isinstance(multipliers, Mapping):
            raise TypeError(
                f"gradient multipliers must be a dict from variables or names, got {multipliers!r}."
            )
        for key in multipliers:
            if not isinstance(key, str | Variable):
                raise TypeError(f"a key of gradient multipliers is a Variable or its name, got {key!r}.")
        self.multipliers = dict(multipliers)
        self._checked = False

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the pairs with multiplied gradients.

        Warns at the first call about names that no variable among the pairs has.
        """
        multiplied: list[Pair] = []
        found: set[str] = set()
        for gradient, variable in pairs:
            keys = self._keys(variable)
            found.update(key for key in keys if isinstance(key, str))
            if gradient is not None and keys:
                factor = self._factor(keys[0])
                values = values_of(gradient)
                if namespace(values) is not namespace(factor):
                    factor = device_of(values).asarray(factor)
                multiplied.append((scaled(gradient, variable, factor), variable))
            else:
                multiplied.append((gradient, variable))
        self._check_names(found)
        return multiplied

    def _keys(self, variable: Any) -> list[Variable | str]:
        """Return the keys that mean a variable, the one that counts first."""
        name = getattr(variable, "name", None)
        candidates = [variable] if isinstance(variable, Variable) else []
        return [key for key in (*candidates, f"{name}:0", name) if key in self.multipliers]

    def _factor(self, key: Variable | str) -> Any:
        factor = self.multipliers[key]
        factor = factor() if callable(factor) else factor
        return factor.value if isinstance(factor, Operand) else factor

    def _check_names(self, found: set[str]) -> None:
        if self._checked:
            return
        self._checked = True
        unknown = [key for key in self.multipliers if isinstance(key, str) and key not in found]
        if unknown:
            warnings.warn(
                f"gradient multipliers are given for {unknown}, but no variable of these names has a "
                "gradient, so they have no effect. Check the names, or give the variables themselves.",
                stacklevel=3,
            )
