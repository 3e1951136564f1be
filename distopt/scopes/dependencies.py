"""Update operations: what is to happen before the step returns, and control_dependencies to say when.

Nothing is deferred here but these: an update operation is a callable without arguments. Batch
normalization leaves one in the collection UPDATE_OPS for its moving averages, model code may add its own,
and whoever trains runs them:

    with graph.step(), GradientTape() as tape:
        loss = ...
        with control_dependencies(get_collection(GraphKeys.UPDATE_OPS)):
            ...  # what is computed here sees the updates

`optimize_loss` and the Trainer run UPDATE_OPS; `minimize` doesn't, as in TensorFlow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable
from typing import Any

from distopt.scopes.graph import Graph, GraphKeys, get_default_graph
from distopt.variables import Operand

__all__ = ["UpdateOp", "control_dependencies", "run_update_ops"]


class UpdateOp:
    """An update that was put off; it runs once, however often it is called.

    Args:
        function: callable without arguments that does the update.
        name: full name, by which collections are filtered.

    Attributes:
        name: as given.
        done: whether it has run.
    """

    def __init__(self, function: Callable[[], object], name: str) -> None:
        self._function = function
        self.name = name
        self.done = False

    def __call__(self) -> None:
        """Do the update, unless it was done."""
        if not self.done:
            self.done = True
            self._function()

    def __repr__(self) -> str:
        return f"<UpdateOp {self.name!r}, {'done' if self.done else 'to be done'}>"


@contextlib.contextmanager
def control_dependencies(control_inputs: Iterable[Any] | None) -> Generator[None, None, None]:
    """Run operations, in order, before what stands in the block.

    What is computed inside sees their effect; what was computed outside is not computed again, as in
    TensorFlow. Within `Graph.step` each operation runs once in the step, however often it is depended
    on; outside, a plain callable runs whenever a block is entered, and an `UpdateOp` once.

    Args:
        control_inputs: callables without arguments. Tensors, Variables and arrays may stand among them,
            as in code ported from TensorFlow: they have their values already, so there is nothing to
            do. None, which clears the dependencies there, means no operations.

    Raises:
        TypeError: it is no iterable, or something in it is neither callable nor a value. Nothing has
            run then.
    """
    operations = _checked(control_inputs)
    graph = get_default_graph()
    for operation in operations:
        _run(graph, operation)
    _forget_done(graph)
    yield


def run_update_ops(scope: str | None = None) -> int:
    """Run the operations in the collection UPDATE_OPS, in order; those that ran in this step don't again.

    Args:
        scope: only those whose names begin with a match of this regular expression.

    Returns:
        How many ran.

    Raises:
        TypeError: something in the collection is neither callable nor a value.
    """
    graph = get_default_graph()
    count = sum(_run(graph, op) for op in _checked(graph.get_collection(GraphKeys.UPDATE_OPS, scope)))
    _forget_done(graph)
    return count


def _checked(control_inputs: Iterable[Any] | None) -> list[Callable[[], object]]:
    if control_inputs is None:
        return []
    if isinstance(control_inputs, Operand) or not isinstance(control_inputs, Iterable):
        raise TypeError(
            "control_dependencies takes a list of callables without arguments, got "
            f"{control_inputs!r}. Write control_dependencies([operation])."
        )
    operations: list[Callable[[], object]] = []
    for item in control_inputs:
        if isinstance(item, Operand) or hasattr(item, "__array__"):
            continue
        if not callable(item):
            raise TypeError(
                f"Can not convert a {type(item).__name__} into an operation: a control dependency must be "
                f"a callable without arguments, got {item!r}."
            )
        operations.append(item)
    return operations


def _run(graph: Graph, operation: Callable[[], object]) -> bool:
    """Run an operation, unless it was done already; return whether it ran."""
    if isinstance(operation, UpdateOp) and operation.done:
        return False
    if graph.open_step is not None:
        if id(operation) in graph.open_step.done:
            return False
        graph.open_step.done[id(operation)] = operation
    operation()
    return True


def _forget_done(graph: Graph) -> None:
    """Outside of steps, which drop them all at once, drop the update operations that are done."""
    if graph.open_step is None:
        values = graph.get_collection_ref(GraphKeys.UPDATE_OPS)
        values[:] = [value for value in values if not (isinstance(value, UpdateOp) and value.done)]
