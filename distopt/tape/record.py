"""What a tape records: Tensors, and the primitives that made them."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from distopt.backend import Array, adopted, asnumpy
from distopt.variables import Operand, Variable, operators

__all__ = [
    "Context",
    "Node",
    "Primitive",
    "Recorder",
    "Tensor",
    "active",
    "naming",
    "next_sequence",
    "primitive",
    "primitives",
    "as_operand",
]

_sequence = itertools.count()


def next_sequence() -> int:
    """Return a number above those of all nodes so far."""
    return next(_sequence)


class Recorder(Protocol):
    """A tape, as far as primitives need to know it."""

    def watches(self, operand: Any) -> bool:
        """Tell whether a call on `operand` is to be recorded."""
        ...

    def holds(self, node: Node) -> bool:
        """Tell whether a call was recorded here, and not forgotten since."""
        ...


class Tensor(Operand):
    """A computed value: an array, and the record of how it was made where a tape was open.

    Attributes:
        value: the array.
        name: full name, by which collections are filtered; None where none was given.
    """

    __slots__ = ("__weakref__", "name", "node", "value")

    def __init__(self, value: Any, node: Node | None = None, name: str | None = None) -> None:
        self.value: Array = value
        self.node = node
        self.name = name

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

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.size(self.value))

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
        inputs: the arrays (or Python numbers) that the primitive was called on. While an outer tape
            watches a backward half: the Tensors and Variables instead (see `Primitive.gradient`).
        options: its keyword arguments.
        output: the array it returned, or its Tensor likewise; set after the forward half.
        needs: per input, whether its gradient is wanted. In the forward half: whether any tape watches it.
        saved: whatever the forward half leaves for the backward half.
        is_last: whether the backward half is called for the last time, and may let go of what was saved.
    """

    __slots__ = ("destinations", "inputs", "is_last", "needs", "options", "output", "saved")

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


class Node:
    """One recorded call."""

    __slots__ = ("context", "inputs", "primitive", "sequence", "tapes", "versions")

    def __init__(
        self,
        called: Primitive,
        inputs: tuple[Any, ...],
        context: Context,
        tapes: tuple[Recorder, ...],
    ) -> None:
        self.primitive = called
        self.inputs = inputs
        self.context: Context | None = context
        self.tapes = tapes
        self.sequence = next(_sequence)
        self.versions: tuple[tuple[Variable, int], ...] = ()
        if not called.linear:
            self.versions = tuple((i, i.version) for i in inputs if isinstance(i, Variable))

    def check_versions(self) -> None:
        """Raise RuntimeError if a variable has changed since, whose value the backward half reads."""
        for variable, version in self.versions:
            if variable.version != version:
                raise RuntimeError(
                    f"variable {variable.name!r} was changed after {self.primitive.name} read it, so a "
                    "gradient would mix old and new values. Take all gradients that go through it before it "
                    "is assigned or updated."
                )


class _Active(threading.local):
    def __init__(self) -> None:
        self.tapes: list[Recorder] = []


active = _Active()
"""The open tapes of this thread, outermost first."""


_Forward: TypeAlias = Callable[..., Any]
_Backward: TypeAlias = Callable[[Context, Any], Sequence[Any]]
_Composed: TypeAlias = Callable[..., Any]

naming: dict[str, Callable[[str], str]] = {"full_name": str}
"""How a result's name becomes a full one; `distopt.scopes` fills it (a lower level can't import it)."""

primitives: dict[str, Primitive] = {}
"""Every primitive by name; the tests check the gradient of each."""


class Primitive:
    """A function on arrays that tapes can differentiate; made by `@primitive`.

    Attributes:
        takes_slices: whether the backward half passes IndexedSlices on; others are given dense arrays.
        linear: whether the backward half reads no values of the inputs, only shapes and dtypes.
        gives_views: whether the result may share the first input's memory.
    """

    def __init__(self, forward: _Forward) -> None:
        self.__doc__ = _without_context(forward.__doc__)
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        self.__signature__ = inspect.Signature([*parameters, _NAME])
        self._takes = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        self._takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.__name__ = self.name = forward.__name__
        self.__module__ = forward.__module__
        self._forward = forward
        self.backward: _Backward | None = None
        self.composition: _Composed | None = None
        self.takes_slices = False
        self.linear = False
        self.gives_views = False
        if self.name in primitives:
            raise ValueError(f"there is a primitive named {self.name!r} already")
        primitives[self.name] = self

    def gradient(self, backward: _Backward) -> _Backward:
        """Register `backward(context, upstream)`, which returns one gradient (or None) per input.

        It must not change `upstream`, which other nodes may share.

        For second derivatives it is called with Tensors and Variables in the place of arrays, and has to
        compute with them: by operators, their methods and primitives (`alike`), with `value_of` for what
        counts as a constant. A formula that needs more than that has `composed` beside it.
        """
        self.backward = backward
        return backward

    def composed(self, composition: _Composed) -> _Composed:
        """Register the same function of other primitives, for second derivatives.

        `composition(*inputs, **options)` takes Tensors and returns a Tensor. It is computed, in the
        place of the backward half, only where an outer tape watches a gradient.
        """
        self.composition = composition
        return composition

    def alike(self, *inputs: Any, **options: Any) -> Any:
        """Compute; arrays give an array, Tensors and Variables a Tensor."""
        if any(isinstance(i, Operand) for i in inputs):
            return self(*inputs, **options)
        return self._forward(Context(inputs, options, (False,) * len(inputs)), *inputs, **options)

    def __call__(self, *inputs: Any, name: str | None = None, **options: Any) -> Tensor:
        """Compute on Tensors, Variables, arrays and numbers; leave a node on the tapes that watch them.

        Options may be given by position too, after the operands; lists of numbers or Tensors become one
        operand. With a `name` the result gets it, below the name scope in force.

        Raises:
            TypeError: more arguments than there are operands and options.
        """
        if self._takes_any or len(inputs) > len(self._takes):
            inputs = self._sorted_out(inputs, options)
        if any(isinstance(i, list | tuple) for i in inputs):
            inputs = tuple(as_operand(i, inputs) if isinstance(i, list | tuple) else i for i in inputs)
        full_name = None if name is None else naming["full_name"](name)
        values = tuple(i.value if isinstance(i, Operand) else adopted(i) for i in inputs)
        tapes = tuple(tape for tape in active.tapes if any(tape.watches(i) for i in inputs))
        needs = tuple(any(tape.watches(i) for tape in tapes) for i in inputs)
        options = {key: adopted(option) for key, option in options.items()}
        context = Context(values, options, needs)
        output = self._forward(context, *values, **options)
        if self.gives_views and isinstance(inputs[0], Variable):
            output = output.copy()  # what was read stays, whatever is assigned to the variable
        if not tapes:
            return Tensor(output, name=full_name)
        context.output = output
        return Tensor(output, Node(self, inputs, context, tapes), full_name)

    def _sorted_out(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        """Return the operands among positional arguments; the others go into `options`."""
        if not self._takes_any:
            operands, rest = inputs[: len(self._takes)], inputs[len(self._takes) :]
        elif inputs and isinstance(inputs[0], list | tuple):  # a list of operands, as in TensorFlow
            operands, rest = tuple(inputs[0]), inputs[1:]
        else:
            return inputs
        free = [option for option in self._options if option not in options]
        if len(rest) > len(free):
            raise TypeError(
                f"{self.name} takes the operands {', '.join(self._takes) or '...'} and the options "
                f"{', '.join(self._options) or 'none'}; got {len(inputs)} arguments by position"
            )
        options.update(zip(free, rest, strict=False))
        return operands

    def __repr__(self) -> str:
        return f"<primitive {self.name}>"


_NAME = inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY, default=None)


def _without_context(text: str | None) -> str | None:
    """Return a docstring without the line about the context, which callers don't pass."""
    lines = (text or "").splitlines()
    return "\n".join(line for line in lines if line.strip() != "context: of the tape.") or None


def as_operand(values: Any, others: Sequence[Any] = ()) -> Any:
    """Return a list of numbers as an array, one with Tensors in it as a Tensor they are stacked to.

    Args:
        values: list or tuple, nested or not.
        others: operands beside it: numbers take the dtype that these have, as Python's numbers do.
            Without any they become float32 and int32, as for a `Variable`.
    """
    leaves = list(_leaves(values))
    if any(isinstance(value, Operand) for value in leaves):
        return operators["stack"](
            [as_operand(v, leaves) if isinstance(v, list | tuple) else v for v in values]
        )
    array = np.asarray(values)
    if array.dtype.kind not in "fi" or any(hasattr(value, "dtype") for value in leaves):
        return array
    dtypes = [other.dtype for other in others if getattr(other, "dtype", None) is not None]
    beside = [dtype for dtype in dtypes if dtype.kind in ("fV" if array.dtype.kind == "f" else "ifV")]
    wanted = (
        np.result_type(*beside) if beside else np.dtype(np.float32 if array.dtype.kind == "f" else np.int32)
    )
    narrow = array.astype(wanted)
    # Whole numbers that don't fit stay what they are; fractions are rounded.
    return array if array.dtype.kind == "i" and (narrow != array).any() else narrow


def _leaves(nested: Any) -> Iterator[Any]:
    for item in nested:
        if isinstance(item, list | tuple):
            yield from _leaves(item)
        else:
            yield item


def primitive(forward: _Forward) -> Primitive:
    """Make a primitive of `forward(context, *arrays, **options) -> array`.

    Positional arguments are what it can be differentiated by, keyword arguments are options. Its
    vector-Jacobian product is given with `@name.gradient`, and, where that isn't a formula that Tensors can
    go through, its composed form with `@name.composed`.
    """
    return Primitive(forward)
