"""The moving average as one elementwise rule, and TensorFlow's functions that apply it to one variable."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from distopt.backend import Array, Device, device_of, namespace
from distopt.elementwise import DTYPES, elementwise
from distopt.scopes.graph import GraphKeys, add_to_collections
from distopt.variables import Operand, Variable, number_now

__all__ = [
    "WeightedMovingAverage",
    "ZeroDebias",
    "assign_moving_average",
    "moving_average",
    "update_average",
    "weighted_moving_average",
]


@elementwise
def moving_average(average: Any, value: Any, *, rate: float) -> Any:
    """Moving average: a -= rate * (a - v), with rate = 1 - decay."""
    average = average - rate * (average - value)
    return average  # noqa: RET504  (the name tells what is updated)


def update_average(average: Array, value: Array, rate: float) -> None:
    """Move an average towards a value, in place: `average -= rate * (average - value)`.

    Half precision is computed in float32 and rounded once.

    Args:
        average: floating-point array of any shape. Modified.
        value: array of the same shape.
        rate: how far to go, 1 is all the way.
    """
    if value.dtype != average.dtype:
        value = value.astype(average.dtype)
    if average.dtype.name not in DTYPES:  # bfloat16
        average[...] = moving_average.function(
            average.astype(np.float32), value.astype(np.float32), rate=np.float32(rate)
        ).astype(average.dtype)
    elif average.flags.c_contiguous:
        moving_average(average, value, rate=rate)
    else:
        xp = namespace(average)
        moved = xp.ascontiguousarray(average)
        moving_average(moved, xp.ascontiguousarray(value), rate=rate)
        average[...] = moved


class ZeroDebias:
    """A moving average that starts at 0, and what it takes to correct it for that.

    After its k-th update the average is divided by `1 - decay ** k`, with the decay of that update: without
    it the first averages would be drawn towards 0. Kingma and Ba, "Adam", 2014, section 3,
    https://arxiv.org/abs/1412.6980.

    Args:
        like: array of the shape, dtype and device of the average.
        name: of the average; its state is called "name/biased" and "name/local_step".

    Attributes:
        biased: the average before the correction; a Variable.
        local_step: how many updates there were; a Variable on the host, where it is read.
    """

    def __init__(self, like: Array, name: str) -> None:
        zeros = namespace(like).zeros(like.shape, like.dtype)
        device = device_of(like)
        self.biased = Variable(zeros, trainable=False, name=f"{name}/biased", device=device)
        self.local_step = Variable(np.int64(0), trainable=False, name=f"{name}/local_step", device=Device())

    def variables(self) -> list[Variable]:
        """Return the state."""
        return [self.biased, self.local_step]

    def update(self, value: Array, decay: float) -> Array:
        """Take a value in; return the corrected average. A decay of 1 keeps 0, and gives the value back."""
        update_average(self.biased.value, value, 1.0 - decay)
        self.local_step.assign_add(1)
        correction = 1.0 - decay ** int(self.local_step.numpy())
        return self.biased.value / correction if correction else value


_corrections: weakref.WeakKeyDictionary[Variable, ZeroDebias] = weakref.WeakKeyDictionary()
"""What `assign_moving_average` keeps of a variable; in TensorFlow two more variables of its scope."""


def assign_moving_average(
    variable: Variable, value: Any, decay: Any, zero_debias: bool = True, name: str | None = None
) -> Variable:
    """Move a variable towards a value: `variable -= (1 - decay) * (variable - value)`.

    With `zero_debias`, which is the default here and not in `ExponentialMovingAverage`, the average is
    kept beside the variable, starts at 0 whatever the variable's value is, and the variable is set to
    the corrected average: after the first call to the first value. That state is two variables in the
    collection GLOBAL_VARIABLES, "<variable>/biased" and "<variable>/local_step".

    Args:
        variable: of floating-point type. Modified.
        value: number, array or Tensor of the variable's shape.
        decay: number, Variable or callable without arguments, in [0, 1].
        zero_debias: whether to correct for the start at 0.
        name: without meaning here; for code from TensorFlow, where it names an operation.

    Returns:
        The variable.

    Raises:
        TypeError: the variable is no Variable, or not of floating-point type.
        ValueError: the value has another shape, or the decay is not in [0, 1].
    """
    if not isinstance(variable, Variable):
        raise TypeError(f"a moving average is assigned to a Variable, got {type(variable).__name__}.")
    if variable.dtype.kind not in "fV":  # "V" is what ml_dtypes' bfloat16 shows
        raise TypeError(
            f"The variables must be half, float, or double: {variable.name!r} has dtype {variable.dtype}."
        )
    rate = check_decay(number_now(decay))
    array = variable.device.asarray(_array(value), variable.dtype)
    if array.shape != variable.shape:
        raise ValueError(
            f"the value to average into {variable.name!r} has shape {array.shape}, the variable has "
            f"{variable.shape}."
        )
    if not zero_debias:
        update_average(variable.value, array, 1.0 - rate)
        return variable
    correction = _corrections.get(variable)
    if correction is None:
        correction = _corrections[variable] = ZeroDebias(variable.value, variable.name)
        for part in correction.variables():
            add_to_collections([GraphKeys.GLOBAL_VARIABLES], part)
    variable.value[...] = correction.update(array, rate)
    return variable


class WeightedMovingAverage:
    """A moving average in which each value has a weight: the average of value * weight over that of weight.

    Both averages start at 0, which the division takes out again. Calling it takes the present value and
    weight in, and returns the average.

    Args:
        value: number, array, Variable, or a callable without arguments that gives one.
        decay: number, Variable or callable without arguments, in [0, 1].
        weight: like `value`; not negative, and broadcast to it.
        collections: names of the collections that the two averages go into; None for GLOBAL_VARIABLES.
        name: of the two averages, "WeightedMovingAvg" when not given.
    """

    def __init__(
        self,
        value: Any,
        decay: Any,
        weight: Any,
        collections: Iterable[str] | None = None,
        name: str | None = None,
    ) -> None:
        self._value, self._decay, self._weight = value, decay, weight
        self._collections = [GraphKeys.GLOBAL_VARIABLES] if collections is None else list(collections)
        self._name = name or "WeightedMovingAvg"
        self._averages: list[Variable] = []

    def variables(self) -> list[Variable]:
        """Return the averages of value * weight and of weight; none before the first call."""
        return list(self._averages)

    def __call__(self) -> Array:
        """Take the present value and weight in; return the weighted average, an array.

        It is NaN as long as all weights were 0.

        Raises:
            ValueError: the decay is not in [0, 1], or a shape changed.
        """
        value, weight = _array(self._value), _array(self._weight)
        decay = check_decay(number_now(self._decay))
        product = namespace(value, weight).asarray(value * weight)
        if not self._averages:
            for array, part in ((product, "value_x_weight"), (weight, "weight")):
                zeros = namespace(array).zeros(array.shape, array.dtype)
                variable = Variable(
                    zeros, trainable=False, name=f"{self._name}/{part}", device=device_of(array)
                )
                add_to_collections(self._collections, variable)
                self._averages.append(variable)
        numerator, denominator = self._averages
        assign_moving_average(numerator, product, decay, zero_debias=False)
        assign_moving_average(denominator, weight, decay, zero_debias=False)
        with np.errstate(invalid="ignore"):
            return namespace(product).asarray(numerator.value / denominator.value)  # type: ignore[no-any-return]


def weighted_moving_average(
    value: Any,
    decay: Any,
    weight: Any,
    truediv: bool = True,
    collections: Iterable[str] | None = None,
    name: str | None = None,
) -> WeightedMovingAverage:
    """Return a `WeightedMovingAverage`: a callable, where TensorFlow returns a tensor to be run many times.

        >>> seen = iter([(3.0, 4.0), (11.0, 22.0)])
        >>> now = [0.0, 0.0]
        >>> average = weighted_moving_average(lambda: now[0], 0.5, lambda: now[1])
        >>> for now[:] in seen:
        ...     print(round(float(average()), 4))
        3.0
        10.3333

    Args:
        value: see `WeightedMovingAverage`, as for those that follow.
        decay: see there.
        weight: see there.
        truediv: without meaning here; for code from TensorFlow, where it matters to integers.
        collections: see there.
        name: see there.
    """
    return WeightedMovingAverage(value, decay, weight, collections, name)


def check_decay(decay: float) -> float:
    """Return a decay.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], got {decay}. 0.999 to 0.9999 is usual.")
    return decay


def _array(value: Any) -> Array:
    """Return the present value as an array; Python numbers become float32."""
    given: Any = value() if callable(value) else value
    given = given.value if isinstance(given, Operand) else given
    return given if hasattr(given, "dtype") else np.asarray(given, np.float32)
