"""The hooks of `tf.train.Optimizer`, for optimizers that were written for TensorFlow 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distopt.backend import Array
from distopt.optimizers import optimizer as engine
from distopt.optimizers.updates import ApplyState
from distopt.scopes.variable_scopes import get_variable_scope
from distopt.variables import IndexedSlices, Variable

__all__ = ["Hooks", "in_scope"]

_IN_FORCE = {
    "_resource_apply_dense": ("_apply_dense", "_resource_apply_dense"),
    "_resource_apply_sparse": ("_apply_sparse", "_resource_apply_sparse"),
    "_resource_apply_sparse_duplicate_indices": (
        "_apply_sparse_duplicate_indices",
        "_resource_apply_sparse_duplicate_indices",
    ),
}
"""The hook that the engine asks for -> those that may stand for it. Of one class the first counts, which is
that for the variables that TensorFlow 1 made by default."""


class Hooks(engine.Optimizer):
    """The hooks of `tf.train.Optimizer`; a subclass overrides those that it needs.

    An update calls `_create_slots(var_list)`, `_prepare()`, then for each variable `_apply_dense(grad, var)`
    or `_resource_apply_dense(grad, var)`, and for `IndexedSlices` `_apply_sparse(grad, var)` or
    `_resource_apply_sparse(grad, var, indices)`, then `_finish(update_ops, name_scope)`. Where a class has no
    hook for a gradient, its rule is applied. Gradients are arrays; there are no operations, so the hooks
    change variables at once (`assign`, `assign_sub`, `var.value[...]`), and may return anything.
    """

    _update_ops: Sequence[Any] = ()
    _non_slots: dict[str, Variable] | None = None

    # What a subclass overrides.

    def _prepare(self) -> None:  # type: ignore[override]  # Keras' hook of this name is given variables
        """Get ready for an update, such as by reading the learning rate; a hook, called once before each."""

    def _apply_dense(self, grad: Array, var: Variable) -> Any:
        """Update a variable by a dense gradient of its shape; a hook. Here: by the rule.

        Raises:
            NotImplementedError: the class has no rule.
        """
        return super()._resource_apply_dense(grad, var)

    def _apply_sparse(self, grad: IndexedSlices, var: Variable) -> Any:
        """Update rows of a variable by slices that have each index once; a hook. Here: by the rule.

        Raises:
            NotImplementedError: the class has no rule.
        """
        return super()._resource_apply_sparse(grad.values, var, grad.indices)

    def _apply_sparse_duplicate_indices(self, grad: IndexedSlices, var: Variable) -> Any:
        """Sum rows of the same index, then call `_apply_sparse`; a hook."""
        return self._apply_sparse(grad.deduplicated(by_appearance=True), var)

    def _finish(self, update_ops: list[Any], name_scope: str) -> Any:
        """Do what comes after all variables are updated; a hook.

        Args:
            update_ops: what the hooks for the variables returned, in order.
            name_scope: the optimizer's name.
        """

    # What the hooks use.

    def _zeros_slot(self, var: Variable, slot_name: str, op_name: str) -> Variable:
        """Return a slot; make it of zeros if there is none.

        Args:
            var: which it belongs to.
            slot_name: for `get_slot`.
            op_name: what its name as a variable gets after the variable's; usually the optimizer's name.
        """
        return self._get_or_make_slot_with_initializer(var, 0.0, None, None, slot_name, op_name)

    def _get_or_make_slot(self, var: Variable, val: Any, slot_name: str, op_name: str) -> Variable:
        """Return a slot; make it from `val`, with its shape and dtype, if there is none."""
        initial = var.device.asarray(val.value if isinstance(val, Variable) else val)
        return self._get_or_make_slot_with_initializer(
            var, initial, initial.shape, getattr(val, "dtype", var.dtype), slot_name, op_name
        )

    def _get_or_make_slot_with_initializer(
        self, var: Variable, initializer: Any, shape: Any, dtype: Any, slot_name: str, op_name: str
    ) -> Variable:
        """Return a slot; make it if there is none.

        Args:
            var: which it belongs to.
            initializer: number, array, or callable (shape, dtype=...) -> array.
            shape: the variable's when None.
            dtype: the variable's when None.
            slot_name: for `get_slot`.
            op_name: as for `_zeros_slot`.
        """
        found = self._slots.find(var, slot_name)
        if found is None:
            full = self._slot_name(var, op_name)
            found = self._slots.add(var, slot_name, initializer, full, shape, dtype)
            self._weights.append(found)
        return found

    def _create_non_slot_variable(
        self, initial_value: Any, name: str, colocate_with: Variable | None = None
    ) -> Variable:
        """Return a weight that belongs to no variable, such as a power of beta; make it if there is none.

        Args:
            initial_value: number or array.
            name: its name.
            colocate_with: where TensorFlow places it; here it is on the host.
        """
        del colocate_with
        if self._non_slots is None:
            self._non_slots = {}
        if name not in self._non_slots:
            shape, dtype = getattr(initial_value, "shape", ()), getattr(initial_value, "dtype", None)
            self._non_slots[name] = self.add_weight(name, shape, dtype, initial_value)
        return self._non_slots[name]

    def _get_non_slot_variable(self, name: str, graph: Any = None) -> Variable | None:
        """Return what `_create_non_slot_variable` made, None if there is none; `graph` says nothing."""
        del graph
        return (self._non_slots or {}).get(name)

    def _call_if_callable(self, param: Any) -> Any:
        """Return what a hyperparameter gives if it is a callable, else itself."""
        return param() if callable(param) else param

    def _slot_variable_name(self, variable: Variable, slot_name: str) -> str:
        del slot_name
        return self._slot_name(variable, self._name)

    def _slot_name(self, variable: Variable, op_name: str) -> str:
        # TensorFlow takes the optimizer's name, not the slot's, and numbers what repeats.
        slots = [self._slots.find(variable, name) for name in self._slots.names]
        taken = {slot.name for slot in slots if slot is not None}
        wanted = full = in_scope(f"{variable.name}/{op_name}")
        number = 0
        while full in taken:
            number += 1
            full = f"{wanted}_{number}"
        return full

    # How the engine finds them.

    def _create_all_weights(self, var_list: Sequence[Variable]) -> None:
        _ = self.iterations
        if var_list:  # ported hooks look at the first
            self._create_slots(var_list)

    def _apply_state(self, var_list: Sequence[Variable]) -> ApplyState:
        self._update_ops = []
        self._prepare()
        return super()._prepare(var_list)

    def _overrides(self, name: str) -> bool:
        return self._in_force(name) is not None

    def _in_force(self, name: str) -> str | None:
        """Return which of the hooks that may stand for the engine's the nearest class has, None for none."""
        own = set(Hooks.__mro__)
        for cls in type(self).__mro__:
            for hook in _IN_FORCE[name]:
                if cls not in own and hook in vars(cls):
                    return hook
        return None

    def _call_hook(self, hook: Any, apply_state: ApplyState, *arguments: Any) -> Any:
        gradient, variable, *indices = arguments
        if not indices:
            if self._in_force("_resource_apply_dense") == "_apply_dense":
                result = self._apply_dense(gradient, variable)
            else:
                result = super()._call_hook(hook, apply_state, *arguments)
        elif self._takes_slices():
            slices = IndexedSlices(gradient, indices[0], variable.shape)
            result = self._apply_sparse_duplicate_indices(slices, variable)
        else:
            result = super()._call_hook(hook, apply_state, *arguments)
        self._update_ops = [*self._update_ops, result]
        return result

    def _takes_slices(self) -> bool:
        found = self._in_force("_resource_apply_sparse") or self._in_force(
            "_resource_apply_sparse_duplicate_indices"
        )
        return found in ("_apply_sparse", "_apply_sparse_duplicate_indices")

    def finish(self) -> None:
        """Call the hook `_finish`."""
        super().finish()
        self._finish(list(self._update_ops), self._name)
        self._update_ops = ()


def in_scope(name: str) -> str:
    """Return a name under the variable scope in force, where TensorFlow 1 makes slots and weights."""
    scope = get_variable_scope().name
    return f"{scope}/{name}" if scope else name
