"""Several transforms as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distopt.transforms.pairs import Pair
from distopt.variables import Variable

__all__ = ["Chain"]


class Chain:
    """Apply transforms one after another, the first one first.

        >>> import numpy as np
        >>> halve = lambda pairs: [(gradient * 0.5, variable) for gradient, variable in pairs]
        >>> Chain([halve, halve])([(np.array([4.0]), None)])
        [(array([1.]), None)]

    Args:
        transforms: callables that take pairs and return pairs, own functions for instance.

    Raises:
        TypeError: one is not callable.
    """

    def __init__(self, transforms: Sequence[Callable[[list[Pair]], Iterable[Pair]]]) -> None:
        for transform in transforms:
            if not callable(transform):
                raise TypeError(f"a transform is a callable, pairs -> pairs; got {transform!r}.")
        self.transforms = list(transforms)

    def __call__(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return the pairs after all transforms.

        Raises:
            TypeError: a transform returned something else than pairs.
        """
        result = list(pairs)
        for transform in self.transforms:
            returned: Any = transform(result)
            result = _checked(transform, returned)
        return result

    def variables(self) -> list[Variable]:
        """Return the variables of all transforms that have some, for a checkpoint."""
        return [
            variable
            for transform in self.transforms
            for variable in getattr(transform, "variables", list[Variable])()
        ]


def _checked(transform: Any, returned: Any) -> list[Pair]:
    pairs = list(returned) if isinstance(returned, Iterable) else None
    if pairs is None or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(
            f"transform {transform!r} must return a list of (gradient, variable), got {returned!r}."
        )
    return pairs
