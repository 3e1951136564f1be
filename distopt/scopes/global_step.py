"""The global step: the integer variable that counts the updates of a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from distopt.backend import Device
from distopt.initializers import Zeros
from distopt.scopes.graph import Graph, GraphKeys, get_default_graph
from distopt.scopes.variable_scopes import get_variable
from distopt.variables import Variable

__all__ = ["assert_global_step", "create_global_step", "get_global_step", "get_or_create_global_step"]


def create_global_step(graph: Graph | None = None) -> Variable:
    """Make the global step: an int64 scalar, 0 at first, not trainable, named "global_step".

    It is in the collections GLOBAL_VARIABLES and GLOBAL_STEP.

    Args:
        graph: whose; the default graph when None.

    Raises:
        ValueError: there is one already.
        TypeError: there is one already that can't be one; see `assert_global_step`.
    """
    graph = graph or get_default_graph()
    if get_global_step(graph) is not None:
        raise ValueError(
            '"global_step" already exists. Use get_or_create_global_step() where it may be there.'
        )
    with graph.as_default():
        return get_variable(
            GraphKeys.GLOBAL_STEP,
            (),
            np.int64,
            Zeros(),
            trainable=False,
            collections=[GraphKeys.GLOBAL_VARIABLES, GraphKeys.GLOBAL_STEP],
            device=Device(),  # on the host, whatever the model's device: schedules read it at every step
        )


def get_global_step(graph: Graph | None = None) -> Variable | None:
    """Return the global step, or None if there is none.

    It is what stands in the collection GLOBAL_STEP, or else the variable named "global_step".

    Args:
        graph: whose; the default graph when None.

    Raises:
        ValueError: there are several in the collection.
        TypeError: it can't be one; see `assert_global_step`.
    """
    graph = graph or get_default_graph()
    found: list[Any] = graph.get_collection(GraphKeys.GLOBAL_STEP)
    if len({id(item) for item in found}) > 1:
        raise ValueError(
            f"Multiple tensors in global_step collection: {found}. Leave one of them in GLOBAL_STEP."
        )
    step = found[0] if found else graph.variables.get(GraphKeys.GLOBAL_STEP)
    if step is None:
        return None
    assert_global_step(step)
    return step


def get_or_create_global_step(graph: Graph | None = None) -> Variable:
    """Return the global step, made if there is none; see `create_global_step`."""
    graph = graph or get_default_graph()
    step = get_global_step(graph)
    return create_global_step(graph) if step is None else step


def assert_global_step(global_step: Any) -> None:
    """Check that something can count steps.

    Raises:
        TypeError: it is no Variable, its dtype is no integer, or it is no scalar.
    """
    if not isinstance(global_step, Variable):
        raise TypeError(f'Existing "global_step" is not a Variable: {global_step!r}.')
    if global_step.dtype.kind not in "iu":
        raise TypeError(
            f'Existing "global_step" does not have integer type: {global_step.dtype}. Make it with '
            "get_or_create_global_step(), or with dtype=np.int64."
        )
    if global_step.shape != ():
        raise TypeError(f'Existing "global_step" is not scalar: its shape is {global_step.shape}.')
