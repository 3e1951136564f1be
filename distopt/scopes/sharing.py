"""Variables of a graph: made once and shared by name, or made each with a name of its own.

Semantics and errors are those of TensorFlow 1.15. Names have no ":0".
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from distopt.backend import Array, Device
from distopt.initializers import GlorotUniform, Initializer, Zeros
from distopt.regularizers import Regularizer, no_regularizer
from distopt.scopes.graph import (
    Graph,
    GraphKeys,
    add_to_collections,
    check_name,
    get_collection,
    get_default_graph,
)
from distopt.variables import Operand, Variable

__all__ = [
    "AUTO_REUSE",
    "RegularizationLoss",
    "Reuse",
    "ReuseMode",
    "Shape",
    "get_regularization_losses",
    "make_or_share",
    "new_variable",
]


class Reuse(enum.Enum):
    """The third way beside reuse=True and reuse=False."""

    AUTO_REUSE = 1


AUTO_REUSE = Reuse.AUTO_REUSE
"""Make variables that are missing and return those that are there."""

ReuseMode: TypeAlias = bool | Literal[Reuse.AUTO_REUSE]
Shape: TypeAlias = int | Sequence[int | None] | None


@dataclass(frozen=True, eq=False)
class RegularizationLoss:
    """That a variable is to be penalised, as kept in the collection REGULARIZATION_LOSSES.

    Attributes:
        regularizer: gives the penalty and its gradient.
        variable: what is penalised.
    """

    regularizer: Regularizer
    variable: Variable

    @property
    def name(self) -> str:
        """The variable's name and "/Regularizer", by which collections are filtered."""
        return f"{self.variable.name}/Regularizer"

    def numpy(self) -> float:
        """Return the penalty on the variable's present value (waits for the GPU)."""
        return float(self.regularizer.loss(self.variable.value))


def make_or_share(
    name: str,
    shape: Shape,
    dtype: Any,
    initializer: Any,
    *,
    default_dtype: Any,
    regularizer: Regularizer | None,
    trainable: bool,
    collections: Iterable[str] | None,
    constraint: Callable[[Array], Array] | None,
    reuse: ReuseMode,
    device: Device | None,
) -> Variable:
    """Make the variable of a full name in the default graph, or return it.

    This is `get_variable` after a scope has filled in what was left to it; see there for the
    arguments and errors.
    """
    graph = get_default_graph()
    _check_initializer(name, shape, dtype, initializer)
    dimensions = _dimensions(shape)
    dtype = _wanted_dtype(dtype, initializer, default_dtype)
    if name in graph.shared:
        if reuse is False and not graph.is_remade(name):
            raise ValueError(
                f"Variable {name} already exists, disallowed. Did you mean to set reuse=True or "
                "reuse=AUTO_REUSE in the variable_scope?"
            )
        if reuse is False:
            _check_maker(graph, name)
        _check_shared(graph.variables[name], dimensions, dtype)
        if graph.is_remade(name):
            graph.claim_name(name)
        graph.note_variable(name, made=False)
        return graph.variables[name]
    if reuse is True:
        raise ValueError(
            f"Variable {name} does not exist, or was not created with get_variable(). "
            "Did you mean to set reuse=AUTO_REUSE in the variable_scope?"
        )
    if name in graph.variables:
        raise ValueError(
            f"the name {name!r} belongs to a variable that was not created with get_variable(). "
            "Give one of the two another name."
        )
    _check_regularizer(name, regularizer)
    variable = Variable(
        _initial_value(graph, name, dimensions, dtype, initializer),
        trainable=trainable,
        name=name,
        dtype=dtype,
        constraint=constraint,
        device=device,
    )
    graph.claim_name(name)
    graph.variables[name] = variable
    graph.shared.add(name)
    graph.note_variable(name, made=True)
    _collect(variable, collections)
    if regularizer is not None and regularizer is not no_regularizer:
        loss = RegularizationLoss(regularizer, variable)
        graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, loss, lasting=True)
    return variable


def new_variable(
    initial_value: Any,
    trainable: bool = True,
    collections: Iterable[str] | None = None,
    name: str | None = None,
    *,
    dtype: Any = None,
    constraint: Callable[[Array], Array] | None = None,
    device: Device | None = None,
) -> Variable:
    """Make a variable that is not shared, as TensorFlow 1's `tf.Variable(...)` does.

    Its name gets the name scope as prefix, and a number where it was used before ("Variable",
    "Variable_1"); it is added to the collections like one of `get_variable`, which won't return it.

    Within `Graph.step` the code that makes it runs again in every step; from the second step on it gets
    the variable of the first, with its present value.

    Args:
        initial_value: number, array-like, or a callable without arguments that returns one.
        trainable: whether it belongs in TRAINABLE_VARIABLES.
        collections: which to add it to, instead of GLOBAL_VARIABLES. TRAINABLE_VARIABLES is added.
        name: name within the name scope.
        dtype: NumPy dtype; None keeps that of the value.
        constraint: callable array -> array, applied after each update.
        device: where the value lives; the current device when not given.

    Raises:
        ValueError: the name can't be one, or an earlier step made it with another shape.
    """
    graph = get_default_graph()
    name = name or "Variable"
    check_name(name)
    full = graph.unique_name(name)
    if graph.is_remade(full):
        return _made_before(graph, full, initial_value)
    variable = Variable(
        initial_value,
        trainable=trainable,
        name=full,
        dtype=dtype,
        constraint=constraint,
        device=device,
    )
    graph.variables[full] = variable
    graph.note_variable(full, made=True)
    _collect(variable, collections)
    return variable


def _made_before(graph: Graph, name: str, initial_value: Any) -> Variable:
    """Return the variable that an earlier step made where this one would make it again."""
    _check_maker(graph, name)
    variable = graph.variables[name]
    graph.note_variable(name, made=False)
    known = initial_value is not None and (isinstance(initial_value, Operand) or not callable(initial_value))
    if known and _shape_of(initial_value) != variable.shape:
        raise ValueError(
            f"an earlier step made variable {name!r} with shape {variable.shape}; this one has an initial "
            f"value of shape {_shape_of(initial_value)}. Give variables that differ names of their own."
        )
    return variable


def _check_maker(graph: Graph, name: str) -> None:
    """Raise ValueError where a part of a step would make a variable again that another part made."""
    maker = graph.makers.get(name)
    part = None if graph.open_step is None else graph.open_step.part
    if maker is not None and part is not None and maker.code != part.code:
        raise ValueError(
            f"Variable {name} already exists, disallowed: the training step {maker.name!r} made it, and "
            f"{part.name!r}, which has another loss, makes one of the same name. Give the layers of the two "
            "names of their own (or a variable_scope around each), or say that they are shared, with "
            "reuse=AUTO_REUSE in the variable_scope."
        )


def _shape_of(value: Any) -> tuple[int, ...]:
    return np.shape(value.value if isinstance(value, Operand) else value)


def get_regularization_losses(scope: str | None = None) -> list[RegularizationLoss]:
    """Return what is to be penalised: the records of regularizers given to variables.

    Tensors that `layers.apply_regularization` added to the collection are not among them.

    Args:
        scope: only variables whose names begin with a match of this regular expression.
    """
    found = get_collection(GraphKeys.REGULARIZATION_LOSSES, scope)
    return [loss for loss in found if isinstance(loss, RegularizationLoss)]


def _dimensions(shape: Shape) -> tuple[int | None, ...] | None:
    if shape is None:
        return None
    if isinstance(shape, (int, np.integer)):
        return (int(shape),)
    return tuple(None if length is None else int(length) for length in shape)


def _check_initializer(name: str, shape: Shape, dtype: Any, initializer: Any) -> None:
    if initializer is None or callable(initializer):
        return
    if shape is not None:
        raise ValueError(
            f"if the initializer of {name!r} is a constant, do not specify a shape "
            f"(got {shape}): the value has its own. Use initializers.Constant for a shape."
        )
    own = getattr(initializer, "dtype", None)
    if dtype is not None and own is not None and np.dtype(dtype) != own:
        raise ValueError(
            f"the initial value of {name!r} has dtype {own}, and the explicit dtype "
            f"{np.dtype(dtype)} doesn't match. Leave dtype out, or convert the value."
        )


def _wanted_dtype(dtype: Any, initializer: Any, default: Any) -> np.dtype[Any]:
    if dtype is not None:
        return np.dtype(dtype)
    if initializer is not None and not callable(initializer):
        # What Variable makes of it: a Python number becomes float32, an array keeps its dtype.
        return Variable(initializer, device=Device()).dtype
    return np.dtype(default)


def _check_shared(variable: Variable, shape: tuple[int | None, ...] | None, dtype: np.dtype[Any]) -> None:
    """Raise ValueError if a variable that is to be shared isn't what was asked for."""
    if shape is not None and not _fits(shape, variable.shape):
        raise ValueError(
            f"Trying to share variable {variable.name}, but specified shape {shape} and found "
            f"shape {variable.shape}."
        )
    if dtype != variable.dtype:
        raise ValueError(
            f"Trying to share variable {variable.name}, but specified dtype {dtype} and found "
            f"dtype {variable.dtype}."
        )


def _fits(shape: tuple[int | None, ...], found: tuple[int, ...]) -> bool:
    return len(shape) == len(found) and all(
        wanted in (None, length) for wanted, length in zip(shape, found, strict=True)
    )


def _initial_value(
    graph: Graph,
    name: str,
    shape: tuple[int | None, ...] | None,
    dtype: np.dtype[Any],
    initializer: Any,
) -> Any:
    if initializer is None:
        # Kind "V" is what ml_dtypes' bfloat16 shows.
        initializer = GlorotUniform() if dtype.kind in "fV" else Zeros()
    if not callable(initializer):
        return initializer
    if isinstance(initializer, type):
        initializer = initializer()
    if shape is None and _takes_no_arguments(initializer):
        return initializer()
    if shape is None or None in shape:
        raise ValueError(f"the shape of a new variable ({name!r}) must be fully defined, but was {shape}.")
    if isinstance(initializer, Initializer):
        complete = tuple(length for length in shape if length is not None)
        return initializer(complete, dtype, name=name, seed=graph.seed)
    value: Any = initializer(list(shape), dtype=dtype)
    if np.shape(value) != shape:
        raise ValueError(
            f"the initializer of {name!r} returned shape {np.shape(value)} where {shape} was asked for."
        )
    return value


def _takes_no_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _collect(variable: Variable, collections: Iterable[str] | None) -> None:
    names = [GraphKeys.GLOBAL_VARIABLES] if collections is None else list(collections)
    if variable.trainable:
        names.append(GraphKeys.TRAINABLE_VARIABLES)
    add_to_collections(names, variable)


def _check_regularizer(name: str, regularizer: Any) -> None:
    if regularizer is not None and not isinstance(regularizer, Regularizer):
        raise TypeError(
            f"the regularizer of {name!r} must be a Regularizer (see distopt.regularizers), "
            f"got {regularizer!r}. It needs a gradient, which a plain function has not."
        )
