"""Variables that are made once and shared by name: variable_scope and get_variable.

    with variable_scope("conv1", regularizer=l2_regularizer(0.004)):
        weights = get_variable("weights", [5, 5, 3, 64])  # its name is "conv1/weights"

    with variable_scope("conv1", reuse=True):
        same = get_variable("weights", [5, 5, 3, 64])  # the same object

Semantics and errors are those of TensorFlow 1.15. Names have no ":0".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np

from distopt.backend import Array, Device
from distopt.regularizers import Regularizer, no_regularizer
from distopt.scopes.graph import (
    Graph,
    GraphKeys,
    check_name,
    get_collection,
    get_default_graph,
)
from distopt.scopes.sharing import AUTO_REUSE, ReuseMode, Shape, make_or_share
from distopt.variables import Variable

__all__ = [
    "VariableScope",
    "get_local_variable",
    "get_variable",
    "get_variable_scope",
    "variable_scope",
]


class VariableScope:
    """A prefix for names, and defaults for the variables made under it.

    Attributes:
        name: full name, "" at the top.
        original_name_scope: the name scope that was opened with it, with a "/" at its end.
        reuse: False, True or AUTO_REUSE.
        initializer: default of `get_variable`, as are regularizer, constraint and dtype.
        regularizer: default of `get_variable`.
        constraint: default of `get_variable`.
        dtype: default of `get_variable`.
    """

    def __init__(
        self,
        reuse: ReuseMode = False,
        name: str = "",
        initializer: Any = None,
        regularizer: Regularizer | None = None,
        constraint: Callable[[Array], Array] | None = None,
        dtype: Any = np.float32,
        original_name_scope: str = "",
    ) -> None:
        self.reuse = reuse
        self.name = name
        self.initializer = initializer
        self.regularizer = regularizer
        self.constraint = constraint
        self.dtype = dtype
        self.original_name_scope = original_name_scope

    def reuse_variables(self) -> None:
        """From here to the end of the block that opened this scope, variables are reused."""
        self.reuse = True

    def set_initializer(self, initializer: Any) -> None:
        """Set the default initializer."""
        self.initializer = initializer

    def set_regularizer(self, regularizer: Regularizer | None) -> None:
        """Set the default regularizer."""
        self.regularizer = regularizer

    def global_variables(self) -> list[Variable]:
        """Return the variables whose names begin with this scope's."""
        return get_collection(GraphKeys.GLOBAL_VARIABLES, self.name)

    def trainable_variables(self) -> list[Variable]:
        """Return the trainable variables whose names begin with this scope's."""
        return get_collection(GraphKeys.TRAINABLE_VARIABLES, self.name)

    def get_variable(
        self,
        name: str,
        shape: Shape = None,
        dtype: Any = None,
        initializer: Any = None,
        regularizer: Regularizer | None = None,
        trainable: bool | None = None,
        collections: Iterable[str] | None = None,
        *,
        constraint: Callable[[Array], Array] | None = None,
        reuse: ReuseMode | None = None,
        device: Device | None = None,
    ) -> Variable:
        """Make or return a variable under this scope; see the function `get_variable`."""
        check_name(name)
        return make_or_share(
            f"{self.name}/{name}" if self.name else name,
            shape,
            dtype,
            self.initializer if initializer is None else initializer,
            default_dtype=self.dtype,
            regularizer=self.regularizer if regularizer is None else regularizer,
            trainable=True if trainable is None else trainable,
            collections=collections,
            constraint=self.constraint if constraint is None else constraint,
            reuse=self.reuse if reuse is None else reuse,
            device=device,
        )


def get_variable_scope() -> VariableScope:
    """Return the variable scope in force in the default graph."""
    graph = get_default_graph()
    if graph.variable_scope is None:
        graph.variable_scope = VariableScope()
    scope: VariableScope = graph.variable_scope
    return scope


def get_variable(
    name: str,
    shape: Shape = None,
    dtype: Any = None,
    initializer: Any = None,
    regularizer: Regularizer | None = None,
    trainable: bool | None = None,
    collections: Iterable[str] | None = None,
    *,
    constraint: Callable[[Array], Array] | None = None,
    reuse: ReuseMode | None = None,
    device: Device | None = None,
) -> Variable:
    """Make a variable under the scope in force, or return the one of that name.

    Arguments that are None are taken from the scope. A new variable is added to the collections,
    and if it has a regularizer a `RegularizationLoss` is added to REGULARIZATION_LOSSES; on reuse
    neither happens again.

    Args:
        name: name within the scope.
        shape: shape, or a length for a vector; None with an initial value, and to reuse whatever
            shape there is.
        dtype: NumPy dtype; float32 where no scope says otherwise.
        initializer: an `Initializer`, which gets the full name and the graph's seed; another
            callable (shape, dtype=...) -> array, or without a shape () -> array; or the value
            itself. The default is `GlorotUniform` for floating-point numbers, and zeros for
            integers and booleans.
        regularizer: penalty on the value; `no_regularizer` for none at all.
        trainable: whether it belongs in TRAINABLE_VARIABLES; None is True.
        collections: which to add it to, instead of GLOBAL_VARIABLES. TRAINABLE_VARIABLES is added.
        constraint: callable array -> array, applied after each update.
        reuse: False, True or AUTO_REUSE; None for the scope's.
        device: where the value lives; the current device when not given.

    Raises:
        ValueError: it exists and may not be reused, or is to be reused and is missing or has
            another shape or dtype; the shape is missing or not complete, or is given beside a
            value; the name can't be one.
        TypeError: `regularizer` is no `Regularizer`, or a random initializer is to make integers.
    """
    return get_variable_scope().get_variable(
        name,
        shape,
        dtype,
        initializer,
        regularizer,
        trainable,
        collections,
        constraint=constraint,
        reuse=reuse,
        device=device,
    )


def get_local_variable(
    name: str,
    shape: Shape = None,
    dtype: Any = None,
    initializer: Any = None,
    collections: Iterable[str] | None = None,
    *,
    reuse: ReuseMode | None = None,
    device: Device | None = None,
) -> Variable:
    """Make or return a variable that belongs to one rank: it is not trained, and in LOCAL_VARIABLES only.

    Args and errors are those of `get_variable`.
    """
    return get_variable(
        name,
        shape,
        dtype,
        initializer,
        no_regularizer,
        trainable=False,
        collections=[GraphKeys.LOCAL_VARIABLES] if collections is None else collections,
        reuse=reuse,
        device=device,
    )


@contextlib.contextmanager
def variable_scope(
    name_or_scope: str | VariableScope | None,
    default_name: str | None = None,
    values: Any = None,
    *,
    initializer: Any = None,
    regularizer: Regularizer | None = None,
    constraint: Callable[[Array], Array] | None = None,
    reuse: ReuseMode | None = None,
    dtype: Any = None,
) -> Generator[VariableScope, None, None]:
    """Open a scope: a prefix for the names of variables, and defaults for them.

    A string opens a scope within the one in force and inherits its defaults and its reuse, which
    can't be switched off inside. A `VariableScope` opens that scope wherever one is, with its own
    defaults and reuse. Either way a name scope is opened too, which gets a number on the second
    time (names of `get_variable` don't).

    Args:
        name_or_scope: name within the scope in force, or a scope; None to use `default_name`.
        default_name: name made unique within the scope in force by "_1", "_2" ...
        values: for code written for TensorFlow, which checks that these Tensors are of one graph.
        initializer: default of `get_variable`; None inherits.
        regularizer: default of `get_variable`; None inherits, `no_regularizer` is none.
        constraint: default of `get_variable`; None inherits.
        reuse: True to reuse variables, AUTO_REUSE to make the missing ones; None or False inherits.
        dtype: default of `get_variable`; None inherits.

    Yields:
        The scope. It ends with the block, but may be opened again.

    Raises:
        TypeError: both names are None, or `name_or_scope` is neither a string nor a scope.
        ValueError: reuse with a `default_name` only, `reuse` is none of the four, or the name can't
            be one.
    """
    del values
    graph, outer = get_default_graph(), get_variable_scope()
    if reuse not in (None, False, True, AUTO_REUSE):
        raise ValueError(f"reuse must be True, False, None or AUTO_REUSE, got {reuse!r}.")
    if name_or_scope is None:
        if default_name is None:
            raise TypeError("a variable_scope without a name needs a default_name; got None for both.")
        if reuse:
            raise ValueError(
                f"reuse=True cannot be used without a name_or_scope: default_name {default_name!r} is made "
                f"unique, so there is nothing to reuse under it (reuse is {reuse})."
            )
        name_or_scope, opens = _unique_scope_name(graph, outer, default_name), default_name
    else:
        opens = name_or_scope  # the name scope makes its own name unique
    if isinstance(name_or_scope, VariableScope):
        base, name = name_or_scope, name_or_scope.name
    elif isinstance(name_or_scope, str):
        if name_or_scope:
            check_name(name_or_scope)
        base, name = outer, "/".join(part for part in (outer.name, name_or_scope) if part)
    else:
        raise TypeError(f"variable_scope takes a string or a VariableScope, got {name_or_scope!r}.")
    counts = _count_opening(graph, name)
    with _opened_name_scope(graph, opens) as original_name_scope:
        graph.variable_scope = VariableScope(
            reuse or base.reuse,
            name,
            base.initializer if initializer is None else initializer,
            base.regularizer if regularizer is None else regularizer,
            base.constraint if constraint is None else constraint,
            base.dtype if dtype is None else dtype,
            original_name_scope,
        )
        try:
            yield graph.variable_scope
        finally:
            graph.variable_scope = outer
            if isinstance(name_or_scope, VariableScope):
                graph.variable_scope_counts = counts
            else:
                _forget_openings_below(graph, name)


def _unique_scope_name(graph: Graph, outer: VariableScope, name: str) -> str:
    full = f"{outer.name}/{name}" if outer.name else name
    if not graph.variable_scope_counts.get(full):
        return name
    number = 1
    while graph.variable_scope_counts.get(f"{full}_{number}"):
        number += 1
    return f"{name}_{number}"


def _count_opening(graph: Graph, name: str) -> dict[str, int]:
    """Count that a scope is opened; return a copy of the counts, to restore when it is left."""
    counts = graph.variable_scope_counts
    counts[name] = counts.get(name, 0) + 1
    return dict(counts)


def _forget_openings_below(graph: Graph, name: str) -> None:
    """Let default names under a scope start anew when it is opened again: they are shared."""
    counts = graph.variable_scope_counts
    for key in [key for key in counts if key.startswith(f"{name}/")]:
        del counts[key]


@contextlib.contextmanager
def _opened_name_scope(graph: Graph, name_or_scope: str | VariableScope) -> Generator[str, None, None]:
    """Open the name scope that belongs to a variable scope; yield its original name scope."""
    is_scope = isinstance(name_or_scope, VariableScope)
    name = name_or_scope.name.rpartition("/")[2] if is_scope else name_or_scope
    if not name:  # the top is no name scope
        yield name_or_scope.original_name_scope if is_scope else ""
        return
    with graph.open_name_scope(name) as opened:
        yield name_or_scope.original_name_scope if is_scope else opened
