"""Slots: an optimizer's own values beside each variable, laid out like the arena where there is one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.aggregators import Pair
from distopt.backend import Array
from distopt.variables import Slab, Variable, dense_gradient

__all__ = ["Run", "Slots", "arena_runs"]


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


class Slots:
    """All slots of one optimizer. A slot is a `Variable`; for an arena's variables it is a view.

    Slots of one name and of the variables of one slab lie in one flat array of the slab's layout, so
    that the optimizer's formula runs over all of them at once.
    """

    def __init__(self) -> None:
        self._slots: dict[Variable, dict[str, Variable]] = {}
        self._slabs: dict[tuple[Slab, str], Array] = {}
        self._placed: set[tuple[Variable, str]] = set()
        self._padding: dict[str, float] = {}
        self._runs: dict[tuple[Slab, int, int], list[Array]] = {}
        self.names: list[str] = []

    def find(self, variable: Variable, name: str) -> Variable | None:
        """Return a slot, None if there is none."""
        return self._slots.get(variable, {}).get(name)

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
        with variable.device.activate():
            slot.value = variable.device.empty(shape, dtype)
            slot.value[...] = variable.device.asarray(initial, dtype)
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
            self._runs[key] = [self._slabs[run.slab, name][run.start : run.stop] for name in names]
        return self._runs[key]

    def of_variable(self, variable: Variable, names: Sequence[str]) -> list[Array]:
        """Return each slot of a variable, in the variable's shape."""
        slots = self._slots[variable] if names else {}
        for name in names:
            self._place(variable, name, slots[name])
        return [slots[name].value for name in names]

    def items(self) -> Iterator[tuple[Variable, str, Variable]]:
        """Yield (variable, slot's name, slot), variable by variable."""
        for variable, slots in self._slots.items():
            for name, slot in slots.items():
                self._place(variable, name, slot)
                yield variable, name, slot

    def _place(self, variable: Variable, name: str, slot: Variable) -> None:
        """Move a slot into the flat array of its variable's slab, where the variable has entered one."""
        slab = variable.slab
        if slab is None or (variable, name) in self._placed:
            return
        if slot.shape != variable.shape or slot.dtype != slab.dtype:
            return  # it has a layout of its own
        if (slab, name) not in self._slabs:
            with variable.device.activate():
                flat = variable.device.empty(slab.values.size, slab.dtype)
                flat.fill(self._padding[name])  # as in the segments, so that the values' padding stays zero
            self._slabs[slab, name] = flat
        flat = self._slabs[slab, name]
        view = flat[variable.start : variable.start + variable.size].reshape(variable.shape)
        view[...] = variable.device.asarray(slot.value)
        slot.value, slot.device = view, variable.device
        self._placed.add((variable, name))
