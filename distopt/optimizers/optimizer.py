"""The base of all optimizers: slots, hyperparameters, and minimize = compute, aggregate, transform, apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distopt import transforms
from distopt.aggregators import Aggregator, GradientAggregator, Pair, Ticket
from distopt.backend import Array
from distopt.elementwise import Rule
from distopt.optimizers.slots import Slots, arena_runs
from distopt.schedules import LearningRateSchedule
from distopt.tape import GradientTape, Tensor
from distopt.variables import IndexedSlices, Variable, dense_gradient

__all__ = ["Optimizer"]


class Optimizer:
    """Applies gradients to variables by one elementwise rule.

    A subclass names its `rule`, its `slots` with their initial values, and gives its hyperparameters to
    this constructor; `scalars` turns them into the rule's numbers.

    Args:
        name: for messages and checkpoints.
        hyperparameters: name -> number, schedule, or callable without arguments. They are attributes of
            the optimizer, to be read and set at any time; `lr` is another name of `learning_rate`.
        gradient_aggregator: combines gradients over replicas: an `Aggregator`, or any callable that
            takes and returns a list of (gradient, variable). None: gradients stay as they are.
        gradient_transformers: callables pairs -> pairs, applied in order to the global gradients,
            after the clips.
        clipnorm: largest L2 norm of each variable's gradient.
        clipvalue: largest absolute value of each element of a gradient.
        global_clipnorm: largest L2 norm of all gradients together.

    Attributes:
        iterations: how many times gradients have been applied.

    Raises:
        ValueError: a hyperparameter or clip that is out of range, or both `clipnorm` and
            `global_clipnorm`.
    """

    rule: ClassVar[Rule]
    slots: ClassVar[Mapping[str, float]] = {}
    # Whether rows without a gradient stay as they are (TensorFlow calls that lazy), or are updated too.
    sparse_rows_only: ClassVar[bool] = True

    def __init__(
        self,
        name: str,
        hyperparameters: Mapping[str, Any],
        *,
        gradient_aggregator: GradientAggregator | None = None,
        gradient_transformers: Sequence[Callable[[list[Pair]], Iterable[Pair]]] | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
    ) -> None:
        if not name:
            raise ValueError("Must specify the optimizer name")
        for callable_wanted in (gradient_aggregator, *(gradient_transformers or ())):
            if callable_wanted is not None and not callable(callable_wanted):
                raise TypeError(
                    "gradient_aggregator and gradient_transformers must be callables, pairs -> pairs; "
                    f"got {callable_wanted!r}"
                )
        self._hyperparameters: dict[str, Any] = {}
        self._name = name
        self.iterations = 0
        self.gradient_aggregator = gradient_aggregator
        self.gradient_transformers = list(gradient_transformers or ())
        self._clips = transforms.clips(clipvalue, clipnorm, global_clipnorm)
        self._slots = Slots(dict(self.slots))
        for key, value in hyperparameters.items():
            self._set(key, value)

    def get_name(self) -> str:
        """Return the optimizer's name."""
        return self._name

    def __getattr__(self, key: str) -> Any:
        # Called only for what is no ordinary attribute.
        own = self.__dict__.get("_hyperparameters", {})
        key = "learning_rate" if key == "lr" else key
        if key in own:
            return own[key]
        raise AttributeError(f"{type(self).__name__} has no attribute or hyperparameter {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        own = self.__dict__.get("_hyperparameters", {})
        key = "learning_rate" if key == "lr" else key
        if key in own:
            self._set(key, value)
        else:
            super().__setattr__(key, value)

    def _set(self, key: str, value: Any) -> None:
        if not callable(value):
            value = float(value)
            self.check(key, value)
        self._hyperparameters[key] = value

    def check(self, key: str, value: float) -> None:
        """Raise ValueError where a hyperparameter is out of range; subclasses extend it."""
        if key == "learning_rate" and not value >= 0:
            raise ValueError(f"learning_rate must not be negative, got {value}")

    def hyperparameter(self, key: str) -> float:
        """Return a hyperparameter's value at this step: schedules and callables are evaluated.

        Raises:
            ValueError: what a schedule or callable gave is out of range.
        """
        given: Any = self._hyperparameters[key]
        if isinstance(given, LearningRateSchedule):
            given = given(self.iterations)
        elif callable(given):
            given = given()
        value = float(given)
        self.check(key, value)
        return value

    def scalars(self) -> dict[str, Any]:
        """Return the rule's scalars and options at this step; by default the hyperparameters themselves."""
        return {key: self.hyperparameter(key) for key in self._hyperparameters}

    def minimize(
        self,
        loss: Any,
        var_list: Sequence[Variable] | None = None,
        grad_loss: Any = None,
        tape: GradientTape | None = None,
        examples: float | None = None,
    ) -> int:
        """Compute the gradients of a loss and apply them; reduction overlaps the backward pass.

        Args:
            loss: callable without arguments that returns the loss, or a Tensor recorded on `tape`. For
                an aggregator that averages by global batch: the sum over this rank's examples.
            var_list: what to train; the trainable variables that the loss used when None.
            grad_loss: upstream gradient of the loss; ones when None.
            tape: the tape that recorded a loss given as a Tensor.
            examples: how many examples this rank's loss is a sum over; for averaging aggregators.

        Returns:
            `iterations` after the update.

        Raises:
            ValueError: no variables, or none has a gradient; a Tensor loss without a tape.
            TypeError: the loss is neither callable nor a Tensor of a floating dtype.
        """
        tape, target, variables = _record(loss, var_list, tape)
        return self.apply_gradients(tape.gradients(target, variables, grad_loss), examples=examples)

    def compute_gradients(
        self,
        loss: Any,
        var_list: Sequence[Variable] | None = None,
        grad_loss: Any = None,
        tape: GradientTape | None = None,
    ) -> list[Pair]:
        """Return [(gradient or None, variable)] in the order of `var_list`: this rank's own gradients.

        Arguments and errors are those of `minimize`. The gradients are arrays of their own: a later step
        doesn't change them.
        """
        tape, target, variables = _record(loss, var_list, tape)
        found = tape.gradient(target, variables, output_gradients=grad_loss)
        return list(zip(found, variables, strict=True))

    def apply_gradients(
        self,
        pairs: Iterable[Pair],
        examples: float | None = None,
        experimental_aggregate_gradients: bool = True,
    ) -> int:
        """Aggregate gradients over replicas, transform them, update the variables, apply constraints.

        In this order: hyperparameters are read; the aggregator runs; variables without a gradient on any
        replica are left out; clipvalue, clipnorm, global_clipnorm and the transformers see the global
        gradients; slots and variables are updated; constraints are applied; `iterations` grows by one.

        Args:
            pairs: (gradient, variable). A gradient is an array or number of the variable's shape, an
                `IndexedSlices`, or None. On every rank the same variables in the same order.
            examples: how many examples this rank's gradients are sums over.
            experimental_aggregate_gradients: False skips the aggregator; transformers still run.

        Returns:
            `iterations`, after the update.

        Raises:
            ValueError: no variable has a gradient, or a shape differs from its variable's.
            TypeError: a pair is no pair, or a gradient is no array.
            RuntimeError: a variable with a constraint has a sparse gradient.
        """
        scalars = self.scalars()
        if experimental_aggregate_gradients:
            given = self.aggregate(pairs, None if examples is None else Ticket(examples=examples))
        else:
            given = list(pairs)
        if not given:
            return self.iterations
        self.apply(self.transform(_with_gradient(given)), scalars)
        return self.iterations

    def aggregate(self, pairs: Iterable[Pair], ticket: Ticket | None) -> list[Pair]:
        """Return the gradients combined over replicas by the `gradient_aggregator`. Collective."""
        if self.gradient_aggregator is None:
            return list(pairs)
        if isinstance(self.gradient_aggregator, Aggregator):
            return self.gradient_aggregator.reduce(pairs, ticket)
        return list(self.gradient_aggregator(list(pairs)))

    def transform(self, pairs: list[Pair]) -> list[Pair]:
        """Return the gradients clipped, and put through the transformers."""
        for transformer in (*self._clips, *self.gradient_transformers):
            pairs = list(transformer(pairs))
        return pairs

    def apply(self, pairs: list[Pair], scalars: Mapping[str, Any] | None = None) -> None:
        """Update slots and variables by global gradients: the only place where variables change."""
        scalars = self.scalars() if scalars is None else scalars
        for group in _without_repeats(pairs):
            dense = [(g, v) for g, v in group if not isinstance(g, IndexedSlices)]
            for run in arena_runs(dense):
                self._update(run.values, run.gradients, self._slots.of_run(run), scalars)
            for gradient, variable in dense:
                if variable.slab is None:
                    array = dense_gradient(gradient, variable).reshape(-1)
                    slots = [slot.reshape(-1) for slot in self._slots.of_variable(variable)]
                    self._update(variable.value.reshape(-1), array, slots, scalars)
            for gradient, variable in group:
                if isinstance(gradient, IndexedSlices):
                    self._update_rows(gradient, variable, scalars)
            for _, variable in dense:
                if variable.constraint is not None:
                    variable.value[...] = variable.constraint(variable.value)
        self.iterations += 1

    def _update(
        self, values: Array, gradients: Array, slots: list[Array], scalars: Mapping[str, Any]
    ) -> None:
        type(self).rule(values, gradients, *slots, **scalars)

    def _update_rows(self, gradient: IndexedSlices, variable: Variable, scalars: Mapping[str, Any]) -> None:
        if variable.constraint is not None:
            raise RuntimeError(
                f"Cannot use a constraint function on a sparse variable: {variable.name!r} has "
                "a constraint and an IndexedSlices gradient"
            )
        if gradient.values.shape[1:] != variable.shape[1:]:
            raise ValueError(
                f"the gradient of variable {variable.name!r} has rows of shape "
                f"{gradient.values.shape[1:]}, the variable has {variable.shape[1:]}"
            )
        slots = self._slots.of_variable(variable)
        if self.sparse_rows_only:
            unique = gradient.deduplicated()
            type(self).rule.rows(unique.indices, variable.value, unique.values, *slots, **scalars)
        else:
            dense = IndexedSlices(gradient.values, gradient.indices, variable.shape).to_dense()
            flat = [slot.reshape(-1) for slot in slots]
            self._update(variable.value.reshape(-1), dense.reshape(-1), flat, scalars)

    def get_slot(self, variable: Variable, name: str) -> Variable:
        """Return a slot of a variable, which shares memory with the optimizer.

        Raises:
            KeyError: the optimizer has no such slot, or the variable had no gradient yet.
        """
        return self._slots.get(variable, name, self._name)

    def get_slot_names(self) -> list[str]:
        """Return the names of the slots, in the order of their creation."""
        return list(self.slots)

    def variables(self) -> list[Variable]:
        """Return all slots that exist, slot by slot, in the order of the variables' first updates."""
        return self._slots.all(self._name)

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint needs: "variable/slot" -> array, and "iterations"."""
        found = {f"{name}/{slot}": array for name, slot, array in self._slots.items()}
        return {**found, "iterations": np.array(self.iterations, np.int64)}

    def load_state(self, state: Mapping[str, Array], variables: Iterable[Variable]) -> None:
        """Restore what `state` gave, for variables of the same names.

        Raises:
            ValueError: a slot is missing or of another shape, or there are slots of other variables.
        """
        left = dict(state)
        self.iterations = int(left.pop("iterations"))
        self._slots.load(left, list(variables))


def _record(
    loss: Any, var_list: Sequence[Variable] | None, tape: GradientTape | None
) -> tuple[GradientTape, Tensor, list[Variable]]:
    if callable(loss):
        with tape or GradientTape() as recording:
            if var_list is not None:
                recording.watch(list(var_list))
            target = loss()
    elif isinstance(loss, Tensor):
        if tape is None:
            raise ValueError("a loss given as a Tensor needs `tape=`, the tape that recorded it")
        recording, target = tape, loss
    else:
        raise TypeError(f"loss must be callable or a Tensor recorded on a tape, got {type(loss).__name__}")
    if not isinstance(target, Tensor) or target.dtype.kind not in "fV":
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"Invalid type {kind} for the loss, expected a Tensor of a floating dtype")
    if var_list is None:
        var_list = [v for v in recording.watched_variables() if v.trainable]
    if not var_list:
        raise ValueError("No variables to optimize.")
    return recording, target, list(var_list)


def _with_gradient(pairs: list[Pair]) -> list[Pair]:
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"expected pairs of (gradient, variable), got {pair!r}")
        if not isinstance(pair[1], Variable):
            raise TypeError(f"gradients are applied to Variables, got {type(pair[1]).__name__}")
    kept = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
    if not kept:
        names = ", ".join(repr(variable.name) for _, variable in pairs)
        raise ValueError(
            f"No gradients provided for any variable: {names}. The loss does not depend on them, or was "
            "computed outside the tape."
        )
    return kept


def _without_repeats(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Split pairs so that no group has a variable twice: repeated updates apply one after another."""
    group: list[Pair] = []
    seen: set[int] = set()
    for gradient, variable in pairs:
        if id(variable) in seen:
            yield group
            group, seen = [], set()
        group.append((gradient, variable))
        seen.add(id(variable))
    yield group
