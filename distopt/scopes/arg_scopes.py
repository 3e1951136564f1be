"""Default arguments for functions within a block: slim's `arg_scope`.

    with arg_scope([conv2d, dense], regularizer=l2_regularizer(0.004)):
        net = conv2d(images, 64, 5)  # gets the regularizer
        net = dense(net, 10, regularizer=None)  # an argument of the call comes first

Each thread has its own scopes, so ranks that run as threads don't see each other's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ParamSpec, TypeAlias, TypeVar

__all__ = [
    "ArgScope",
    "add_arg_scope",
    "arg_scope",
    "arg_scoped_arguments",
    "current_arg_scope",
    "has_arg_scope",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

ArgScope: TypeAlias = dict[Callable[..., Any], dict[str, Any]]
"""Default arguments by the function (undecorated) that they are for."""


class _Current(threading.local):
    def __init__(self) -> None:
        self.scope: ArgScope = {}


_current = _Current()


def add_arg_scope(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that `arg_scope` can give it default arguments."""

    @functools.wraps(function)
    def with_defaults(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        defaults = _current.scope.get(function)
        if not defaults:
            return function(*args, **kwargs)
        return function(*args, **{**defaults, **kwargs})  # type: ignore[arg-type]

    with_defaults.arg_scope_key = function  # type: ignore[attr-defined]
    return with_defaults


@contextlib.contextmanager
def arg_scope(
    functions_or_scope: Sequence[Callable[..., Any]] | ArgScope, **defaults: Any
) -> Generator[ArgScope, None, None]:
    """Give functions default arguments within the block.

    Nested scopes add up, and the inner one wins. Entering a scope that was captured with `as`
    replaces what is in force instead (an empty dictionary clears it).

    Args:
        functions_or_scope: functions decorated with `add_arg_scope`, or a captured scope.
        defaults: the arguments. That a function knows them is only checked when it is called.

    Yields:
        The scope in force, to be captured.

    Raises:
        TypeError: the first argument is neither a list or tuple nor a scope.
        ValueError: a function is not decorated, or there are `defaults` with a captured scope.
    """
    if isinstance(functions_or_scope, Mapping):
        if defaults:
            raise ValueError(
                "a captured arg_scope is entered as it is; "
                f"got further arguments {sorted(defaults)}. Nest a second arg_scope for them."
            )
        scope = {key: dict(values) for key, values in functions_or_scope.items()}
    else:
        scope = _extended(functions_or_scope, defaults)
    before = _current.scope
    _current.scope = scope
    try:
        yield scope
    finally:
        _current.scope = before


def current_arg_scope() -> ArgScope:
    """Return the default arguments in force in this thread."""
    return _current.scope


def has_arg_scope(function: Callable[..., Any]) -> bool:
    """Return whether a function is decorated with `add_arg_scope`."""
    return hasattr(function, "arg_scope_key")


def arg_scoped_arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments that have a default, those meant for an `arg_scope`.

    Raises:
        ValueError: the function is not decorated with `add_arg_scope`.
    """
    parameters = inspect.signature(_key(function)).parameters.values()
    return tuple(p.name for p in parameters if p.default is not inspect.Parameter.empty)


def _extended(functions: Any, defaults: Mapping[str, Any]) -> ArgScope:
    if not isinstance(functions, (list, tuple)):
        raise TypeError(
            "arg_scope takes a list or tuple of functions, or a captured scope, as its first "
            f"argument; got {functions!r}. Write arg_scope([function], ...)."
        )
    keys = [_key(function) for function in functions]
    scope = {key: dict(values) for key, values in _current.scope.items()}
    for key in keys:
        scope[key] = {**scope.get(key, {}), **defaults}
    return scope


def _key(function: Callable[..., Any]) -> Callable[..., Any]:
    if not has_arg_scope(function):
        name = getattr(function, "__qualname__", repr(function))
        raise ValueError(f"{name} is not decorated with @add_arg_scope; decorate it first.")
    key: Callable[..., Any] = function.arg_scope_key  # type: ignore[attr-defined]
    return key
