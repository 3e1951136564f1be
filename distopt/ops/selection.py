"""Choose between values by a condition, which is a constant."""

from __future__ import annotations

from typing import Any

from distopt.backend import namespace
from distopt.ops.broadcasting import unbroadcast
from distopt.tape import Context, Tensor, primitive
from distopt.variables import value_of

__all__ = ["select", "where"]


@primitive
def select(context: Context, a: Any, b: Any, *, condition: Any) -> Any:
    """Return `a` where the condition holds and `b` elsewhere, broadcast.

    Args:
        context: of the tape.
        a: array or number.
        b: array or number.
        condition: array of bool; no gradient flows into it.
    """
    return namespace(condition, a, b).where(condition, a, b)


@select.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    condition = context.options["condition"]
    return (
        unbroadcast(select.alike(upstream, 0, condition=condition), a) if context.needs[0] else None,
        unbroadcast(select.alike(0, upstream, condition=condition), b) if context.needs[1] else None,
    )


def where(condition: Any, a: Any, b: Any, *, name: str | None = None) -> Tensor:
    """Return `a` where the condition holds and `b` elsewhere, broadcast; TensorFlow's order of arguments.

    Args:
        condition: array of bool, or Tensor of it; no gradient flows into it.
        a: array or number.
        b: array or number.
        name: of the result.
    """
    return select(a, b, condition=value_of(condition), name=name)
