"""From what users call a loss to a tape, a target and the variables to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distopt import ops
from distopt.aggregators import Pair
from distopt.scopes.graph import ensure_step
from distopt.tape import GradientTape, Tensor
from distopt.variables import Operand, Variable, adopted_gradient

__all__ = [
    "NoGradientsError",
    "check_examples",
    "check_floating",
    "check_operands",
    "check_pairs",
    "flattened",
    "record",
    "with_gradient",
    "without_repeats",
]


class NoGradientsError(ValueError):
    """No variable has a gradient.

    Attributes:
        hint: the variables' names, and what may be wrong.
    """

    def __init__(self, variables: Iterable[Variable]) -> None:
        names = ", ".join(repr(variable.name) for variable in variables)
        self.hint = f"{names}. The loss does not depend on them, or was computed outside the tape."
        super().__init__(f"No gradients provided for any variable: {self.hint}")


def record(
    loss: Callable[[], Any] | Tensor,
    var_list: Any,
    tape: GradientTape | None,
) -> tuple[GradientTape, Tensor, list[Variable]]:
    """Compute a loss if it is a callable, and settle which variables to train.

    Args:
        loss: callable without arguments, or a Tensor recorded on `tape`.
        var_list: (nested lists of) variables, which are watched, trainable or not; a callable that
            returns them, called after the loss; None for the trainable ones that the loss used.
        tape: the tape that recorded a loss given as a Tensor.

    Raises:
        TypeError: the loss is neither callable nor a Tensor.
        ValueError: a Tensor without a tape; a loss that isn't of a floating dtype; no variables, or
            something else among them.
    """
    if callable(loss):
        # Model code in the loss finds its variables again, and its collections hold this step's things.
        with ensure_step(), tape or GradientTape() as recording:
            if var_list is not None and not callable(var_list):
                var_list = flattened(var_list)
                check_operands(var_list)
                recording.watch(var_list)
            target = loss()
            if isinstance(target, Variable):  # no operation has read it yet
                target = ops.identity(target)
    elif isinstance(loss, Tensor):
        if tape is None:
            raise ValueError("`tape` is required when a `Tensor` loss is passed: the tape that recorded it")
        recording, target = tape, loss
    else:
        raise TypeError(f"loss must be callable or a Tensor recorded on a tape, got {type(loss).__name__}")
    if callable(var_list):
        var_list = var_list()
    if not isinstance(target, Tensor):
        raise ValueError(f"Invalid type {type(target).__name__} for the loss, expected a floating Tensor")
    check_floating("the loss", target)
    if var_list is None:
        var_list = [v for v in recording.watched_variables() if v.trainable]
    variables = flattened(var_list)
    if not variables:
        raise ValueError("No variables to optimize.")
    check_operands(variables)
    return recording, target, variables


def check_operands(variables: Iterable[Any]) -> None:
    """Raise ValueError for what is neither a Variable nor a Tensor."""
    for variable in variables:
        if not isinstance(variable, Operand):
            raise ValueError(f"`var_list` must hold variables, got {variable!r:.60} among them")


def check_examples(examples: Any) -> None:
    """Raise unless a number of examples, or a sum of their weights, is None or finite and not negative."""
    if examples is None:
        return
    if isinstance(examples, bool | str) or not hasattr(examples, "__float__"):
        raise TypeError(f"examples must be a number, that of this rank's examples; got {examples!r:.60}")
    if not 0 <= float(examples) < math.inf:
        raise ValueError(f"examples must be 0 or more and finite, got {examples}")


def check_floating(what: str, value: Any) -> None:
    """Raise ValueError for an array, Tensor or Variable that is not of a floating dtype."""
    dtype = getattr(value, "dtype", None)
    if dtype is not None and dtype.kind not in "fV":  # "V" is what ml_dtypes' bfloat16 shows
        raise ValueError(f"Invalid type {dtype} for {what}, expected float16, bfloat16, float32 or float64")


def flattened(nested: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples and dictionaries; iterators are read to their end."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    elif isinstance(nested, Iterator):
        nested = list(nested)
    if isinstance(nested, list | tuple):
        return [leaf for item in nested for leaf in flattened(item)]
    return [nested]


def check_pairs(pairs: Iterable[Any]) -> list[Pair]:
    """Return the pairs as a list, gradients of other libraries as arrays of NumPy or CuPy.

    Raises:
        TypeError: something among them is no pair, or its second part is no Variable.
    """
    checked: list[Pair] = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"expected pairs of (gradient, variable), got {pair!r}")
        if not isinstance(pair[1], Variable):
            raise TypeError(f"gradients are applied to Variables, got {type(pair[1]).__name__}")
        checked.append((adopted_gradient(*pair), pair[1]))
    return checked


def with_gradient(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs that have a gradient.

    Raises:
        NoGradientsError: none has.
    """
    kept = [(gradient, variable) for gradient, variable in pairs if gradient is not None]
    if not kept:
        raise NoGradientsError(variable for _, variable in pairs)
    return kept


def without_repeats(pairs: list[Pair]) -> Iterator[list[Pair]]:
    """Split pairs so that no group has a variable twice: repeated updates apply one after another."""
    if len({id(variable) for _, variable in pairs}) == len(pairs):
        yield pairs
        return
    group: list[Pair] = []
    seen: set[int] = set()
    for gradient, variable in pairs:
        if id(variable) in seen:
            yield group
            group, seen = [], set()
        group.append((gradient, variable))
        seen.add(id(variable))
    yield group
