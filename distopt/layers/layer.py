"""What a layer is: a function of its input and its variables, which the first call makes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

from distopt import scopes
from distopt.ops.kernels.stages import Stage
from distopt.scopes import Graph, GraphKeys, VariableScope
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["MODEL_COLLECTIONS", "Call", "GetVariable", "Initializer", "Layer", "apply_in_scope"]

Initializer: TypeAlias = Callable[..., Any]
GetVariable: TypeAlias = Callable[..., Variable]

MODEL_COLLECTIONS = (GraphKeys.GLOBAL_VARIABLES, GraphKeys.MODEL_VARIABLES)
"""Where the variables of layers belong; trainable ones are in TRAINABLE_VARIABLES besides."""


class Call(NamedTuple):
    """What a layer is told of a call.

    Attributes:
        name: full name of the layer's variable scope, the same for all towers that share it.
        training: whether this is training (dropout drops, batch normalization takes the batch's moments).
    """

    name: str
    training: bool


class _Built(NamedTuple):
    name: str
    variables: dict[str, Variable]


_names: WeakKeyDictionary[Graph, set[str]] = WeakKeyDictionary()
"""The names of the layer objects of each graph."""


class Layer(abc.ABC):
    """A layer as an object: it makes its variables on its first call and keeps them.

    The functions of `distopt.layers` share variables by the rules of `variable_scope`. An object has
    variables of its own: whoever calls it again uses them again. Called under another `Graph` (another
    replica of the model) it makes a set for that graph.

    A subclass defines `make_variables` and `compute`.

    Args:
        name: of its variable scope; the kind of the layer, made unique by "_1", "_2" ..., when None.
    """

    default_name: ClassVar[str] = "layer"

    def __init__(self, name: str | None = None) -> None:
        self._given_name = name
        self._built: WeakKeyDictionary[Graph, _Built] = WeakKeyDictionary()

    @abc.abstractmethod
    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return the layer's variables by their short names, made with `get` within its scope.

        Args:
            shape: of the input; the lengths of windows' axes may be unknown (those of an earlier layer).
            dtype: of the input.
            get: `get_variable`, or what stands in its place.
        """

    @abc.abstractmethod
    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the result for an input."""

    def stage(self) -> Stage | None:
        """Return what it computes as a stage of a fused chain, if it is one; variables are its parameters."""
        return None

    def __call__(self, x: Any, training: bool = False) -> Tensor:
        """Compute; the first call in a graph makes the variables.

        Args:
            x: the input.
            training: whether dropout drops and batch normalization takes the batch's own moments.

        Raises:
            ValueError: the input doesn't fit; or, on the first call, the layer's name is taken.
        """
        built = self.build(tuple(x.shape), x.dtype)
        with scopes.name_scope(built.name.rpartition("/")[2]):
            return self.compute(x, built.variables, Call(built.name, training))

    def build(self, shape: tuple[int, ...], dtype: Any) -> _Built:
        """Make the variables in the default graph, if they aren't there; return them with their scope's name.

        Raises:
            ValueError: the layer's name is taken by another layer or by variables.
        """
        graph = scopes.get_default_graph()
        built = self._built.get(graph)
        if built is not None:
            return built
        names = _names.setdefault(graph, set())
        outer = scopes.get_variable_scope().name
        prefix = f"{outer}/" if outer else ""
        own = self._given_name or _free_name(graph, names, prefix, self.default_name)
        full = f"{prefix}{own}"
        if _is_taken(graph, names, full):
            raise ValueError(
                f"a layer or variables named {full!r} already exist. Make a layer object once, outside of "
                "the code that a step runs, and call it again to use its variables again; or use the "
                "function instead of the object."
            )
        with scopes.variable_scope(own) as scope:

            def get(name: str, *arguments: Any, **options: Any) -> Variable:
                return scope.get_variable(name, *arguments, **{**options, "reuse": False})

            built = _Built(full, self.make_variables(shape, dtype, get))
        # A later step is not to find them by name: they belong to this object.
        graph.made_in_steps.difference_update(variable.name for variable in built.variables.values())
        names.add(full)
        self._built[graph] = built
        return built

    @property
    def built(self) -> bool:
        """Whether it has been called in the default graph."""
        return scopes.get_default_graph() in self._built

    @property
    def name(self) -> str:
        """Full name of its variable scope; before the first call the name given, or that of its kind."""
        built = self._built.get(scopes.get_default_graph())
        return built.name if built is not None else self._given_name or self.default_name

    @property
    def variables(self) -> list[Variable]:
        """Its variables in the default graph, trainable ones first; empty before the first call."""
        return [*self.trainable_variables, *self.non_trainable_variables]

    @property
    def weights(self) -> list[Variable]:
        """The same as `variables`, by Keras' name."""
        return self.variables

    @property
    def trainable_variables(self) -> list[Variable]:
        """Those of its variables that are trained."""
        return [variable for variable in self._own() if variable.trainable]

    @property
    def non_trainable_variables(self) -> list[Variable]:
        """Those that are not trained, like moving averages."""
        return [variable for variable in self._own() if not variable.trainable]

    def _own(self) -> list[Variable]:
        built = self._built.get(scopes.get_default_graph())
        return [] if built is None else list(built.variables.values())


def apply_in_scope(
    layer: Layer,
    x: Any,
    name: str | VariableScope | None,
    reuse: Any = None,
    training: bool = False,
) -> Tensor:
    """Compute a layer whose variables are shared by the rules of `variable_scope` and `get_variable`.

    Args:
        layer: what to compute.
        x: the input.
        name: of the variable scope; the kind of the layer, made unique, when None.
        reuse: of the variable scope.
        training: see `Layer.__call__`.
    """
    with scopes.variable_scope(name, layer.default_name, reuse=reuse) as scope:
        variables = layer.make_variables(tuple(x.shape), x.dtype, scopes.get_variable)
        return layer.compute(x, variables, Call(scope.name, training))


def _is_taken(graph: Graph, names: set[str], full: str) -> bool:
    return full in names or any(variable.startswith(f"{full}/") for variable in graph.variables)


def _free_name(graph: Graph, names: set[str], prefix: str, name: str) -> str:
    candidate, number = name, 0
    while _is_taken(graph, names, f"{prefix}{candidate}"):
        number += 1
        candidate = f"{name}_{number}"
    return candidate
