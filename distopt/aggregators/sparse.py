"""Sparse gradients over ranks: rows, of which each rank has its own number, or a whole table where cheaper.

Whichever way they go, the result is the same rows on every rank, each index once and in order: an optimizer
that updates the listed rows only does the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from distopt.aggregators.divide import widened
from distopt.aggregators.traffic import sent_by_all_reduce, sent_to_each
from distopt.backend import Array, Device, namespace
from distopt.communicators import Communicator
from distopt.communicators.communicator import wire_dtype
from distopt.variables import IndexedSlices, Variable, value_of

__all__ = ["RowsInArena", "SparseExchange", "SparseMode", "local_rows", "put_into_arena"]

SparseMode: TypeAlias = Literal["auto", "rows", "dense"]

_MEASURED_WIDTH = 64  # float32 in a row
_MEASURED_FEW = 16  # rows: 4 KB
_MEASURED_MANY = (4096, 65536)  # as in the first table, within 1 MB and 16 MB
_REPEATS = 3
_INDEX_BYTES = 8


class RowsInArena:
    """A gradient whose rows lie in the arena, where they are summed with everything else.

    Attributes:
        indices: of the rows that some rank had, each once.
    """

    def __init__(self, indices: Array) -> None:
        self.indices = indices

    def slices(self, variable: Variable) -> IndexedSlices:
        """Return the rows, when the arena's part is complete."""
        assert variable.gradient is not None
        return IndexedSlices(variable.gradient[self.indices], self.indices, variable.shape)


def local_rows(gradient: IndexedSlices, variable: Variable) -> IndexedSlices:
    """Return this rank's rows on the variable's device and in its dtype, each index once.

    Raises:
        ValueError: the rows don't fit the variable, or an index is out of range.
    """
    gradient = value_of(gradient)
    if not variable.ndim or gradient.values.shape[1:] != variable.shape[1:]:
        raise ValueError(
            f"the gradient of variable {variable.name!r} has rows of shape {gradient.values.shape[1:]}, "
            f"the variable has shape {variable.shape}"
        )
    device = variable.device
    with device.activate():
        values = device.asarray(gradient.values, variable.dtype)
        indices = device.asarray(gradient.indices, np.int64)
        return IndexedSlices(values, indices, variable.shape).deduplicated()


def put_into_arena(rows: IndexedSlices, variable: Variable) -> None:
    """Write rows, each index once, into the variable's part of the arena's gradients; zeros elsewhere."""
    assert variable.gradient is not None
    with variable.device.activate():
        variable.gradient[...] = 0
        variable.gradient[rows.indices] = rows.values


@dataclass(frozen=True)
class _Cost:
    """What an exchange takes, as measured: the same numbers on every rank."""

    seconds: float
    seconds_per_byte: float

    def of(self, size: float) -> float:
        return self.seconds + self.seconds_per_byte * size


class SparseExchange:
    """Sums the rows of all ranks for variables outside an arena.

    Args:
        communicator: over whose ranks.
        mode: "rows": every rank gets all ranks' rows. "dense": the whole table is summed, with a column that
            tells which rows are in use. "auto": what takes less time by a measurement that is made once,
            with the first sparse gradient, and by the number of rows in this step.

    Attributes:
        chosen: name of a variable -> "rows" or "dense", in the last step.
        wire_bytes: how many bytes this rank sent to others; whoever reads it may set it to 0.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(self, communicator: Communicator, mode: SparseMode = "auto") -> None:
        if mode not in get_args(SparseMode):
            raise ValueError(f"sparse must be 'auto', 'rows' or 'dense', got {mode!r}")
        self.communicator = communicator
        self.mode: SparseMode = mode
        self.chosen: dict[str, str] = {}
        self.wire_bytes = 0
        self._costs: tuple[_Cost, _Cost] | None = None

    def sum(
        self, gradient: IndexedSlices | None, variable: Variable, rows: float, divisor: float | None
    ) -> IndexedSlices:
        """Return the rows of all ranks, each index once, divided where there is a divisor. Collective.

        Args:
            gradient: what `local_rows` gave, or None.
            variable: whose gradient it is.
            rows: how many there are on all ranks together.
            divisor: what to divide by.
        """
        if gradient is None:
            empty = variable.device.zeros((0, *variable.shape[1:]), variable.dtype)
            gradient = IndexedSlices(empty, variable.device.zeros(0, np.int64), variable.shape)
        self.chosen[variable.name] = self._choose(variable, rows)
        exchange = self._by_rows if self.chosen[variable.name] == "rows" else self._by_table
        with variable.device.activate():
            summed = exchange(gradient, variable.shape)
            total = summed.values
            if divisor is not None:
                total = total / total.dtype.type(divisor)
            with np.errstate(over="ignore"):  # beyond 16 bits: infinite it is seen
                values = total.astype(variable.dtype, copy=False)
            return IndexedSlices(values, summed.indices, variable.shape)

    def indices(self, gradient: IndexedSlices | None, variable: Variable) -> RowsInArena:
        """Return which rows of an arena's variable some rank has. Collective."""
        with variable.device.activate():
            own = variable.device.zeros(0, np.int64) if gradient is None else gradient.indices
            self.wire_bytes += sent_to_each(own.nbytes, self.communicator.size)
            xp = namespace(variable.value)
            found = self.communicator.all_gather_rows(xp.ascontiguousarray(own))
            return RowsInArena(xp.unique(xp.concatenate(found)))

    def _choose(self, variable: Variable, rows: float) -> str:
        if self.mode != "auto":
            return self.mode
        if self.communicator.size == 1:
            return "rows"
        size = variable.size * variable.dtype.itemsize / max(1, variable.shape[0])  # of a row
        table = variable.shape[0] * (size + variable.dtype.itemsize)
        if self._costs is None:
            self._costs = self._measured(variable.device, table)
        by_rows, by_table = self._costs
        return "rows" if by_rows.of(rows * (size + _INDEX_BYTES)) <= by_table.of(table) else "dense"

    def _by_rows(self, gradient: IndexedSlices, shape: tuple[int, ...]) -> IndexedSlices:
        xp = namespace(gradient.values)
        values, indices = xp.ascontiguousarray(gradient.values), xp.ascontiguousarray(gradient.indices)
        self.wire_bytes += sent_to_each(values.nbytes + indices.nbytes, self.communicator.size)
        # In rank order on every rank, so that equal indices are summed to the same bits everywhere.
        all_values = widened(xp.concatenate(self.communicator.all_gather_rows(values)))
        all_indices = xp.concatenate(self.communicator.all_gather_rows(indices))
        return IndexedSlices(all_values, all_indices, shape).deduplicated()

    def _by_table(self, gradient: IndexedSlices, shape: tuple[int, ...]) -> IndexedSlices:
        xp = namespace(gradient.values)
        width = int(np.prod(shape[1:], dtype=np.int64))
        table = xp.zeros((shape[0], width + 1), wire_dtype(gradient.dtype))
        table[gradient.indices, :width] = gradient.values.reshape(len(gradient.values), width)
        table[gradient.indices, width] = 1  # zeros of a row that is listed count as a row
        self.wire_bytes += sent_by_all_reduce(table.nbytes, self.communicator.size)
        self.communicator.all_reduce(table).wait()
        indices = xp.flatnonzero(table[:, width]).astype(np.int64)
        return IndexedSlices(table[indices, :width].reshape(-1, *shape[1:]), indices, shape)

    def _measured(self, device: Device, table_bytes: float) -> tuple[_Cost, _Cost]:
        """Measure both ways at two sizes, and agree on the slowest rank's times. Collective."""
        row = 4 * _MEASURED_WIDTH
        least, most = _MEASURED_MANY
        sizes = _MEASURED_FEW, min(max(int(table_bytes // row), least), most)
        # What is received is as much either way: all ranks' rows together are as many as a table has.
        own = [max(1, rows // self.communicator.size) for rows in sizes]
        with device.activate():
            by_rows = [self._seconds(self._by_rows, rows, device) for rows in own]
            by_table = [self._seconds(self._by_table, rows, device) for rows in sizes]
        seconds: Array = np.array([*by_rows, *by_table])
        self.communicator.all_reduce(seconds, "max").wait()
        received = [rows * self.communicator.size * (row + _INDEX_BYTES) for rows in own]
        return _line(seconds[:2], received), _line(seconds[2:], [rows * (row + 4) for rows in sizes])

    def _seconds(
        self, exchange: Callable[[IndexedSlices, tuple[int, ...]], IndexedSlices], rows: int, device: Device
    ) -> float:
        sent = self.wire_bytes
        values = device.zeros((rows, _MEASURED_WIDTH), np.float32)
        gradient = IndexedSlices(values, device.asarray(np.arange(rows)), values.shape)
        best = np.inf
        for _ in range(_REPEATS):
            self.communicator.barrier()
            began = time.perf_counter()
            exchange(gradient, values.shape)
            device.synchronize()
            best = min(best, time.perf_counter() - began)
        self.wire_bytes = sent
        return best


def _line(seconds: Any, sizes: Sequence[float]) -> _Cost:
    """Return the straight line through two measurements, its numbers never negative."""
    slope = max(0.0, float(seconds[1] - seconds[0]) / (sizes[1] - sizes[0]))
    return _Cost(max(0.0, float(seconds[0]) - slope * sizes[0]), slope)
