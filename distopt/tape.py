"""Record primitives as they run, and give gradients one by one as they become final.

A `primitive` is a function on arrays with its vector-Jacobian product beside it. While a `GradientTape`
is open, a call on something that the tape watches leaves a node. Going backward, the tape knows from use
counts when the gradient of a variable is final, and `gradients` yields it at that moment: whoever
consumes the generator drives the backward pass, and can start reducing one gradient while the next is
still to be computed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from distopt.backend import Array, asnumpy, namespace
from distopt.variables import IndexedSlices, Operand, Variable

__all__ = [
    "Context",
    "Gradient",
    "GradientTape",
    "Primitive",
    "Tensor",
    "gradients",
    "primitive",
    "primitives",
]

Gradient: TypeAlias = "Array | IndexedSlices | None"

_sequence = itertools.count()


class Tensor(Operand):
    """A computed value: an array, and the record of how it was made where a tape was open.

    Attributes:
        value: the array.
    """

    __slots__ = ("__weakref__", "node", "value")

    def __init__(self, value: Any, node: _Node | None = None) -> None:
        self.value: Array = value
        self.node = node

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""
        return tuple(np.shape(self.value))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        return self.value.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numpy(self) -> Array:
        """Return the value as a NumPy array (waits for the GPU)."""
        return asnumpy(self.value)

    def __float__(self) -> float:
        return float(self.numpy())

    def __len__(self) -> int:
        return len(self.value)

    def __repr__(self) -> str:
        return f"<Tensor shape={self.shape} dtype={self.dtype} {self.value!r}>"


class Context:
    """What a primitive's two halves share.

    Attributes:
        inputs: the arrays (or Python numbers) that the primitive was called on.
        options: its keyword arguments.
        output: the array it returned; set after the forward half.
        needs: per input, whether its gradient is wanted. In the forward half: whether any tape watches it.
        saved: whatever the forward half leaves for the backward half.
        is_last: whether the backward half is called for the last time, and may let go of what was saved.
    """

    __slots__ = ("destinations", "is_last", "inputs", "needs", "options", "output", "saved")

    def __init__(self, inputs: tuple[Any, ...], options: dict[str, Any], needs: tuple[bool, ...]) -> None:
        self.inputs = inputs
        self.options = options
        self.needs = needs
        self.output: Any = None
        self.saved: Any = None
        self.is_last = False
        self.destinations: tuple[Array | None, ...] = ()

    @property
    def recording(self) -> bool:
        """Whether the backward half may be called, so that the forward half has to save for it."""
        return any(self.needs)

    def destination(self, position: int) -> Array | None:
        """Return the array that the gradient of an input should be written into, or None for any.

        It is the variable's segment of the gradient arena, contiguous and of the input's shape. To use
        it is optional: the tape copies what was written elsewhere.
        """
        return self.destinations[position] if self.destinations else None


class _Node:
    """One recorded call."""

    __slots__ = ("context", "inputs", "primitive", "sequence", "tapes")

    def __init__(
        self,
        called: Primitive,
        inputs: tuple[Any, ...],
        context: Context,
        tapes: tuple[GradientTape, ...],
    ) -> None:
        self.primitive = called
        self.inputs = inputs
        self.context: Context | None = context
        self.tapes = tapes
        self.sequence = next(_sequence)


_Forward: TypeAlias = Callable[..., Any]
_Backward: TypeAlias = Callable[[Context, Any], Sequence[Any]]

primitives: dict[str, Primitive] = {}
"""Every primitive by name; the tests check the gradient of each."""


class Primitive:
    """A function on arrays that tapes can differentiate; made by `@primitive`."""

    def __init__(self, forward: _Forward) -> None:
        self.__doc__ = forward.__doc__
        self.__name__ = self.name = forward.__name__
        self.__module__ = forward.__module__
        self._forward = forward
        self.backward: _Backward | None = None
        if self.name in primitives:
            raise ValueError(f"there is a primitive named {self.name!r} already")
        primitives[self.name] = self

    def gradient(self, backward: _Backward) -> _Backward:
        """Register `backward(context, upstream)`, which returns one gradient (or None) per input.

        It must not change `upstream`, which other nodes may share.
        """
        self.backward = backward
        return backward

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        """Compute on Tensors, Variables, arrays and numbers; leave a node on the tapes that watch them."""
        values = tuple(i.value if isinstance(i, Operand) else i for i in inputs)
        tapes = tuple(tape for tape in _active.tapes if any(tape.watches(i) for i in inputs))
        needs = tuple(any(tape.watches(i) for tape in tapes) for i in inputs)
        context = Context(values, options, needs)
        output = self._forward(context, *values, **options)
        if not tapes:
            return Tensor(output)
        context.output = output
        return Tensor(output, _Node(self, inputs, context, tapes))

    def __repr__(self) -> str:
        return f"<primitive {self.name}>"


def primitive(forward: _Forward) -> Primitive:
    """Make a primitive of `forward(context, *arrays, **options) -> array`.

    Positional arguments are what it can be differentiated by, keyword arguments are options. Its
    vector-Jacobian product is given with `@name.gradient`.
    """
    return Primitive(forward)


class _Active(threading.local):
    def __init__(self) -> None:
        self.tapes: list[GradientTape] = []


_active = _Active()


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
        _active.tapes.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self in _active.tapes:
            _active.tapes.remove(self)

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
        if self in _active.tapes and not self._persistent:
            _active.tapes.remove(self)  # what follows inside the block can't be asked of it any more
        self._used = True
        return _backward(targets, sources, upstreams, self, into_arena, release=not self._persistent)


class _Paused:
    def __init__(self, tape: GradientTape) -> None:
        self._tape = tape
        self._place = -1

    def __enter__(self) -> None:
        if self._tape in _active.tapes:
            self._place = _active.tapes.index(self._tape)
            _active.tapes.remove(self._tape)

    def __exit__(self, *exception: object) -> None:
        if self._place >= 0:
            _active.tapes.insert(self._place, self._tape)


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
    run = _backward(_as_list(ys), sources, grad_ys, None, False, release=False, stops=stops)
    found = {id(source): gradient for gradient, source in run}
    return [_or_zeros(found[id(source)], source, zero) for source in sources]


def _backward(
    targets: list[Any],
    sources: list[Any],
    upstreams: Any,
    tape: GradientTape | None,
    into_arena: bool,
    release: bool,
    stops: set[int] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Walk the record backward from the targets; yield (gradient, source) as each becomes final."""
    wanted = {id(source): source for source in sources}
    nodes, uses = _plan(targets, wanted, tape, stops or set())
    sums: dict[int, _Sum] = {}

    for target, upstream in zip(targets, _upstreams(targets, upstreams), strict=True):
        if isinstance(target, Operand):
            for key in _keys(target, wanted):
                sums.setdefault(key, _Sum()).add(upstream)

    emitted: set[int] = set()
    for key, source in wanted.items():
        if uses.get(key, 0) == 0 and key in sums:
            emitted.add(key)
            yield _final(sums.pop(key), source, into_arena), source

    for node, relevant in nodes:
        total = sums.pop(id(node), None)
        context = node.context
        if context is None:
            raise RuntimeError(
                f"the record of {node.primitive.name} was released by an earlier call of gradient; "
                "use GradientTape(persistent=True)"
            )
        results: Sequence[Any] = (None,) * len(node.inputs)
        if total is not None and total.value is not None:
            context.needs = relevant
            context.destinations = _destinations(node, relevant, wanted, sums, into_arena)
            context.is_last = release and len(node.tapes) == 1
            backward = node.primitive.backward
            if backward is None:
                raise RuntimeError(f"primitive {node.primitive.name!r} has no gradient")
            results = backward(context, total.value)
            context.destinations = ()
        for operand, needed, result in zip(node.inputs, relevant, results, strict=True):
            if not needed:
                continue
            for key in _keys(operand, wanted):
                if result is not None:
                    sums.setdefault(key, _Sum()).add(result)
                if key not in wanted:
                    continue
                uses[key] -= 1
                if uses[key] == 0:
                    emitted.add(key)
                    yield _final(sums.pop(key, None), operand, into_arena), operand
        if context.is_last:
            node.context = None

    for key, source in wanted.items():
        if key not in emitted:
            yield None, source


def _plan(
    targets: list[Any], wanted: dict[int, Any], tape: GradientTape | None, stops: set[int]
) -> tuple[list[tuple[_Node, tuple[bool, ...]]], dict[int, int]]:
    """Return the nodes between sources and targets, latest first, and how often each source is used."""
    reachable: dict[int, _Node] = {}
    pending = [t.node for t in targets if isinstance(t, Tensor) and t.node is not None]
    while pending:
        node = pending.pop()
        if id(node) in reachable or (tape is not None and tape not in node.tapes):
            continue
        reachable[id(node)] = node
        for operand in node.inputs:
            if isinstance(operand, Tensor) and operand.node is not None and id(operand) not in stops:
                pending.append(operand.node)
    ordered = sorted(reachable.values(), key=lambda node: node.sequence)
    leads: set[int] = set()
    uses: dict[int, int] = {}
    plan: list[tuple[_Node, tuple[bool, ...]]] = []
    for node in ordered:
        relevant = tuple(_leads(operand, wanted, leads, stops) for operand in node.inputs)
        if not any(relevant):
            continue
        leads.add(id(node))
        plan.append((node, relevant))
        for operand in node.inputs:
            if id(operand) in wanted:
                uses[id(operand)] = uses.get(id(operand), 0) + 1
    return plan[::-1], uses


def _leads(operand: Any, wanted: dict[int, Any], leads: set[int], stops: set[int]) -> bool:
    """Tell whether a gradient has to flow into `operand`."""
    if id(operand) in wanted:
        return operand.dtype.kind in "fV"
    if not isinstance(operand, Tensor) or id(operand) in stops:
        return False
    return operand.node is not None and id(operand.node) in leads


def _keys(operand: Any, wanted: dict[int, Any]) -> list[int]:
    """Return under which keys a gradient of `operand` is summed: its own as a source, its node's."""
    keys = [id(operand)] if id(operand) in wanted else []
    if isinstance(operand, Tensor) and operand.node is not None:
        keys.append(id(operand.node))
    return keys


def _destinations(
    node: _Node,
    relevant: tuple[bool, ...],
    wanted: dict[int, Any],
    sums: dict[int, _Sum],
    into_arena: bool,
) -> tuple[Array | None, ...]:
    """Return where each gradient may be written straight into the arena: first contributions only."""
    if not into_arena:
        return ()
    taken: set[int] = set()
    found: list[Array | None] = []
    for operand, needed in zip(node.inputs, relevant, strict=True):
        free = needed and isinstance(operand, Variable) and id(operand) in wanted
        free = free and id(operand) not in sums and id(operand) not in taken
        taken.add(id(operand))
        found.append(operand.gradient if free else None)
    return tuple(found)


class _Sum:
    """The contributions to one gradient so far. The first is kept as it is; a sum gets its own memory."""

    __slots__ = ("_owned", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self._owned = False

    def add(self, contribution: Any) -> None:
        if self.value is None:
            self.value = contribution
        elif isinstance(self.value, IndexedSlices) or isinstance(contribution, IndexedSlices):
            self.value = _add_slices(self.value, contribution)
            self._owned = True
        elif self._owned and np.shape(self.value):
            self.value += contribution
        else:
            self.value = self.value + contribution
            self._owned = True


def _add_slices(first: Any, second: Any) -> Any:
    if isinstance(first, IndexedSlices) and isinstance(second, IndexedSlices):
        xp = namespace(first.values)
        return IndexedSlices(
            xp.concatenate([first.values, second.values]),
            xp.concatenate([first.indices, second.indices]),
            first.dense_shape,
        )
    dense = [g.to_dense() if isinstance(g, IndexedSlices) else g for g in (first, second)]
    return dense[0] + dense[1]


def _final(total: _Sum | None, source: Any, into_arena: bool) -> Any:
    if total is None or total.value is None:
        return None
    gradient = total.value
    destination = source.gradient if into_arena and isinstance(source, Variable) else None
    if isinstance(gradient, IndexedSlices):
        if destination is None:
            return gradient
        gradient = gradient.to_dense()  # a variable in an arena has a dense segment
    if destination is None or gradient is destination:
        return gradient
    destination[...] = gradient
    return destination


def _upstreams(targets: list[Any], given: Any) -> list[Any]:
    if given is None:
        given = [None] * len(targets)
    elif len(targets) == 1 and not isinstance(given, list | tuple):
        given = [given]
    elif not isinstance(given, list | tuple) or len(given) != len(targets):
        raise ValueError(
            f"there are {len(targets)} targets, so a list of as many upstream gradients is expected, "
            f"got {given!r}"
        )
    return [_upstream(t, g) for t, g in zip(targets, given, strict=True)]


def _upstream(target: Any, given: Any) -> Any:
    value = target.value
    xp = namespace(value)
    if given is None:
        return xp.ones_like(value)
    array = given.value if isinstance(given, Operand) else given
    return xp.broadcast_to(xp.asarray(array, dtype=value.dtype), np.shape(value))


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
