"""In which order the arrays of several ranks are added: what `Communicator.combine` is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distopt.backend import Array

__all__ = ["SumOrder"]


@dataclass(frozen=True)
class SumOrder:
    """A sum of arrays that ranks bring, each a number of them, as a list of additions of two.

    Arrays are numbered over the ranks: first those of rank 0, then those of rank 1, and so on.

    Args:
        counts: how many arrays each rank brings, at least one.
        additions: (a, b): array b is added to array a, which is their sum from then on. Each array but one
            is added to another once, and is not used any more then.

    Raises:
        ValueError: a rank brings none, or the additions don't make one sum of all arrays.
    """

    counts: tuple[int, ...]
    additions: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"every rank must bring at least one array, got counts {self.counts}")
        left = set(range(sum(self.counts)))
        for target, addend in self.additions:
            if target == addend or not {target, addend} <= left:
                raise ValueError(
                    f"addition ({target}, {addend}) needs two arrays that are not added to another before; "
                    f"of {sum(self.counts)} there are {sorted(left)} then"
                )
            left.remove(addend)
        if len(left) > 1:
            raise ValueError(f"the additions leave the arrays {sorted(left)}, where they must leave one sum")

    @property
    def is_pair(self) -> bool:
        """Whether it is a + b, of two ranks: that has the same bits as b + a, and so any all_reduce."""
        return self.counts == (1, 1)

    def total(self, arrays: Sequence[Array]) -> Array:
        """Return the sum of all ranks' arrays, made in these arrays: it is one of them."""
        result = arrays[0]
        with np.errstate(over="ignore", invalid="ignore"):  # an infinite sum is a value, not a warning
            for target, addend in self.additions:
                result = arrays[target]
                result += arrays[addend]
        return result
