"""Slots: an optimizer's own values beside each variable, laid out like the arena where there is one."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.aggregators import Division, Pair
from distopt.backend import Array, asnumpy, namespace
from distopt.variables import IndexedSlices, Slab, Variable, dense_gradient

__all__ = ["Run", "Slots", "arena_runs", "elements_of"]


@dataclass
class Run:
    """Neighbouring segments of a slab, updated in one go.

    Attributes:
        slab: where they are.
        start: first element.
        stop: one past the last element, the last segment's padding included.
        variables: whose segments they are.
        group: what the variables have in common; see `arena_runs`.
    """

    slab: Slab
    start: int
    stop: int
    variables: list[Variable]
    group: Hashable = None

    @property
    def values(self) -> Array:
        """The run's part of the slab's values."""
        return self.slab.values[self.start : self.stop]

    @property
    def gradients(self) -> Array:
        """The run's part of the slab's gradients."""
        return self.slab.gradients[self.start : self.stop]


def arena_runs(
    pairs: Iterable[Pair], group: Callable[[Variable], Hashable] = lambda variable: None
) -> list[Run]:
    """Join the segments of arena variables into runs; gradients elsewhere are copied into the arena.

    A model whose variables all have gradients is one run per dtype.

    Args:
        pairs: (dense gradient, variable).
        group: only neighbours for which it gives equal things are joined.
    """
    members: dict[int, list[Variable]] = {}
    for gradient, variable in pairs:
        if variable.slab is None or variable.gradient is None:
            continue
        if gradient is not variable.gradient:
            variable.gradient[...] = dense_gradient(gradient, variable)
        members.setdefault(id(variable.slab), []).append(variable)
    runs: list[Run] = []
    for variables in members.values():
        last: Run | None = None
        # An empty variable begins where the next one does, and ends there.
        for variable in sorted(variables, key=lambda v: (v.start, v.size)):
            slab, own = variable.slab, group(variable)
            assert slab is not None
            if last is not None and last.stop == variable.start and last.group == own:
                last.stop = slab.end(variable)
                last.variables.append(variable)
            else:
                last = Run(slab, variable.start, slab.end(variable), [variable], own)
                runs.append(last)
    return runs


def elements_of(gradient: IndexedSlices, variable: Variable, part: slice) -> tuple[Array, Array]:
    """Return what slices hold of a part of the flat variable: places in the part, and values.

    Args:
        gradient: rows of a table.
        variable: the table.
        part: of the flat variable, not empty.
    """
    xp = namespace(gradient.values)
    width = variable.size // max(1, variable.shape[0])
    rows = gradient.indices.astype(np.int64)
    near = (rows >= part.start // width) & (rows <= (part.stop - 1) // width)
    places = (rows[near][:, None] * width + xp.arange(width)).reshape(-1)
    inside = (places >= part.start) & (places < part.stop)
    return places[inside] - part.start, gradient.values[near].reshape(-1)[inside]


class Slots:
    """All slots of one optimizer. A slot is a `Variable`; for an arena's variables it is a view.

    Slots of one name and of the variables of one slab lie in one flat array of the slab's layout, so
    that the optimizer's formula runs over all of them at once.

    Where slots are divided among ranks, that array holds this rank's parts only, one after the other. The
    value of a slot is then what this rank has of it: flat and perhaps empty, or of the variable's shape
    where it has all.

    Attributes:
        names: of the slots made so far, in the order of their creation.
        division: how slots are divided among ranks; None: every rank has all.
    """

    def __init__(self) -> None:
        self._slots: dict[Variable, dict[str, Variable]] = {}
        self._slabs: dict[tuple[Slab, str], Array] = {}
        self._placed: set[tuple[Variable, str]] = set()
        self._padding: dict[str, float] = {}
        self._runs: dict[tuple[Slab, int, int], list[Array]] = {}
        self._divided_names: Container[str] = ()
        self._homes: dict[tuple[Variable, str], Slab | None] = {}  # the slab that they were cut for
        self._followed: dict[Variable, Slab | None] = {}
        self._whole_shapes: dict[tuple[Variable, str], tuple[int, ...]] = {}  # of those that are divided
        self.names: list[str] = []
        self.division: Division | None = None

    def divide(self, division: Division, names: Container[str] | None) -> None:
        """Divide the slots among ranks, those there are and those to come. On all ranks alike.

        Args:
            division: who has what.
            names: which slots; None for all.
        """
        self.division = division
        self._divided_names = _All() if names is None else names
        self._slabs.clear()
        self._placed.clear()
        self._runs.clear()
        for variable, slots in self._slots.items():
            for name, slot in slots.items():
                # Cut anew where it is divided, and copied, so that nothing holds the memory of the whole.
                whole = slot.value
                slot.value = self._made(variable, name, whole, slot.shape, slot.dtype)
                self._place(variable, name, slot)

    def holds(self, variable: Variable) -> bool:
        """Whether this rank has a part in the updates of a variable."""
        return self.division is None or self.division.holds(variable)

    def follow(self, variables: Iterable[Variable]) -> None:
        """Move slots to where their variables are now; collective where they are divided."""
        if self.division is not None:
            for variable in variables:
                if self._followed.get(variable) is not variable.slab:
                    self._followed[variable] = variable.slab
                    for name, slot in self._slots.get(variable, {}).items():
                        self._place(variable, name, slot)

    def find(self, variable: Variable, name: str) -> Variable | None:
        """Return a slot, None if there is none."""
        return self._slots.get(variable, {}).get(name)

    def is_partial(self, variable: Variable, name: str) -> bool:
        """Whether this rank has only a part of a slot, or nothing of it."""
        shape = self._whole_shapes.get((variable, name))
        return shape is not None and self._slots[variable][name].shape != shape

    def add(
        self,
        variable: Variable,
        name: str,
        initial: Any,
        full_name: str,
        shape: Sequence[int] | None = None,
        dtype: Any = None,
    ) -> Variable:
        """Make a slot.

        Args:
            variable: which it belongs to.
            name: the slot's name.
            initial: number, array, or callable (shape, dtype=...) -> array.
            full_name: name of the slot as a variable.
            shape: None is the variable's.
            dtype: None is the variable's.
        """
        shape = variable.shape if shape is None else tuple(shape)
        dtype = variable.dtype if dtype is None else np.dtype(dtype)
        self._padding.setdefault(name, float(initial) if isinstance(initial, int | float) else 0.0)
        if callable(initial):
            initial = initial(shape, dtype=dtype)
        slot = Variable(0.0, trainable=False, name=full_name, dtype=dtype, device=variable.device)
        slot.value = self._made(variable, name, initial, shape, dtype)
        self._slots.setdefault(variable, {})[name] = slot
        if name not in self.names:
            self.names.append(name)
        self._place(variable, name, slot)
        self._runs.clear()
        return slot

    def of_run(self, run: Run, names: Sequence[str]) -> list[Array]:
        """Return a run's part of each slot; every variable of the run must have them."""
        key = run.slab, run.start, run.stop
        if key not in self._runs:
            for variable in run.variables:
                for name in names:
                    self._place(variable, name, self._slots[variable][name])
            self._runs[key] = [
                self._slabs[run.slab, name][self._local(run.slab, name, run.start, run.stop)]
                for name in names
            ]
        return self._runs[key]

    def own_runs(self, runs: Iterable[Run]) -> Iterator[Run]:
        """Yield this rank's parts of runs."""
        for run in runs:
            if self.division is None:
                yield run
                continue
            for piece, _ in self.division.layout(run.slab).pieces(run.start, run.stop):
                yield Run(run.slab, piece.start, piece.stop, run.variables, run.group)

    def of_variable(self, variable: Variable, names: Sequence[str]) -> list[Array]:
        """Return each slot of a variable, in the variable's shape; this rank must have all of it."""
        slots = self._slots[variable] if names else {}
        for name in names:
            self._place(variable, name, slots[name])
        return [slots[name].value for name in names]

    def pieces(self, variable: Variable, names: Sequence[str]) -> list[tuple[slice, list[Array]]]:
        """Return what this rank has of slots of the variable's shape, which are divided alike.

        Returns:
            (slice of the flat variable, that part of each slot, flat); for slots that aren't divided one
            of all.
        """
        flat = [slot.reshape(-1) for slot in self.of_variable(variable, names)]
        found: list[tuple[slice, list[Array]]] = []
        start = 0
        for piece in self._own(variable, names, variable.size):
            stop = start + piece.stop - piece.start
            found.append((piece, [part[start:stop] for part in flat]))
            start = stop
        return found

    def whole(self, variable: Variable, name: str) -> Array:
        """Return a slot as a NumPy array of its own; collective where it is divided."""
        slot = self._slots[variable][name]
        self._place(variable, name, slot)
        shape = self._whole_shapes.get((variable, name))
        if shape is None or self.division is None:
            return np.array(asnumpy(slot.value))
        with variable.device.activate():
            return np.array(asnumpy(self.division.gather(variable, slot.value, shape)))

    def shape(self, variable: Variable, name: str) -> tuple[int, ...]:
        """Return the shape of a whole slot."""
        return self._whole_shapes.get((variable, name), self._slots[variable][name].shape)

    def assign(self, variable: Variable, name: str, whole: Any) -> None:
        """Set this rank's part of a slot from the whole."""
        slot = self._slots[variable][name]
        self._place(variable, name, slot)
        if (variable, name) not in self._whole_shapes:
            slot.assign(whole)
            return
        shape = self.shape(variable, name)
        slot.assign(self._made(variable, name, whole, shape, slot.dtype).reshape(slot.shape))

    def nbytes(self) -> int:
        """Return how much memory this rank's slots take, padding included."""
        loose = [slot for variable, name, slot in self.items() if (variable, name) not in self._placed]
        return sum(int(array.nbytes) for array in (*self._slabs.values(), *(slot.value for slot in loose)))

    def items(self) -> Iterator[tuple[Variable, str, Variable]]:
        """Yield (variable, slot's name, slot), variable by variable."""
        for variable, slots in self._slots.items():
            for name, slot in slots.items():
                self._place(variable, name, slot)
                yield variable, name, slot

    def _divides(self, variable: Variable, name: str, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether a slot of this kind is divided: elements are where slot and variable correspond."""
        if self.division is None or name not in self._divided_names:
            return False
        alike = shape == variable.shape and dtype == variable.dtype
        return alike or self.division.unit == "variables"

    def _own(self, variable: Variable, names: Sequence[str], size: int) -> list[slice]:
        """Return this rank's part of slots that are divided alike, as slices of a flat slot."""
        if self.division is None or (names and (variable, names[0]) not in self._whole_shapes):
            return [slice(0, size)]
        return self.division.own(variable, size)

    def _local(self, slab: Slab, name: str, start: int, stop: int) -> slice:
        """Return where what this rank has of a part of a slab is in the flat array of a slot."""
        if self.division is None or name not in self._divided_names:
            return slice(start, stop)
        found = [local for _, local in self.division.layout(slab).pieces(start, stop)]
        return slice(found[0].start, found[-1].stop) if found else slice(0, 0)

    def _size(self, slab: Slab, name: str) -> int:
        """Return the length of the flat array of a slot."""
        if self.division is None or name not in self._divided_names:
            return int(slab.values.size)
        return self.division.layout(slab).size

    def _made(self, variable: Variable, name: str, initial: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array with this rank's part of a slot."""
        device = variable.device
        with device.activate():
            if not self._divides(variable, name, shape, dtype):
                made = device.empty(shape, dtype)
                made[...] = device.asarray(initial, dtype)
                return made
            self._whole_shapes[variable, name] = shape
            self._homes[variable, name] = variable.slab
            size = int(np.prod(shape))
            own = self._own(variable, [name], size)
            count = sum(piece.stop - piece.start for piece in own)
            made = device.empty(count, dtype)
            given = device.asarray(initial, dtype)
            if given.ndim:
                given = namespace(given).broadcast_to(given, shape).reshape(-1)
            start = 0
            for piece in own:
                stop = start + piece.stop - piece.start
                made[start:stop] = given[piece] if given.ndim else given
                start = stop
            return made.reshape(shape) if count == size and (own or not size) else made

    def _place(self, variable: Variable, name: str, slot: Variable) -> None:
        """Move a slot into the flat array of its variable's slab, where the variable has entered one."""
        slab = variable.slab
        if slab is None or (variable, name) in self._placed:
            return
        shape = self._whole_shapes.get((variable, name), slot.shape)
        if shape != variable.shape or slot.dtype != slab.dtype:
            return  # it has a layout of its own
        with variable.device.activate():
            value = variable.device.asarray(slot.value)
            if self._homes.get((variable, name), slab) is not slab:
                value = self._moved(variable, name, value, shape)
            if (slab, name) not in self._slabs:
                flat = variable.device.empty(self._size(slab, name), slab.dtype)
                flat.fill(self._padding[name])  # as in the segments, so that the values' padding stays zero
                self._slabs[slab, name] = flat
            start = variable.start
            view = self._slabs[slab, name][self._local(slab, name, start, start + variable.size)]
            view[...] = value.reshape(-1)
        slot.value = view.reshape(shape) if view.size == variable.size else view
        slot.device = variable.device
        self._placed.add((variable, name))

    def _moved(self, variable: Variable, name: str, part: Array, shape: tuple[int, ...]) -> Array:
        """Return this rank's part of a slot that was divided before its variable was in an arena."""
        assert self.division is not None
        whole = self.division.gather(variable, part, shape, cut=False)
        return self._made(variable, name, whole, shape, part.dtype)


class _All:
    """Holds every name."""

    def __contains__(self, name: object) -> bool:
        return True
