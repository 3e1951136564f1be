"""What an optimizer keeps between steps: the count of updates, slots, and other weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, Device
from distopt.optimizers.counter import StepCounter
from distopt.optimizers.slots import Slots
from distopt.variables import Variable

__all__ = ["State"]

_INITIALIZERS = {"zeros": 0.0, "ones": 1.0}


class State:
    """The count of updates, slots and other weights of one optimizer; base of `Updates`.

    Args:
        name: the optimizer's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._iterations: Variable | None = None
        self._weights: list[Variable] = []
        self._slots = Slots()

    @property
    def step(self) -> int:
        """How many updates are done, as a number."""
        return 0 if self._iterations is None else int(self._iterations.value)

    def get_name(self) -> str:
        """Return the optimizer's name."""
        return self._name

    @property
    def iterations(self) -> Variable:
        """How many times gradients have been applied: an int64 variable that reads like an integer.

        A number or an integer variable can be set before the first use; later, `iterations.assign(n)`
        sets it.

        Raises:
            RuntimeError: set after it was created.
        """
        if self._iterations is None:
            self._iterations = StepCounter(name=f"{self._name}/iter")
            self._weights.insert(0, self._iterations)
        return self._iterations

    @iterations.setter
    def iterations(self, value: int | Variable) -> None:
        if self._iterations is not None:
            raise RuntimeError(
                "Cannot set `iterations` to a new Variable after the Optimizer weights have been created. "
                f"Use iterations.assign({value!s}) to change its value."
            )
        counter = value if isinstance(value, Variable) else StepCounter(value, f"{self._name}/iter")
        if counter.dtype.kind not in "iu" or counter.shape:
            raise ValueError(f"iterations must be an integer variable without axes, got {counter!r}")
        self._iterations = counter
        self._weights.insert(0, counter)

    @property
    def weights(self) -> list[Variable]:
        """`iterations`, then everything else that is kept between steps, in the order of its creation.

        Of slots that are divided among ranks: what this rank has of each.
        """
        return list(self._weights)

    @property
    def is_divided(self) -> bool:
        """Whether slots are divided among ranks, so that `state` and the like are collective."""
        self._divide()
        return self._slots.division is not None

    def slot_bytes(self) -> int:
        """Return how much memory the slots take on this rank, padding included."""
        return self._slots.nbytes()

    def variables(self) -> list[Variable]:
        """Return `weights`."""
        return self.weights

    def get_weights(self) -> list[Array]:
        """Return NumPy copies of `weights`, whole; collective where slots are divided among ranks."""
        slots = self._divided_slots()
        return [
            self._slots.whole(*slots[id(weight)]) if id(weight) in slots else weight.numpy()
            for weight in self.weights
        ]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Set `weights` from arrays, in the order of `get_weights`; this rank's part of divided ones.

        Raises:
            ValueError: the number of arrays or a shape is another.
        """
        own = self.weights
        if len(weights) != len(own):
            raise ValueError(
                f"You called `set_weights(weights)` on optimizer {self._name} with a weight list of length "
                f"{len(weights)}, but the optimizer was expecting {len(own)} weights. Slots are created by "
                "the first update; apply gradients once before."
            )
        slots = self._divided_slots()
        for weight, array in zip(own, weights, strict=True):
            shape = self._slots.shape(*slots[id(weight)]) if id(weight) in slots else weight.shape
            if shape != np.shape(array):
                raise ValueError(
                    f"Optimizer weight shape {shape} of {weight.name!r} not compatible with provided "
                    f"weight shape {np.shape(array)}."
                )
        for weight, array in zip(own, weights, strict=True):
            if id(weight) in slots:
                self._slots.assign(*slots[id(weight)], array)
            else:
                weight.assign(array)

    def _divided_slots(self) -> dict[int, tuple[Variable, str]]:
        """Return (variable, slot's name) by the id of the slot; empty where nothing is divided."""
        self._divide()
        if self._slots.division is None:
            return {}
        return {id(slot): (variable, name) for variable, name, slot in self._slots.items()}

    def get_slot(self, var: Variable, slot_name: str) -> Variable | None:
        """Return a slot of a variable, which shares memory with the optimizer.

        Raises:
            KeyError: there is no such slot, the variable had no gradient yet, or slots are divided among
                ranks and this one has not all of it.
        """
        slot = self._slots.find(var, slot_name)
        if slot is None:
            raise KeyError(
                f"optimizer {self._name!r} has no slot {slot_name!r} for variable {var.name!r}: it has "
                f"{self.get_slot_names()} for variables that have had a gradient"
            )
        self._check_whole(var, slot_name)
        return slot

    def _check_whole(self, variable: Variable, slot_name: str) -> None:
        if self._slots.is_partial(variable, slot_name):
            raise KeyError(
                f"slot {slot_name!r} of variable {variable.name!r} is divided among the ranks, and this one "
                f"has not all of it. Call {self._name}.state() on all ranks for whole slots, by name."
            )

    def get_slot_names(self) -> list[str]:
        """Return the names of the slots made so far, in the order of their creation."""
        return list(self._slots.names)

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint needs: "variable/slot" -> array, "iterations", other weights by name.

        Slots are whole; collective where they are divided among ranks (`is_divided`), so that what is saved
        doesn't depend on how many ranks there were.

        Raises:
            ValueError: two variables have the same name.
        """
        _check_names({variable for variable, _, _ in self._slots.items()})
        found = {
            f"{variable.name}/{name}": self._slots.whole(variable, name)
            for variable, name, _ in self._slots.items()
        }
        found["iterations"] = np.array(self.step, np.int64)
        return {**found, **{name: weight.numpy() for name, weight in self._other_weights().items()}}

    def load_state(self, state: Mapping[str, Array], variables: Iterable[Variable]) -> None:
        """Restore what `state` gave, for variables of the same names; on all ranks alike.

        Where slots are divided among ranks, each keeps its part.

        Raises:
            ValueError: a slot or "iterations" is missing or of another shape, there are slots of other
                variables, or two variables have the same name.
        """
        variables = list(variables)
        _check_names(variables)
        left = dict(state)
        if "iterations" not in left:
            raise ValueError(f"the saved state has no 'iterations'; it has {sorted(left)[:5]}")
        iterations = np.int64(left.pop("iterations"))
        known = {variable.name: variable for variable in variables}
        owners = dict.fromkeys(key.rpartition("/")[0] for key in left if "/" in key)
        mine = [known[name] for name in owners if name in known]
        self._create_all_weights(mine)
        slots = {f"{v.name}/{name}": (v, name) for v, name, _ in self._slots.items() if v.name in owners}
        others = self._other_weights()
        places = {key: self._slots.shape(*slot) for key, slot in slots.items()}
        places |= {key: weight.shape for key, weight in others.items()}
        if strange := sorted(left.keys() - places.keys()):
            raise ValueError(
                f"the saved slots {strange[:5]} belong to none of the model's variables or to "
                f"another optimizer; this one has slots {self.get_slot_names()}"
            )
        for name, shape in places.items():
            if name not in left or np.shape(left[name]) != shape:
                found = np.shape(left[name]) if name in left else "nothing"
                raise ValueError(f"slot {name!r} should have shape {shape}, found {found}")
        for name, slot in slots.items():
            if name not in others:
                self._slots.assign(*slot, left[name])
        for name, weight in others.items():
            weight.assign(left[name])
        self.iterations.assign(iterations)

    def _other_weights(self) -> dict[str, Variable]:
        """Return what is neither `iterations` nor a slot, by its name in `state`."""
        slots = {id(slot) for _, _, slot in self._slots.items()}
        others = [w for w in self._weights if w is not self._iterations and id(w) not in slots]
        return {weight.name: weight for weight in others}

    def add_weight(
        self, name: str, shape: Sequence[int] = (), dtype: Any = None, initializer: Any = "zeros"
    ) -> Variable:
        """Make a weight that belongs to no variable, on the host; Keras' name.

        Args:
            name: its name.
            shape: its shape.
            dtype: float32 when None.
            initializer: number, array, "zeros", "ones", or callable (shape, dtype=...) -> array.
        """
        initial = _initial(initializer)
        dtype = np.dtype(np.float32 if dtype is None else dtype)
        value = initial(tuple(shape), dtype=dtype) if callable(initial) else initial
        weight = Variable(
            np.broadcast_to(np.asarray(value, dtype), tuple(shape)),
            trainable=False,
            name=name,
            device=Device("cpu"),  # the step's scalars are made of it; a GPU would have to be waited for
        )
        self._weights.append(weight)
        return weight

    def add_slot(
        self, var: Variable, slot_name: str, initializer: Any = "zeros", shape: Sequence[int] | None = None
    ) -> Variable:
        """Make a slot of a variable, or return the one there is.

        Args:
            var: the variable.
            slot_name: name of the slot.
            initializer: number, array, "zeros", "ones", or callable (shape, dtype=...) -> array.
            shape: the variable's when None.
        """
        found = self._slots.find(var, slot_name)
        if found is not None:
            return found
        self._divide()
        full_name = self._slot_variable_name(var, slot_name)
        slot = self._slots.add(var, slot_name, _initial(initializer), full_name, shape)
        self._weights.append(slot)
        return slot

    def _slot_variable_name(self, variable: Variable, slot_name: str) -> str:
        return f"{self._name}/{variable.name}/{slot_name}"

    def _create_all_weights(self, var_list: Sequence[Variable]) -> None:
        _ = self.iterations
        self._create_slots(var_list)

    def _create_slots(self, var_list: Sequence[Variable]) -> None:
        """Make the slots of variables that have none; a hook of Keras, called before every update."""

    def _divide(self) -> None:
        """Divide the slots among ranks, where that is wanted and not done yet; on all ranks alike."""


def _check_names(variables: Iterable[Variable]) -> None:
    seen: set[str] = set()
    for variable in variables:
        if variable.name in seen:
            raise ValueError(
                f"two variables are named {variable.name!r}: their slots can't be told apart in a saved "
                "state. Give each variable a name of its own."
            )
        seen.add(variable.name)


def _initial(initializer: Any) -> Any:
    if isinstance(initializer, str):
        if initializer not in _INITIALIZERS:
            raise ValueError(
                f"initializer must be a number, array, callable, 'zeros' or 'ones', got {initializer!r}"
            )
        return _INITIALIZERS[initializer]
    return initializer
