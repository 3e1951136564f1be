"""`GradientTape` and `gradients`, with TensorFlow's semantics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from distopt.backend import namespace
from distopt.tape.backward import backward
from distopt.tape.record import Tensor, active
from distopt.variables import Operand, Variable

__all__ = ["GradientTape", "gradients"]


class GradientTape:
    """Records what is computed inside its `with` block, for differentiation.

    Args:
        persistent: allow more than one call of `gradient` or `gradients`; keeps the record in memory.
        watch_accessed_variables: watch every trainable `Variable` of a floating dtype that is used.
    """

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        self._persistent = persistent
        self._watch_variables = watch_accessed_variables
        self._watched: dict[int, Any] = {}
        self._used = False
        self._accessed: dict[int, Variable] = {}

    def __enter__(self) -> GradientTape:
        active.tapes.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self in active.tapes:
            active.tapes.remove(self)

    def watch(self, tensor: Any) -> None:
        """Watch a tensor, a variable that isn't trainable, or a nested list, tuple or dict of them.

        Raises:
            TypeError: it is neither (a NumPy array has no identity to follow: wrap it in `Tensor`).
        """
        for leaf in _leaves(tensor):
            if not isinstance(leaf, Operand):
                raise TypeError(f"a tape watches Tensors and Variables, got {type(leaf).__name__}")
            self._watched[id(leaf)] = leaf

    def watched_variables(self) -> list[Variable]:
        """Return the variables that were used or watched, in the order of their first use."""
        explicit = {i: v for i, v in self._watched.items() if isinstance(v, Variable)}
        return list((self._accessed | explicit).values())

    def watches(self, operand: Any) -> bool:
        """Tell whether a call on `operand` is to be recorded."""
        if isinstance(operand, Variable):
            if operand.dtype.kind not in "fV":
                return False
            if self._watch_variables and operand.trainable:
                self._accessed.setdefault(id(operand), operand)
                return True
            return id(operand) in self._watched
        if isinstance(operand, Tensor):
            recorded = operand.node is not None and self in operand.node.tapes
            return recorded or id(operand) in self._watched
        return False

    def stop_recording(self) -> _Paused:
        """Return a context manager in which this tape doesn't record."""
        return _Paused(self)

    def reset(self) -> None:
        """Forget everything recorded and watched so far."""
        self._watched.clear()
        self._accessed.clear()
        self._used = False

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: str = "none",
    ) -> Any:
        """Return the gradient of `target` (summed, when several or not scalar) by each source.

        Args:
            target: a Tensor, or a list of them.
            sources: a Variable or watched Tensor, or a nested list, tuple or dict of them.
            output_gradients: upstream gradient for each target; ones when None.
            unconnected_gradients: "none" or "zero": what to give for a source that the target does not
                depend on.

        Returns:
            Arrays or IndexedSlices (or None), nested like `sources`.

        Raises:
            RuntimeError: second call on a tape that is not persistent.
            ValueError: unknown `unconnected_gradients`, or lengths that differ.
        """
        zero = _wants_zeros(unconnected_gradients)
        leaves = list(_leaves(sources))
        found = {
            id(source): gradient for gradient, source in self._run(_as_list(target), leaves, output_gradients)
        }
        values = iter([_or_zeros(found[id(leaf)], leaf, zero) for leaf in leaves])
        return _rebuild(sources, values)

    def gradients(
        self, target: Any, variables: Iterable[Variable], output_gradients: Any = None
    ) -> Iterator[tuple[Any, Any]]:
        """Yield `(gradient, variable)` at the moment the gradient is final; runs backward on demand.

        The gradient of a variable in an arena is written into the arena (`variable.gradient`), and is
        that view. Variables that the target does not depend on come last, with None.

        Raises:
            RuntimeError: second call on a tape that is not persistent.
        """
        return self._run(_as_list(target), list(variables), output_gradients, into_arena=True)

    def _run(
        self,
        targets: list[Any],
        sources: list[Any],
        upstreams: Any,
        into_arena: bool = False,
    ) -> Iterator[tuple[Any, Any]]:
        if self._used and not self._persistent:
            raise RuntimeError(
                "this tape was used already; a tape gives gradients once unless it is made with "
                "GradientTape(persistent=True)"
            )
        if self in active.tapes and not self._persistent:
            active.tapes.remove(self)  # what follows inside the block can't be asked of it any more
        self._used = True
        return backward(targets, sources, upstreams, self, into_arena, release=not self._persistent)


class _Paused:
    def __init__(self, tape: GradientTape) -> None:
        self._tape = tape
        self._place = -1

    def __enter__(self) -> None:
        if self._tape in active.tapes:
            self._place = active.tapes.index(self._tape)
            active.tapes.remove(self._tape)

    def __exit__(self, *exception: object) -> None:
        if self._place >= 0:
            active.tapes.insert(self._place, self._tape)


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    stop_gradients: Any = None,
    unconnected_gradients: str = "none",
) -> list[Any]:
    """Return the sum over `ys` of `grad_ys * dy/dx` for each x, as TensorFlow's function of this name.

    The ys must have been computed under an open `GradientTape`. The record is kept, so it can be called
    again.

    Args:
        ys: a Tensor or a list of them.
        xs: a Variable or Tensor or a list of them.
        grad_ys: upstream gradients, one per y; None, or None for a y, means ones.
        stop_gradients: operands to be taken as constants.
        unconnected_gradients: "none" or "zero".

    Returns:
        A list as long as `xs`, also for a single x.

    Raises:
        ValueError: `grad_ys` has another length than `ys`, or unknown `unconnected_gradients`.
    """
    zero = _wants_zeros(unconnected_gradients)
    sources = _as_list(xs)
    stops = {id(operand) for operand in _as_list(stop_gradients)}
    run = backward(_as_list(ys), sources, grad_ys, None, False, release=False, stops=stops)
    found = {id(source): gradient for gradient, source in run}
    return [_or_zeros(found[id(source)], source, zero) for source in sources]


def _wants_zeros(unconnected_gradients: str) -> bool:
    if unconnected_gradients not in ("none", "zero"):
        raise ValueError(f"unconnected_gradients must be 'none' or 'zero', got {unconnected_gradients!r}")
    return unconnected_gradients == "zero"


def _or_zeros(gradient: Any, source: Any, zero: bool) -> Any:
    if gradient is None and zero:
        return namespace(source.value).zeros_like(source.value)
    return gradient


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _leaves(nested: Any) -> Iterator[Any]:
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        for item in nested:
            yield from _leaves(item)
    else:
        yield nested


def _rebuild(nested: Any, values: Iterator[Any]) -> Any:
    if isinstance(nested, dict):
        return {key: _rebuild(item, values) for key, item in nested.items()}
    if isinstance(nested, list | tuple):
        return type(nested)([_rebuild(item, values) for item in nested])
    return next(values)
