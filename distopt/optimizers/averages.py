"""Moving averages of variables: TensorFlow's ExponentialMovingAverage.

Averaged weights often do better on test data than the last ones: the CIFAR-10 tutorial evaluates
with a decay of 0.9999.

    averages = ExponentialMovingAverage(0.9999, num_updates=lambda: optimizer.iterations)
    averages.track(variables)        # before the first step: averages start at the initial values
    ...                              # after every step:
    averages.apply(variables)
    with averages.averaged_weights():
        evaluate(model)
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, device_of, namespace
from distopt.communicators import Communicator
from distopt.optimizers.moving_averages import ZeroDebias, check_decay, update_average
from distopt.optimizers.slots import arena_runs
from distopt.scopes.graph import (
    GraphKeys,
    add_to_collection,
    get_collection,
    global_variables,
    moving_average_variables,
    trainable_variables,
)
from distopt.variables import Slab, Variable, number_now

__all__ = ["Averaged", "ExponentialMovingAverage"]

Averaged: TypeAlias = Variable | tuple[str, Any]
"""A variable, or (name, value) for a value that is none, for instance the loss of each step."""


class ExponentialMovingAverage:
    """Keep averages that follow values slowly: `average -= (1 - decay) * (average - value)`.

    The average of a variable starts at the value that it has when it is first tracked. That of a
    value given by name starts at 0, and with `zero_debias` it is divided by `1 - decay ** k` after
    its k-th update, so that the first values are not drawn towards 0 (Kingma and Ba, "Adam", 2014,
    section 3, https://arxiv.org/abs/1412.6980).

    Averages of variables in an arena lie in flat arrays of the arena's layout, so that an update of all of
    them is one pass. All ranks hold the same variables and so the same averages; nothing is communicated.
    Named values may differ: give a communicator, and their mean over the ranks is averaged, as TensorFlow
    does in a strategy. (Where ranks have unequal parts of a batch, reduce the values yourself.)

    Differences from TensorFlow: nothing is deferred, so `track` exists to catch the initial values;
    `1 - decay` is exact where TensorFlow rounds it to float32 (0.9999 acts as 0.99989998); a value
    that is no variable goes by a name instead of being a tensor.

    Args:
        decay: between 0 and 1; the average follows over about `1 / (1 - decay)` updates.
        num_updates: if given, the decay in force is `min(decay, (1 + n) / (10 + n))`, which follows
            fast at the beginning; a number, a variable, or a callable without arguments that
            returns one, read at every `apply`.
        zero_debias: whether averages of named values are corrected for their start at 0; averages
            of variables never are.
        name: second part of the averages' names, as in "conv1/weights/ExponentialMovingAverage".
        communicator: over whose ranks named values are averaged; None for this rank's own values. `apply`
            with named values is then collective.

    Raises:
        ValueError: `decay` is not in [0, 1].
    """

    def __init__(
        self,
        decay: float,
        num_updates: Any = None,
        zero_debias: bool = False,
        name: str = "ExponentialMovingAverage",
        communicator: Communicator | None = None,
    ) -> None:
        self.decay = check_decay(decay)
        self.num_updates = num_updates
        self.zero_debias = zero_debias
        self.name = name
        self.communicator = communicator
        self._averages: dict[Variable | str, _Average] = {}
        self._flat: dict[int, tuple[Slab, Array]] = {}

    def track(self, var_list: Iterable[Averaged] | None = None) -> None:
        """Start averages at the present values, for what has none yet; `apply` does it as well.

        Args:
            var_list: variables and (name, value) pairs; None is all trainable variables.

        Raises:
            TypeError: something else is among them, or is not of floating-point type.
            ValueError: there are none.
        """
        for item in self._items(var_list):
            self._average_of(item)

    def apply(self, var_list: Iterable[Averaged] | None = None) -> None:
        """Update the averages by the present values.

        Args:
            var_list: variables and (name, value) pairs; None is all trainable variables.

        Raises:
            TypeError: something else is among them, or is not of floating-point type.
            ValueError: there are none, or a named value has another shape than before.
        """
        items = self._items(var_list)
        decay = self._decay_now()
        for item in items:
            average = self._average_of(item)
            shape = item.shape if isinstance(item, Variable) else np.shape(_value(item))
            if shape != average.shadow.shape:
                raise ValueError(
                    f"the value to average into {average.shadow.name!r} has shape {shape}, "
                    f"but it had {average.shadow.shape} before."
                )
        variables = [item for item in items if isinstance(item, Variable)]
        for run in arena_runs((variable.gradient, variable) for variable in variables):
            average = self._flat_of(run.slab)[run.start : run.stop]
            update_average(average, run.values, 1.0 - decay)
        for item in items:
            if not isinstance(item, Variable):
                self._average_of(item).update(self._mean_over_ranks(_value(item)), decay)
            elif item.slab is None:
                self._average_of(item).update(item.value, decay)

    def average(self, item: Variable | str) -> Variable | None:
        """Return the variable that holds an average, None if there is none.

        Args:
            item: the averaged variable, or the name of an averaged value.
        """
        average = self._averages.get(item)
        return None if average is None else average.shadow

    def average_name(self, item: Variable | str) -> str:
        """Return the name that an average has or would have, as in checkpoints."""
        return f"{item if isinstance(item, str) else item.name}/{self.name}"

    def variables(self) -> list[Variable]:
        """Return all variables that belong to the averages, in the order of their creation."""
        return [variable for average in self._averages.values() for variable in average.state()]

    def variables_to_restore(
        self, moving_avg_variables: Iterable[Variable] | None = None
    ) -> dict[str, Variable]:
        """Return which saved value goes into which variable, to load averages as the weights.

        Args:
            moving_avg_variables: those to load averages into; None is the trainable variables and
                those in the collection MOVING_AVERAGE_VARIABLES.

        Returns:
            The name of the average -> variable for these, and the own name -> variable for all
            other global variables.
        """
        if moving_avg_variables is None:
            moving_avg_variables = [*trainable_variables(), *moving_average_variables()]
        averaged = list(moving_avg_variables)
        restore = {self.average_name(variable): variable for variable in averaged}
        own_names = {variable.name for variable in averaged}
        for variable in global_variables():
            if variable.name not in own_names:
                restore.setdefault(variable.name, variable)
        return restore

    @contextlib.contextmanager
    def averaged_weights(self) -> Generator[None, None, None]:
        """Give the tracked variables their averages within the block, for an evaluation.

        What the block assigns to them is lost when it ends. Takes the memory of one more copy.
        """
        tracked = [(item, average) for item, average in self._averages.items() if isinstance(item, Variable)]
        before = [variable.value.copy() for variable, _ in tracked]
        try:
            for variable, average in tracked:
                variable.value[...] = average.shadow.value
            yield
        finally:
            for (variable, _), value in zip(tracked, before, strict=True):
                variable.value[...] = value

    def _items(self, var_list: Iterable[Averaged] | None) -> list[Averaged]:
        items: list[Averaged] = list(trainable_variables() if var_list is None else var_list)
        if not items:
            raise ValueError(
                "there is nothing to average: the list is empty, or no trainable variable was made "
                "in the default graph. Pass the variables."
            )
        for item in items:
            _check_item(item)
        return items

    def _average_of(self, item: Averaged) -> _Average:
        key = item if isinstance(item, Variable) else item[0]
        average = self._averages.get(key)
        if average is None:
            name = self.average_name(key)
            average = (
                _of_variable(item, name)
                if isinstance(item, Variable)
                else _of_value(item, name, self.zero_debias)
            )
            self._averages[key] = average
            for variable in average.state():
                add_to_collection(GraphKeys.GLOBAL_VARIABLES, variable)
        if isinstance(item, Variable) and item.slab is not None and average.slab is not item.slab:
            self._move(average, item, item.slab)
        return average

    def _move(self, average: _Average, variable: Variable, slab: Slab) -> None:
        """Let the average of a variable in an arena lie where the variable does."""
        part = self._flat_of(slab)[variable.start : variable.start + variable.size]
        view = part.reshape(variable.shape)
        view[...] = variable.device.asarray(average.shadow.value)
        average.shadow.value, average.shadow.device = view, variable.device
        average.slab = slab

    def _flat_of(self, slab: Slab) -> Array:
        """Return the averages of a slab's variables, laid out like its values."""
        if id(slab) not in self._flat:
            device = slab.variables[0].device
            with device.activate():
                flat = device.zeros(slab.values.size, slab.dtype)
            self._flat[id(slab)] = slab, flat
        return self._flat[id(slab)][1]

    def _mean_over_ranks(self, value: Array) -> Array:
        if self.communicator is None or self.communicator.size == 1:
            return value
        total = namespace(value).array(value, order="C").reshape(-1)
        self.communicator.all_reduce(total).wait()
        total /= self.communicator.size
        return total.reshape(value.shape)

    def _decay_now(self) -> float:
        if self.num_updates is None:
            return self.decay
        updates = number_now(self.num_updates)
        return min(self.decay, (1.0 + updates) / (10.0 + updates))


@dataclass(eq=False)
class _Average:
    """One average; in the slab of its variable where that is in one, corrected for its start where asked."""

    shadow: Variable
    correction: ZeroDebias | None = None
    slab: Slab | None = None

    def update(self, value: Array, decay: float) -> None:
        if self.correction is None:
            update_average(self.shadow.value, value, 1.0 - decay)
        else:
            self.shadow.value[...] = self.correction.update(value, decay)

    def state(self) -> list[Variable]:
        return [self.shadow, *(self.correction.variables() if self.correction else ())]


def _of_variable(variable: Variable, name: str) -> _Average:
    if variable not in get_collection(GraphKeys.MOVING_AVERAGE_VARIABLES):
        add_to_collection(GraphKeys.MOVING_AVERAGE_VARIABLES, variable)
    shadow = Variable(variable.value, trainable=False, name=name, device=variable.device)
    return _Average(shadow)


def _of_value(item: tuple[str, Any], name: str, zero_debias: bool) -> _Average:
    value = _value(item)
    zeros = namespace(value).zeros(value.shape, value.dtype)
    shadow = Variable(zeros, trainable=False, name=name, device=device_of(value))
    return _Average(shadow, ZeroDebias(value, name) if zero_debias else None)


def _value(item: tuple[str, Any]) -> Array:
    value = item[1]
    value = value.value if hasattr(value, "value") else value
    return value if hasattr(value, "dtype") else np.asarray(value, np.float32)


def _check_item(item: Any) -> None:
    if isinstance(item, Variable):
        name, dtype = item.name, item.dtype
    elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
        name, dtype = item[0], _value(item).dtype
    else:
        raise TypeError(f"averages are kept of variables and of (name, value) pairs, got {item!r}.")
    # Kind "V" is what ml_dtypes' bfloat16 shows.
    if dtype.kind not in "fV":
        raise TypeError(
            f"The variables must be half, float, or double: {name!r} has dtype {dtype}. "
            "Averages are kept of floating-point values."
        )
