"""Arena: the flat memory that variables and their gradients live in.

An `Arena` lays all dense trainable values of a replica into one flat array per dtype, and their gradients
into another of the same layout. A `Variable` in an arena is a named, shaped view. Communication buckets,
the optimizer's formula, checksums and checkpoints then work on one array instead of on many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distopt.backend import Array, Device
from distopt.variables.variable import Variable, numbers

__all__ = ["Arena", "Slab"]

_ALIGNMENT_BYTES = 256


@dataclass(eq=False)
class Slab:
    """The part of an arena that holds one dtype.

    Attributes:
        values: flat array of all values, padding between segments zero.
        gradients: flat array of the same layout.
        variables: in the order of their segments.
        number: grows with each slab made in this process, so it orders slabs alike on all ranks.
    """

    values: Array
    gradients: Array
    variables: list[Variable]
    number: int = field(default_factory=numbers.__next__)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.values.dtype

    def __reduce__(self) -> Any:
        raise TypeError(
            "an arena and its variables can't be copied or pickled: copies of views would be arrays of their "
            "own. Save values with `numpy()` or a checkpoint, and build the model anew."
        )

    def end(self, variable: Variable) -> int:
        """Where the segment of `variable` ends, its padding included."""
        return variable.start + _padded(variable.size, self.dtype)


class Arena:
    """Flat memory for the values and the gradients of variables, one `Slab` per dtype.

    Segments stand in reverse order of creation: backward makes the last layer's gradients first, so the
    finished part of `gradients` is a prefix that grows. Each starts at a multiple of 256 bytes.
    The order of `variables` alone decides the layout, so ranks that build the same model have the same.

    Args:
        variables: in the order of their creation; their values move into the arena.
        device: where the arena lives; that of the first variable when not given.
        allocate: makes zeroed memory, (size, dtype) -> [size], for values and for gradients; such as
            `Communicator.allocate`, whose memory the ranks of a host share. The device's own when not given.

    Raises:
        ValueError: no variables, two of one name, one that is in another arena already.
    """

    def __init__(
        self,
        variables: Iterable[Variable],
        device: Device | None = None,
        allocate: Callable[[int, np.dtype[Any]], Array] | None = None,
    ) -> None:
        created = list(variables)
        if not created:
            raise ValueError("an arena needs at least one variable; got none")
        _check_members(created)
        self.device = device or created[0].device
        self._allocate = self.device.zeros if allocate is None else allocate
        self.variables: list[Variable] = created[::-1]
        by_dtype: dict[np.dtype[Any], list[Variable]] = {}
        for variable in self.variables:
            by_dtype.setdefault(variable.dtype, []).append(variable)
        self.slabs = [self._lay_out(members) for members in by_dtype.values()]

    def _lay_out(self, members: list[Variable]) -> Slab:
        dtype = members[0].dtype
        total = sum(_padded(variable.size, dtype) for variable in members)
        slab = Slab(self._allocate(total, dtype), self._allocate(total, dtype), members)
        start = 0
        for variable in members:
            stop = start + variable.size
            view = slab.values[start:stop].reshape(variable.shape)
            view[...] = self.device.asarray(variable.value)
            variable.value = view
            variable.gradient = slab.gradients[start:stop].reshape(variable.shape)
            variable.slab, variable.start, variable.device = slab, start, self.device
            start = slab.end(variable)
        return slab

    @property
    def size(self) -> int:
        """Number of elements of all variables, padding not counted."""
        return sum(variable.size for variable in self.variables)

    def schema(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Return (name, shape, dtype) of each variable in the arena's order, to compare ranks by."""
        return [(v.name, v.shape, str(v.dtype)) for v in self.variables]


def _padded(size: int, dtype: np.dtype[Any]) -> int:
    per_line = _ALIGNMENT_BYTES // dtype.itemsize
    return -(-size // per_line) * per_line


def _check_members(variables: list[Variable]) -> None:
    seen: set[str] = set()
    for variable in variables:
        if variable.slab is not None:
            raise ValueError(f"variable {variable.name!r} is in another arena already")
        if variable.name in seen:
            raise ValueError(
                f"two variables are named {variable.name!r}; slots and checkpoints go by name, "
                "so give each its own"
            )
        seen.add(variable.name)
