"""Graph: what belongs to one copy of a model: its variables, collections, names and seed.

distopt computes at once and has no graph of operations; the name is TensorFlow's. Every thread
has a default graph of its own, so ranks or replicas that run as threads don't share variables by
accident; several replicas in one thread take a graph each:

    with Graph(seed=0).as_default():
        model(...)

In TensorFlow a model's code runs once and builds a graph, which is then run at every step. Here the code
runs at every step. `with graph.step():` around it makes that look the same: see `Graph.step`.

A graph that several threads are to use needs a lock of theirs.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Generator, Iterable
from typing import Any

from distopt.scopes.collections import Collections
from distopt.scopes.steps import Part, PartStart, Step
from distopt.tape.record import Tensor, naming
from distopt.variables import Variable

__all__ = [
    "Graph",
    "GraphKeys",
    "add_to_collection",
    "add_to_collections",
    "ensure_step",
    "get_collection",
    "get_collection_ref",
    "get_default_graph",
    "get_name_scope",
    "global_variables",
    "local_variables",
    "model_variables",
    "moving_average_variables",
    "name_scope",
    "reset_default_graph",
    "step",
    "trainable_variables",
]


class GraphKeys:
    """Names of the usual collections, with TensorFlow's values."""

    GLOBAL_VARIABLES = "variables"
    LOCAL_VARIABLES = "local_variables"
    MODEL_VARIABLES = "model_variables"
    TRAINABLE_VARIABLES = "trainable_variables"
    MOVING_AVERAGE_VARIABLES = "moving_average_variables"
    WEIGHTS = "weights"
    BIASES = "biases"
    ACTIVATIONS = "activations"
    LOSSES = "losses"
    REGULARIZATION_LOSSES = "regularization_losses"
    UPDATE_OPS = "update_ops"
    SUMMARIES = "summaries"
    TRAIN_OP = "train_op"
    GLOBAL_STEP = "global_step"


class Graph:
    """The variables and collections of one copy of a model.

    Args:
        seed: from which, with a variable's name, random initial values are made. The same seed on
            all ranks gives the same values on all ranks.

    Attributes:
        seed: as given; it may be set before variables are made.
        variables: those made by `get_variable` or `new_variable`, by name.
        open_step: the step that is open, or None.
        outside: what is counted while none is open.
        next_step: the number of the next step.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.variables: dict[str, Variable] = {}
        # Of variables, those that get_variable may return again.
        self.shared: set[str] = set()
        # The scope in force and how often each was opened; they belong to variable_scopes.py.
        self.variable_scope: Any = None
        self.variable_scope_counts: dict[str, int] = {}
        # Of variables, those that the code of a step made, so that a later one finds them again.
        self.made_in_steps: set[str] = set()
        # Of these, whose part of a step it was that made them, where that was said.
        self.makers: dict[str, Part] = {}
        self.open_step: Step | None = None
        self.outside = Step()
        self.next_step = 0
        self._collections = Collections()
        self._name_scope = ""
        self._names_in_use: dict[str, int] = {}

    @contextlib.contextmanager
    def as_default(self) -> Generator[Graph, None, None]:
        """Make this the graph that the functions of `distopt.scopes` use, in this thread."""
        _current.stack.append(self)
        try:
            yield self
        finally:
            _current.stack.pop()

    @contextlib.contextmanager
    def step(self, number: int | None = None, first_example: int = 0) -> Generator[Step, None, None]:
        """Run a model's code within the block as if it built the model, but on this step's values.

        Inside, everything is as it was when the first step began, but that variables keep their values:

        - A variable that an earlier step made with `get_variable` or `new_variable` is returned where
          the code would make it again, once in each step. All rules of reuse hold within the step.
        - Collections hold no Tensors, update operations or anything else that an earlier step added
          (variables, and the regularisation losses that belong to them, stay). So LOSSES are this
          step's losses. They can be looked at until the next step begins.
        - Name scopes and names start anew: the first tower is "tower_0/" in every step.
        - Each update operation runs once; see `control_dependencies`.

        Without steps nothing is ever dropped: in a loop collections grow and names are numbered on, as
        they would if a TensorFlow graph were built again and again.

        Args:
            number: of the step, for random numbers; one more than that of the step before when None.
            first_example: index in the global batch of this replica's first example, for the same
                purpose.

        Yields:
            What is known of the step.

        Raises:
            RuntimeError: a step of this graph is open already.
            ValueError: a negative number.
        """
        if self.open_step is not None:
            raise RuntimeError(
                f"step {self.open_step.number} of this graph is open already; steps can't be nested. "
                "Leave its block first, or compute with another Graph."
            )
        step = Step(self.next_step if number is None else number, first_example)
        if step.number < 0 or first_example < 0:
            raise ValueError(
                f"number and first_example of a step must be 0 or more, got {step.number} "
                f"and {first_example}."
            )
        made = {name.lower() for name in self.made_in_steps}
        names, openings = self._names_in_use, dict(self.variable_scope_counts)
        scope = self.variable_scope
        reuse = None if scope is None else scope.reuse
        self._names_in_use = {name: uses for name, uses in names.items() if name not in made}
        self._collections.begin_step()
        self.open_step, self.next_step = step, step.number + 1
        try:
            yield step
        finally:
            self.open_step = None
            self._collections.end_step()
            self._names_in_use = {**dict.fromkeys((name.lower() for name in self.variables), 1), **names}
            self.variable_scope_counts = openings
            self.variable_scope = scope
            if scope is not None:
                scope.reuse = reuse

    @contextlib.contextmanager
    def part(self, code: Any, name: str) -> Generator[None, None, None]:
        """Run what belongs to one of several users of this graph, such as a training step's loss.

        What it makes in a step, another part doesn't find by making it again; see `sharing`. Where a part
        runs again in the same step, it begins as it did the first time: it finds its variables again, and
        what it added to collections is dropped.

        Args:
            code: the function that is run; parts of equal functions are one.
            name: how to call it in messages.
        """
        step = self.open_step
        if step is None:
            yield
            return
        outer, step.part = step.part, Part(code, name)
        start = next((start for part, start in step.begun if part.code == code), None)
        names, openings, variables = self._names_in_use, self.variable_scope_counts, step.variables
        if start is None:
            start = PartStart(dict(names), dict(openings), frozenset(variables), [])
            step.begun.append((step.part, start))
        else:
            self._names_in_use = dict(start.names)
            self.variable_scope_counts = dict(start.openings)
            step.variables = set(start.variables)
            self._collections.drop(start.collections)
        sizes = self._collections.sizes()
        try:
            yield
        finally:
            start.collections[:] = self._collections.added_since(sizes)
            self._names_in_use = _most(names, self._names_in_use)
            self.variable_scope_counts = _most(openings, self.variable_scope_counts)
            step.variables = step.variables | variables
            step.part = outer

    def is_remade(self, name: str) -> bool:
        """Return whether an earlier step made this variable, and the open one has yet to ask for it."""
        step = self.open_step
        return step is not None and name in self.made_in_steps and name not in step.variables

    def note_variable(self, name: str, made: bool) -> None:
        """Note that the open step, if there is one, made or asked for a variable."""
        if self.open_step is not None:
            self.open_step.variables.add(name)
            if made:
                self.made_in_steps.add(name)
                if self.open_step.part is not None:
                    self.makers[name] = self.open_step.part

    def add_to_collection(self, name: str, value: Any, *, lasting: bool = False) -> None:
        """Append a value to a collection; a value may be in it several times.

        A Tensor without a name gets one, so that `get_collection` can find it by its name scope.

        Args:
            name: name of the collection.
            value: anything.
            lasting: keep it when the next step begins, as variables are.
        """
        if isinstance(value, Tensor) and value.name is None:
            value.name = self.unique_name("Tensor")
        self._collections.add(name, value, lasting)

    def get_collection(self, name: str, scope: str | None = None) -> list[Any]:
        """Return a copy of a collection, empty if there is none of that name.

        Args:
            name: name of the collection.
            scope: keep only what has a `name` that begins with a match of this regular expression.
                As in TensorFlow "tower_1" also matches "tower_10/a"; "tower_1/" doesn't.
        """
        values = self._collections.values(name)
        if scope is None:
            return values
        matches = re.compile(scope).match
        names = (getattr(value, "name", None) for value in values)
        return [
            value
            for value, name in zip(values, names, strict=True)
            if isinstance(name, str) and matches(name)
        ]

    def get_collection_ref(self, name: str) -> list[Any]:
        """Return the collection itself: changes to the list change the collection."""
        return self._collections.reference(name)

    @property
    def name_scope(self) -> str:
        """The name scope in force, as in "tower_0/conv1"; empty at the top."""
        return self._name_scope

    @contextlib.contextmanager
    def open_name_scope(self, name: str | None) -> Generator[str, None, None]:
        """Prefix names within the block; see the function `name_scope`."""
        if not name:
            inner = ""
        elif name.endswith("/"):
            inner = name[:-1]
        else:
            check_name(name)
            inner = self.unique_name(name)
        before, self._name_scope = self._name_scope, inner
        try:
            yield inner + "/" if inner else ""
        finally:
            self._name_scope = before

    def unique_name(self, name: str) -> str:
        """Return `name` with the name scope before it and, if that was used, "_1", "_2" ... after.

        Names that differ only in upper and lower case count as the same, for the sake of files
        that are named after them.
        """
        full = f"{self._name_scope}/{name}" if self._name_scope else name
        return full if self.claim_name(full) else self._numbered(full)

    def claim_name(self, full: str) -> bool:
        """Mark a full name as used; return whether it was free."""
        uses = self._names_in_use.get(full.lower(), 0)
        self._names_in_use[full.lower()] = uses + 1
        return uses == 0

    def _numbered(self, full: str) -> str:
        number = self._names_in_use[full.lower()] - 1
        while f"{full}_{number}".lower() in self._names_in_use:
            number += 1
        self._names_in_use[f"{full}_{number}".lower()] = 1
        return f"{full}_{number}"


def _most(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
    """Return the larger of the counts."""
    return {key: max(first.get(key, 0), second.get(key, 0)) for key in {**first, **second}}


class _Current(threading.local):
    def __init__(self) -> None:
        self.stack = [Graph()]


_current = _Current()


def get_default_graph() -> Graph:
    """Return the graph in force in this thread: that of the innermost `as_default`, or its own."""
    return _current.stack[-1]


def reset_default_graph(seed: int = 0) -> None:
    """Replace this thread's own graph by an empty one.

    Raises:
        RuntimeError: called within a `Graph.as_default` block, which has a graph of its own.
    """
    if len(_current.stack) > 1:
        raise RuntimeError(
            "reset_default_graph can't be called within `with graph.as_default()`: "
            "leave the block, or enter a new Graph()."
        )
    _current.stack[0] = Graph(seed)


def step(number: int | None = None, first_example: int = 0) -> contextlib.AbstractContextManager[Step]:
    """Run a model's code, in the default graph, as if it built the model; see `Graph.step`."""
    return get_default_graph().step(number, first_example)


def ensure_step() -> contextlib.AbstractContextManager[Step]:
    """Open a step of the default graph unless one is open, for code that may run in a step or alone."""
    graph = get_default_graph()
    return graph.step() if graph.open_step is None else contextlib.nullcontext(graph.open_step)


def add_to_collection(name: str, value: Any) -> None:
    """Append a value to a collection of the default graph; see `Graph.step` for how long it stays."""
    get_default_graph().add_to_collection(name, value)


def add_to_collections(names: str | Iterable[str], value: Any) -> None:
    """Append a value to several collections, to each once."""
    for name in dict.fromkeys((names,) if isinstance(names, str) else names):
        add_to_collection(name, value)


def get_collection(name: str, scope: str | None = None) -> list[Any]:
    """Return a copy of a collection of the default graph; see `Graph.get_collection`."""
    return get_default_graph().get_collection(name, scope)


def get_collection_ref(name: str) -> list[Any]:
    """Return a collection of the default graph itself."""
    return get_default_graph().get_collection_ref(name)


def global_variables(scope: str | None = None) -> list[Variable]:
    """Return all variables of the model, trainable or not."""
    return get_collection(GraphKeys.GLOBAL_VARIABLES, scope)


def local_variables(scope: str | None = None) -> list[Variable]:
    """Return the variables that belong to one rank and are not saved."""
    return get_collection(GraphKeys.LOCAL_VARIABLES, scope)


def model_variables(scope: str | None = None) -> list[Variable]:
    """Return the variables that layers declared part of the model."""
    return get_collection(GraphKeys.MODEL_VARIABLES, scope)


def moving_average_variables(scope: str | None = None) -> list[Variable]:
    """Return the variables of which an `ExponentialMovingAverage` is kept."""
    return get_collection(GraphKeys.MOVING_AVERAGE_VARIABLES, scope)


def trainable_variables(scope: str | None = None) -> list[Variable]:
    """Return the variables made with `trainable=True`, in the order of their creation."""
    return get_collection(GraphKeys.TRAINABLE_VARIABLES, scope)


def get_name_scope() -> str:
    """Return the name scope in force, as in "tower_0/conv1"; empty at the top."""
    return get_default_graph().name_scope


@contextlib.contextmanager
def name_scope(
    name: str | None, default_name: str | None = None, values: Any = None
) -> Generator[str, None, None]:
    """Prefix the names of `new_variable` and of `Graph.unique_name` within the block.

    The names of `get_variable` are not prefixed. A name used before gets "_1", "_2" ...; a name
    that ends with "/" is taken as it is, from the top, so that `with name_scope(captured)` comes
    back to a scope; None (without a default) or "" goes to the top.

    Args:
        name: the scope's name.
        default_name: taken when `name` is None.
        values: for code written for TensorFlow, which checks that these Tensors are of one graph.

    Yields:
        The full name with a "/" at its end, as `get_collection(key, scope)` needs it.

    Raises:
        ValueError: the name has characters that names can't have.
    """
    del values
    with get_default_graph().open_name_scope(default_name if name is None else name) as full:
        yield full


def check_name(name: str) -> None:
    """Raise ValueError where TensorFlow wouldn't take a name."""
    if not re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9_.\-/]*", name):
        raise ValueError(
            f"{name!r} is not a valid name. It must begin with a letter, a digit or a dot, "
            "and go on with letters, digits or any of _ . - /"
        )


def _full_name(name: str) -> str:
    check_name(name)
    return get_default_graph().unique_name(name)


naming["full_name"] = _full_name
