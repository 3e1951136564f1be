"""How an optimizer changes variables: its rule over runs, rows or layers.

`Updates` is the half of `Optimizer` that knows arrays. Code ported from Keras overrides its hooks
`_create_slots`, `_resource_apply_dense`, `_resource_apply_sparse` and `_prepare_local`; a class with a
`rule` needs none of them.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from distopt.aggregators import Ownership, Pair
from distopt.aggregators.ownership import Unit
from distopt.backend import Array, namespace
from distopt.elementwise import Rule
from distopt.optimizers.recording import check_floating, without_repeats
from distopt.optimizers.scalars import Scalars
from distopt.optimizers.slots import arena_runs, elements_of
from distopt.optimizers.state import State
from distopt.variables import IndexedSlices, Variable, dense_gradient, value_of

__all__ = ["ApplyState", "Sparse", "Updates"]

Sparse: TypeAlias = Literal["rows", "all", "hybrid"]
"""What a sparse gradient updates. "rows": those listed, of the variable and its slots (TensorFlow calls it
lazy). "all": everything, as the dense gradient with zeros would. "hybrid": all of the slots, but of the
variable the listed rows only."""

ApplyState: TypeAlias = dict[tuple[Any, Any], dict[str, Any]]
"""(device, dtype) -> name -> value: what Keras' hooks get as `apply_state`."""


_BY_VARIABLE = ("_apply_runs", "_apply_one", "update_rows")
"""Methods that may look at a whole variable where a subclass overrides them."""
_HOOKS = ("_resource_apply_dense", "_resource_apply_sparse", "_resource_apply_sparse_duplicate_indices")


class Updates(State, abc.ABC):
    """Slots, weights, and the application of global gradients.

    Attributes:
        rule: the formula: value, gradient, and one array for each entry of `slots`; its scalars are given by
            `scalars`, its static options by `options`.
        slots: name -> initial value, or the name of the attribute that holds it. One for each array
            of the rule after value and gradient, in their order; those that the rule does not use
            with its options are not made.
        sparse: see `Sparse`.
        layerwise: whether the rule needs each variable by itself, as for norms of layers.
    """

    rule: Rule | None = None
    slots: Mapping[str, float | str] = {}
    sparse: Sparse = "rows"
    layerwise: ClassVar[bool] = False
    _extra_slots: ClassVar[tuple[str, ...]] = ()  # others that are divided among ranks as `slots` are
    _slots_variable_by_variable: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._values: dict[str, float] | None = None
        self._used: list[str] | None = None
        self._with_slots: set[Variable] = set()
        self._settled: dict[str, Any] | None = None
        self._undivided: Ownership | None = None

    # What subclasses with a rule say.

    def options(self) -> dict[str, Any]:
        """Return the rule's static options; by default the attributes of their names."""
        return {name: bool(getattr(self, name)) for name in self._own_rule().options}

    def settled_options(self) -> dict[str, Any]:
        """Return `options` as they were at the first update: which slots there are depends on them."""
        if self._settled is None:
            self._settled = self.options()
        return self._settled

    def scalars(self, values: Mapping[str, float], step: int) -> dict[str, Any]:
        """Return the rule's scalars; by default the hyperparameters of their names.

        Args:
            values: every hyperparameter's value in this step, rounded to the type that the rule computes
                in, so that corrections such as `1 - beta ** step` fit what the rule does.
            step: how many updates are done.
        """
        del step
        return {name: values[name] for name in self._own_rule().scalars}

    def group(self, variable: Variable) -> Hashable:
        """Return what decides about a variable's scalars; variables of equal groups are updated at once."""
        del variable
        return None

    def grouped(self, scalars: dict[str, float], group: Hashable) -> dict[str, float]:
        """Return the scalars of a group of variables."""
        del group
        return scalars

    def update(
        self,
        value: Array,
        gradient: Array,
        slots: Sequence[Array | None],
        scalars: Mapping[str, float],
        variable: Variable | None,
    ) -> None:
        """Apply the rule to flat arrays in place.

        Args:
            value: [n].
            gradient: [n], not to be changed.
            slots: [n] each, None for those that aren't used.
            scalars: of the variable's group.
            variable: whose arrays they are; None where they are of several variables.
        """
        del variable
        settings: dict[str, Any] = {**scalars, **self.settled_options()}
        self._own_rule()(value, gradient, *slots, **settings)

    def finish(self) -> None:
        """Do what comes after all variables are updated, before `iterations` grows; a hook."""

    # Slots that the rule uses.

    def _create_slots(self, var_list: Sequence[Variable]) -> None:
        """Make the slots of variables that have none; a hook of Keras, called before every update."""
        new = [variable for variable in var_list if variable not in self._with_slots]
        if not new:
            return
        self._with_slots.update(new)
        names = self._used_slots()
        if self._slots_variable_by_variable:
            order = [(variable, name) for variable in new for name in names]
        else:
            order = [(variable, name) for name in names for variable in new]
        for variable, name in order:
            initial = self.slots[name]
            self.add_slot(variable, name, getattr(self, initial) if isinstance(initial, str) else initial)

    def _used_slots(self) -> list[str]:
        if self._used is None:
            used = self.rule.uses(**self.settled_options()) if self.rule is not None else ()
            arrays = () if self.rule is None else self.rule.arrays[2 : 2 + len(self.slots)]
            self._used = [name for name, array in zip(self.slots, arrays, strict=True) if array in used]
        return self._used

    # Slots that are divided among ranks.

    def _ownership(self) -> Ownership | None:
        """Return who shares the slots, None for nobody."""
        return None

    def _unit(self) -> Unit | None:
        """Return what of the slots can be given to one rank: elements, variables, or None for nothing."""
        if any(self._overrides(hook) for hook in _HOOKS) or not self._used_slots():
            return None
        own = any(getattr(type(self), name) is not getattr(Updates, name) for name in _BY_VARIABLE)
        return "variables" if self.layerwise or own else "elements"

    def _divide(self) -> None:
        ownership = self._ownership()
        division = self._slots.division
        if ownership is None or ownership is self._undivided:
            return
        if division is not None:
            if division.ownership is not ownership:
                raise RuntimeError(
                    f"the slots of optimizer {self._name!r} are divided by another aggregator than the one "
                    "it has now. To change it, take state(), make an optimizer with the new one, and "
                    "load_state() there."
                )
            return
        unit = self._unit()
        if unit is None:
            self._undivided = ownership
            hooks = any(self._overrides(hook) for hook in _HOOKS)
            reason = "it updates by hooks, which may use any slot" if hooks else "it has no slots to divide"
            ownership.warn(f"optimizer {self._name!r} keeps all of its state on every rank: {reason}")
            return
        names = None if unit == "variables" else {*self.slots, *self._extra_slots}
        self._slots.divide(ownership.divide(unit), names)

    def _share_values(self, variables: Sequence[Variable]) -> None:
        """Let all ranks have what each has updated; collective where slots are divided."""
        if self._slots.division is not None:
            self._slots.division.share_values(variables)

    # Applying gradients.

    def apply(self, pairs: Sequence[Pair], values: Mapping[str, float] | None = None) -> None:
        """Update slots and variables by global gradients: the only place where variables change.

        Collective where slots are divided among ranks (`is_divided`).

        Args:
            pairs: (gradient, variable), none of the gradients None.
            values: every hyperparameter's value in this step; read now when None.
        """
        self._values = dict(self._read_hyperparameters() if values is None else values)
        try:
            self._apply(pairs, self._values)
        finally:
            self._values = None
        self.iterations.value[...] += 1

    def _apply(self, pairs: Sequence[Pair], values: Mapping[str, float]) -> None:
        checked = [(self._checked(gradient, variable), variable) for gradient, variable in pairs]
        variables = list({id(variable): variable for _, variable in checked}.values())
        self._divide()
        self._slots.follow(variables)
        self._create_all_weights(variables)
        apply_state = self._apply_state(variables)
        scalars = Scalars(self, values)
        for variable in variables:
            variable.version += 1
        for group in without_repeats(checked):
            own = [pair for pair in group if self._slots.holds(pair[1])]
            dense = [pair for pair in own if not isinstance(pair[0], IndexedSlices)]
            if self._overrides("_resource_apply_dense"):
                for gradient, variable in dense:
                    self._call_hook(self._resource_apply_dense, apply_state, gradient, variable)
            else:
                self._apply_runs(dense, scalars)
            for gradient, variable in own if len(dense) < len(own) else ():
                if isinstance(gradient, IndexedSlices):
                    with variable.device.activate():
                        self._apply_slices(gradient, variable, scalars, apply_state)
            self._share_values([variable for _, variable in group])
            for gradient, variable in group:
                if variable.constraint is not None and not isinstance(gradient, IndexedSlices):
                    _constrain(variable)
        self.finish()

    def _checked(self, gradient: Any, variable: Variable) -> Any:
        """Return a gradient as an array or slices that fit the variable; nothing has changed yet."""
        check_floating(f"variable {variable.name!r}", variable)
        gradient = value_of(gradient)
        if not isinstance(gradient, IndexedSlices):
            return gradient if gradient is variable.gradient else dense_gradient(gradient, variable)
        if variable.constraint is not None:
            raise RuntimeError(
                f"Cannot use a constraint function on a sparse variable: {variable.name!r} has "
                "a constraint and an IndexedSlices gradient"
            )
        if gradient.values.shape[1:] != variable.shape[1:] or not variable.ndim:
            raise ValueError(
                f"the gradient of variable {variable.name!r} has rows of shape "
                f"{gradient.values.shape[1:]}, the variable has {variable.shape[1:]}"
            )
        values = dense_gradient(gradient.values, variable, gradient.values.shape)
        return IndexedSlices(values, variable.device.asarray(gradient.indices), variable.shape)

    def _apply_runs(self, pairs: Sequence[Pair], scalars: Scalars) -> None:
        names = self._used_slots()
        if not self.layerwise:
            for run in self._slots.own_runs(arena_runs(pairs, self.group)):
                found = self._in_order(names, self._slots.of_run(run, names))
                own = scalars.of(run.slab.dtype, run.group)
                with run.variables[0].device.activate():
                    self.update(run.values, run.gradients, found, own, None)
        for gradient, variable in pairs:
            if self.layerwise or variable.slab is None:
                self._apply_one(gradient, variable, scalars)

    def _apply_one(self, gradient: Array, variable: Variable, scalars: Scalars) -> None:
        names = self._used_slots()
        own = scalars.of(variable.dtype, self.group(variable))
        with variable.device.activate():
            if not variable.value.flags.c_contiguous:  # one that was put there by hand
                variable.value = namespace(variable.value).ascontiguousarray(variable.value)
            flat, value = (
                namespace(gradient).ascontiguousarray(gradient).reshape(-1),
                variable.value.reshape(-1),
            )
            for part, found in self._slots.pieces(variable, names):
                self.update(value[part], flat[part], self._in_order(names, found), own, variable)

    def _in_order(self, names: Sequence[str], arrays: Sequence[Array]) -> list[Array | None]:
        """Return an array or None for each entry of `slots`."""
        found = dict(zip(names, arrays, strict=True))
        return [found.get(name) for name in self.slots]

    def _apply_slices(
        self, gradient: IndexedSlices, variable: Variable, scalars: Scalars, apply_state: ApplyState
    ) -> None:
        if self._overrides("_resource_apply_sparse") or self._overrides(
            "_resource_apply_sparse_duplicate_indices"
        ):
            duplicates = self._resource_apply_sparse_duplicate_indices
            self._call_hook(duplicates, apply_state, gradient.values, variable, gradient.indices)
        elif self.sparse == "rows":
            self.update_rows(
                gradient.deduplicated(), variable, scalars.of(variable.dtype, self.group(variable))
            )
        else:
            before = variable.value.copy() if self.sparse == "hybrid" else None
            self._apply_one(gradient.to_dense(), variable, scalars)
            if before is not None:
                moved = variable.value[gradient.indices]
                variable.value[...] = before
                variable.value[gradient.indices] = moved

    def update_rows(self, gradient: IndexedSlices, variable: Variable, scalars: Mapping[str, float]) -> None:
        """Apply the rule to the listed rows of a variable and its slots.

        Args:
            gradient: every index once.
            variable: what to update.
            scalars: of the variable's group.
        """
        names = self._used_slots()
        settings: dict[str, Any] = {**scalars, **self.settled_options()}
        rule = self._own_rule()
        with variable.device.activate():
            if not any(self._slots.is_partial(variable, name) for name in names):
                found = self._in_order(names, self._slots.of_variable(variable, names))
                rule.rows(gradient.indices, variable.value, gradient.values, *found, **settings)
                return
            value = variable.value.reshape(-1)
            for part, slots in self._slots.pieces(variable, names):
                places, values = elements_of(gradient, variable, part)
                rule.rows(places, value[part], values, *self._in_order(names, slots), **settings)

    def _apply_state(self, var_list: Sequence[Variable]) -> ApplyState:
        """Return what the hooks get; called when all gradients are checked and nothing has changed yet."""
        return self._prepare(var_list)

    # Keras' hooks.

    def _prepare(self, var_list: Sequence[Variable]) -> ApplyState:
        """Return Keras' `apply_state`; empty where no hook is there to read it. A hook of Keras."""
        state: ApplyState = {}
        if not any(self._overrides(hook) for hook in _HOOKS):
            return state
        for device, dtype in dict.fromkeys((v.device, v.dtype) for v in var_list):
            state[device, dtype] = {}
            self._prepare_local(device, dtype, state)
        return state

    def _prepare_local(self, var_device: Any, var_dtype: Any, apply_state: ApplyState) -> None:
        """Put the step's numbers for a device and dtype into `apply_state`; a hook of Keras."""
        if "learning_rate" in (self._values or {}):
            apply_state[var_device, var_dtype]["lr_t"] = self._decayed_lr(var_dtype)

    def _fallback_apply_state(self, var_device: Any, var_dtype: Any) -> dict[str, Any]:
        """Return what `_prepare_local` puts in for a device and dtype; Keras' name."""
        state: ApplyState = {(var_device, var_dtype): {}}
        self._prepare_local(var_device, var_dtype, state)
        return state[var_device, var_dtype]

    def _decayed_lr(self, var_dtype: Any) -> Any:
        """Return the learning rate of this step, schedule and decay worked in, in a dtype; Keras' name."""
        values = self._read_hyperparameters() if self._values is None else self._values
        return np.dtype(var_dtype).type(values["learning_rate"])

    def _resource_apply_dense(self, grad: Array, var: Variable, apply_state: ApplyState | None = None) -> Any:
        """Update a variable by a dense gradient of its shape; a hook of Keras.

        Args:
            grad: array of the variable's shape.
            var: what to update, with `assign`, `assign_add`, `assign_sub`, or through `var.value`.
            apply_state: passed only to methods that have a parameter of this name.

        Raises:
            NotImplementedError: the class has neither this method nor a rule.
        """
        del apply_state
        self._own_rule()
        self._apply_one(grad, var, Scalars(self, self._values or self._read_hyperparameters()))

    def _resource_apply_sparse(
        self, grad: Array, var: Variable, indices: Array, apply_state: ApplyState | None = None
    ) -> Any:
        """Update rows of a variable; a hook of Keras.

        Args:
            grad: [n, ...], the rows' gradients.
            var: what to update.
            indices: [n], no row twice, in the order of their first appearance.
            apply_state: passed only to methods that have a parameter of this name.

        Raises:
            NotImplementedError: the class has neither this method nor a rule.
        """
        del apply_state
        self._own_rule()
        scalars = Scalars(self, self._values or self._read_hyperparameters())
        own = scalars.of(var.dtype, self.group(var))
        self.update_rows(IndexedSlices(grad, indices, var.shape), var, own)

    def _resource_apply_sparse_duplicate_indices(
        self, grad: Array, var: Variable, indices: Array, **kwargs: Any
    ) -> Any:
        """Sum rows of the same index, then call `_resource_apply_sparse`; a hook of Keras."""
        unique = IndexedSlices(grad, indices).deduplicated(by_appearance=True)
        return self._resource_apply_sparse(unique.values, var, unique.indices, **kwargs)

    def _call_hook(self, hook: Any, apply_state: ApplyState, *arguments: Any) -> Any:
        takes = inspect.signature(
            self._resource_apply_sparse if "sparse" in hook.__name__ else hook
        ).parameters
        return hook(*arguments, **({"apply_state": apply_state} if "apply_state" in takes else {}))

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Updates, name)

    def _own_rule(self) -> Rule:
        if self.rule is None:
            raise NotImplementedError(
                f"{type(self).__name__} has neither a `rule` nor `_resource_apply_dense` and "
                "`_resource_apply_sparse`; a subclass of Optimizer needs one of them"
            )
        return self.rule

    @abc.abstractmethod
    def _read_hyperparameters(self) -> dict[str, float]:
        """Return every hyperparameter's value in this step."""


def _constrain(variable: Variable) -> None:
    assert variable.constraint is not None
    with variable.device.activate():
        value = variable.constraint(variable.value)
        if np.shape(value) != variable.shape:
            raise ValueError(
                f"the constraint of variable {variable.name!r} returned shape {np.shape(value)} for "
                f"{variable.shape}; a constraint gives a value of the same shape"
            )
        variable.value[...] = value
