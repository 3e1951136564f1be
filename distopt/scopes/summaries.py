"""Summaries: values of a step that somebody may want to see, kept in the collection SUMMARIES by tag.

In TensorFlow 1 a summary is an operation that is run when the merged summaries are fetched. Here the value
is there at once: the collection holds the latest one of each tag, so nothing piles up over the steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distopt.backend import Array, asnumpy
from distopt.scopes.graph import GraphKeys, check_name, get_collection, get_default_graph
from distopt.variables import IndexedSlices, Operand

__all__ = ["Summary", "histogram", "keep_summary", "merge_all", "scalar"]


@dataclass(frozen=True, eq=False)
class Summary:
    """The latest value of one tag.

    Attributes:
        tag: full name, by which writers and collections know it.
        kind: "scalar" or "histogram".
        value: a copy of what was given, on the device where that was: rank 0 for a scalar.
    """

    tag: str
    kind: Literal["scalar", "histogram"]
    value: Array

    @property
    def name(self) -> str:
        """The tag, by which `get_collection(GraphKeys.SUMMARIES, scope)` filters."""
        return self.tag

    def numpy(self) -> Array:
        """Return the value as a NumPy array (waits for the GPU)."""
        return asnumpy(self.value)


def scalar(name: str, tensor: Any, collections: Iterable[str] | None = None) -> Summary:
    """Keep a number, as `tf.summary.scalar` does.

    Args:
        name: of the value; its tag is that with the name scope in force before it. A later call with the
            same tag replaces the value. (TensorFlow numbers a name that comes twice: its second call
            would be another summary, ours is the next step.)
        tensor: number, array, Tensor or Variable with one element. On a GPU the host doesn't wait.
        collections: where it is kept, instead of SUMMARIES.

    Raises:
        ValueError: it has more than one element, or the name can't be one.
    """
    return keep_summary(_tag(name), "scalar", tensor, collections)


def histogram(name: str, values: Any, collections: Iterable[str] | None = None) -> Summary:
    """Keep an array of which a histogram is to be shown, as `tf.summary.histogram` does.

    Args:
        name: as for `scalar`.
        values: array, Tensor, Variable or IndexedSlices (of which the rows count) of any shape. It is
            copied; on a GPU the host doesn't wait.
        collections: where it is kept, instead of SUMMARIES.

    Raises:
        ValueError: the name can't be one.
    """
    return keep_summary(_tag(name), "histogram", values, collections)


def keep_summary(
    tag: str,
    kind: Literal["scalar", "histogram"],
    given: Any,
    collections: Iterable[str] | None = None,
) -> Summary:
    """Keep a value under a full tag; see `scalar` and `histogram`."""
    value = _copied(given)
    if kind == "scalar":
        if value.size != 1:
            raise ValueError(
                f"the scalar summary {tag!r} has shape {value.shape}; give one number, or use histogram"
            )
        value = value.reshape(())
    summary = Summary(tag, kind, value)
    graph = get_default_graph()
    for name in (GraphKeys.SUMMARIES,) if collections is None else dict.fromkeys(collections):
        kept = graph.get_collection_ref(name)
        kept[:] = [s for s in kept if not (isinstance(s, Summary) and s.tag == tag)]
        graph.add_to_collection(name, summary)
    return summary


def merge_all(key: str = GraphKeys.SUMMARIES, scope: str | None = None) -> list[Summary]:
    """Return the latest summary of every tag, in the order in which they were kept.

    Args:
        key: the collection.
        scope: only tags that begin with a match of this regular expression.
    """
    return [summary for summary in get_collection(key, scope) if isinstance(summary, Summary)]


def _tag(name: str) -> str:
    check_name(name)
    scope = get_default_graph().name_scope
    return f"{scope}/{name}" if scope else name


def _copied(given: Any) -> Array:
    if isinstance(given, IndexedSlices):
        given = given.values
    if isinstance(given, Operand):
        given = given.value
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return given.copy()
    return np.array(given)
