"""Where gradients are not finite: on which rank, in which variable, at which element."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from distopt.aggregators.aggregator import Pair
from distopt.backend import Array, asnumpy, namespace
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, value_of

__all__ = ["NotFinite", "first_not_finite", "locate_not_finite"]


@dataclass(frozen=True)
class NotFinite:
    """The first element of a rank's gradients that is NaN or infinite.

    Attributes:
        variable: name of the first variable, in the order of creation, with such an element.
        index: of the first such element, in the variable's shape.
        value: the element.
        count: how many elements of this variable's gradient are not finite.
        rank: whose gradients they are.
        host: of that rank.
    """

    variable: str
    index: tuple[int, ...]
    value: float
    count: int
    rank: int
    host: str

    @property
    def what(self) -> str:
        """The place in words, without the rank."""
        return (
            f"the gradient of {self.variable!r} is {self.value} at element {list(self.index)} "
            f"({self.count} of its elements are not finite)"
        )

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.what}"


def locate_not_finite(pairs: Iterable[Pair], communicator: Communicator) -> list[NotFinite]:
    """Return the first place for each rank whose gradients are not finite; the same on all ranks. Collective.

    Called only when something was found to be not finite, it costs nothing in any other step. Reduction
    overwrites the ranks' own gradients in an arena, so compute them once more: nothing was updated yet.
    An empty answer for sums that are not finite says that the sum over ranks overflowed.

    Args:
        pairs: this rank's own gradients, before their reduction.
        communicator: the ranks.
    """
    own = first_not_finite(pairs, communicator.rank, communicator.host)
    return [found for found in communicator.all_gather_object(own) if found is not None]


def first_not_finite(pairs: Iterable[Pair], rank: int = 0, host: str = "") -> NotFinite | None:
    """Return the first place in some gradients that is not finite, None if there is none.

    Args:
        pairs: (gradient, variable).
        rank: for the answer.
        host: for the answer.
    """
    # Made into a list first: a stream comes in the order of backward, which is another one on each rank.
    for gradient, variable in sorted(list(pairs), key=lambda pair: pair[1].number):
        given = value_of(gradient)
        if given is None:
            continue
        values: Array = given.values if isinstance(given, IndexedSlices) else given
        xp = namespace(values)
        if bool(xp.isfinite(values).all()):
            continue
        wrong = ~np.isfinite(np.asarray(asnumpy(values), np.float64))
        place = tuple(int(n) for n in np.argwhere(wrong)[0])
        value = float(asnumpy(values)[place])
        if isinstance(given, IndexedSlices):  # the place in the whole variable
            place = (int(asnumpy(given.indices)[place[0]]), *place[1:])
        return NotFinite(variable.name, place, value, int(wrong.sum()), rank, host)
    return None
