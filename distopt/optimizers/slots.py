"""Slots: an optimizer's own values beside each variable, laid out like the arena where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from distopt.aggregators import Pair
from distopt.backend import Array, asnumpy
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
    """

    slab: Slab
    start: int
    stop: int
    variables: list[Variable]

    @property
    def values(self) -> Array:
        """The run's part of the slab's values."""
        return self.slab.values[self.start : self.stop]

    @property
    def gradients(self) -> Array:
        """The run's part of the slab's gradients."""
        return self.slab.gradients[self.start : self.stop]


def arena_runs(pairs: Iterable[Pair]) -> list[Run]:
    """Join the segments of arena variables into runs; gradients elsewhere are copied into the arena.

    A model whose variables all have gradients is one run per dtype.
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
        for variable in sorted(variables, key=lambda v: v.start):
            slab = variable.slab
            assert slab is not None
            if last is not None and last.stop == variable.start:
                last.stop = slab.end(variable)
                last.variables.append(variable)
            else:
                last = Run(slab, variable.start, slab.end(variable), [variable])
                runs.append(last)
    return runs


class Slots:
    """All slots of one optimizer.

    Args:
        initial: slot name -> the value that its elements start from.
    """

    def __init__(self, initial: Mapping[str, float]) -> None:
        self._initial = dict(initial)
        self._of_slab: dict[int, tuple[Slab, dict[str, Array]]] = {}
        self._loose: dict[int, dict[str, Array]] = {}
        self._owners: dict[int, Variable] = {}

    def of_run(self, run: Run) -> list[Array]:
        """Return a run's part of each slot, creating the slots of its slab on the first call."""
        for variable in run.variables:
            self._adopt(variable)
        return [array[run.start : run.stop] for array in self._slab_arrays(run.slab).values()]

    def of_variable(self, variable: Variable) -> list[Array]:
        """Return each slot of a variable, in the variable's shape."""
        self._adopt(variable)
        return [self._view(variable, name) for name in self._initial]

    def get(self, variable: Variable, name: str, optimizer: str) -> Variable:
        """Return one slot as a Variable that shares its memory."""
        if name not in self._initial or id(variable) not in self._owners:
            raise KeyError(
                f"optimizer {optimizer!r} has no slot {name!r} for variable {variable.name!r}: it has "
                f"{list(self._initial)} for variables that have had a gradient"
            )
        slot = Variable(0.0, trainable=False, name=f"{optimizer}/{variable.name}/{name}")
        slot.value, slot.device = self._view(variable, name), variable.device
        return slot

    def all(self, optimizer: str) -> list[Variable]:
        """Return every slot, slot-major."""
        return [
            self.get(variable, name, optimizer)
            for name in self._initial
            for variable in self._owners.values()
        ]

    def items(self) -> Iterator[tuple[str, str, Array]]:
        """Yield (variable's name, slot's name, NumPy copy) of every slot."""
        for variable in self._owners.values():
            for name in self._initial:
                yield variable.name, name, np.array(asnumpy(self._view(variable, name)))

    def load(self, state: dict[str, Array], variables: list[Variable]) -> None:
        """Set slots from "variable/slot" -> array; every entry must belong to one of the variables."""
        for variable in variables:
            names = [f"{variable.name}/{slot}" for slot in self._initial]
            if not any(name in state for name in names):
                continue  # it had no gradient yet
            for name, view in zip(names, self.of_variable(variable), strict=True):
                if name not in state or state[name].shape != view.shape:
                    found = state[name].shape if name in state else "nothing"
                    raise ValueError(f"slot {name!r} should have shape {view.shape}, found {found}")
                view[...] = variable.device.asarray(state.pop(name))
        if state:
            raise ValueError(
                f"the saved slots {sorted(state)[:5]} belong to none of the model's variables or to "
                f"another optimizer; this one has slots {list(self._initial)}"
            )

    def _adopt(self, variable: Variable) -> None:
        """Make the variable's slots exist; move them when it has entered an arena since."""
        if id(variable) not in self._owners:
            self._owners[id(variable)] = variable
            if variable.slab is None:
                self._loose[id(variable)] = {
                    name: _filled(variable, variable.size, value).reshape(variable.shape)
                    for name, value in self._initial.items()
                }
        if variable.slab is not None and id(variable) in self._loose:
            for name, array in self._loose.pop(id(variable)).items():
                self._view(variable, name)[...] = array

    def _view(self, variable: Variable, name: str) -> Array:
        if variable.slab is None:
            return self._loose[id(variable)][name]
        flat = self._slab_arrays(variable.slab)[name]
        return flat[variable.start : variable.start + variable.size].reshape(variable.shape)

    def _slab_arrays(self, slab: Slab) -> dict[str, Array]:
        if id(slab) not in self._of_slab:
            first = slab.variables[0]
            arrays = {name: _filled(first, slab.values.size, value) for name, value in self._initial.items()}
            self._of_slab[id(slab)] = slab, arrays
        return self._of_slab[id(slab)][1]


def _filled(variable: Variable, size: int, value: float) -> Array:
    with variable.device.activate():
        array = variable.device.empty(size, variable.dtype)
        array.fill(value)
    return array
