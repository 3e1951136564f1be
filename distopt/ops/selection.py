"""Choose between values by a condition, which is a constant."""

from __future__ import annotations

from typing import Any

from distopt.backend import namespace
from distopt.ops.broadcasting import unbroadcast
from distopt.tape import Context, primitive

__all__ = ["where"]


@primitive
def where(context: Context, a: Any, b: Any, *, condition: Any) -> Any:
    """Return `a` where the condition holds and `b` elsewhere, broadcast.

    Args:
        context: of the tape.
        a: array or number.
        b: array or number.
        condition: array of bool; no gradient flows into it.
    """
    return namespace(condition, a, b).where(condition, a, b)


@where.gradient
def _(context: Context, upstream: Any) -> tuple[Any, Any]:
    a, b = context.inputs
    condition = context.options["condition"]
    return (
        unbroadcast(where.alike(upstream, 0, condition=condition), a) if context.needs[0] else None,
        unbroadcast(where.alike(0, upstream, condition=condition), b) if context.needs[1] else None,
    )
