"""Run a formula with NumPy, block by block, in straight-line code that allocates nothing.

A block of every array fits in the processor's second-level cache together, so the arrays themselves
travel from memory once, as in a fused kernel. Results go where they are needed in the end as early
as possible: the old values of an array that is written become scratch space after their last use,
and most formulas need one or two blocks of scratch, which a thread keeps.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distopt.backend import Array
from distopt.elementwise.formula import Formula, Node

__all__ = ["BLOCK_BYTES", "run", "source"]

BLOCK_BYTES = 128 * 1024
"""Size of a block of one array. Adam over 25 million float32 values, one thread of a processor with
1 MiB of second-level cache: 33 ms with 128 KiB, 37 ms with 64 KiB, 45 ms with 32 KiB, 34 ms with
512 KiB."""

_FOREVER = 1 << 30


class _Scratch(threading.local):  # ranks can be threads of one process
    def __init__(self) -> None:
        self.blocks: dict[tuple[np.dtype[Any], int], list[Array]] = {}


_scratch = _Scratch()


def run(formula: Formula, arrays: Sequence[Array], scalars: Sequence[Any]) -> None:
    """Apply a formula to flat NumPy arrays in place.

    Args:
        formula: with settled options.
        arrays: one array for each of `formula.arrays`, 1-D, contiguous, of one size and dtype.
        scalars: one value for each of `formula.scalars`, of the compute type.
    """
    storage = arrays[0].dtype
    compute = compute_type(storage)
    function, numbers, truths = _compile(formula, storage)
    block = BLOCK_BYTES // compute.itemsize
    # NaN and infinity pass through in silence, as they do in compiled code and on a GPU.
    with np.errstate(all="ignore"):
        function(
            arrays[0].size,
            block,
            _blocks(compute, numbers, block) + _blocks(np.dtype(bool), truths, block),
            *arrays,
            *scalars,
        )


def compute_type(storage: np.dtype[Any]) -> np.dtype[Any]:
    """Return the type in which values are computed: float32 for float16, else the arrays' own."""
    return np.dtype(np.float32) if storage == np.float16 else storage


def _blocks(dtype: np.dtype[Any], count: int, block: int) -> list[Array]:
    blocks = _scratch.blocks.setdefault((dtype, block), [])
    while len(blocks) < count:
        blocks.append(np.empty(block, dtype))
    return blocks[:count]


_HELPERS: dict[str, Any] = {
    "add": np.add,
    "asarray": np.asarray,
    "bitwise_and": np.bitwise_and,
    "bitwise_xor": np.bitwise_xor,
    "clip": np.clip,
    "copyto": np.copyto,
    "multiply": np.multiply,
    "negative": np.negative,
}


@functools.cache
def _compile(formula: Formula, storage: np.dtype[Any]) -> tuple[Callable[..., None], int, int]:
    text, numbers, truths = source(formula, storage)
    names = _HELPERS | {name: getattr(np, name) for name in _ufuncs(formula)}
    real = compute_type(storage)
    names |= {"real": real.type, "bits": np.dtype(f"i{real.itemsize}"), "byte": np.dtype(np.int8)}
    numbers_used = {"huge": 2.0 ** (np.finfo(real).maxexp - 1), "zero": 0.0}
    numbers_used |= {"plus_one": 1.0, "minus_one": -1.0}
    names |= {name: np.asarray(number, real) for name, number in numbers_used.items()}
    exec(compile(text, f"<{formula.name} for NumPy>", "exec"), names)
    return names["update"], numbers, truths


def _ufuncs(formula: Formula) -> list[str]:
    leaves = ("array", "scalar", "constant")
    return [node.operation for node in formula.nodes if node.operation not in leaves]


def source(formula: Formula, storage: np.dtype[Any]) -> tuple[str, int, int]:
    """Generate the Python source of a formula's loop over blocks.

    Returns:
        The text, and how many blocks of numbers and of truth values it needs as scratch.
    """
    narrow = compute_type(storage) != storage
    plan = _Plan(formula, narrow)
    plan.place_operations()
    plan.place_results()
    scratch = [*plan.numbers, *plan.truths]
    head = [f"def update({', '.join(_parameters(formula))}):"]
    head += [f"    {', '.join(scratch)}, = scratch"] * bool(scratch)
    head += [f"    {line}" for line in _prologue(formula)]
    head += ["    for start in range(0, size, block):", "        stop = start + block"]
    if scratch:  # the last block is shorter
        head += ["        if stop > size:", "            length = size - start"]
        head += [f"            {name} = {name}[:length]" for name in scratch]
    for name in formula.arrays:
        view = f"v_{name}" if narrow else f"a_{name}"
        head += [f"        {view} = p_{name}[start:stop]"]
        if narrow and name in formula.reads:
            head += [f"        copyto(a_{name}, v_{name})"]
    body = [f"        {line}" for line in plan.lines]
    return "\n".join([*head, *body, ""]), len(plan.numbers), len(plan.truths)


def _parameters(formula: Formula) -> list[str]:
    arrays = [f"p_{name}" for name in formula.arrays]
    return ["size", "block", "scratch", *arrays, *[f"s_{name}" for name in formula.scalars]]


def _prologue(formula: Formula) -> list[str]:
    """Compute what is equal for all elements, as 0-d arrays: ufuncs take them as they are."""
    lines: list[str] = []
    for position, node in enumerate(formula.nodes):
        if node.varies:
            continue
        match node.operation:
            case "scalar":
                value = f"s_{node.label}"
            case "constant":
                value = f"real({node.label})"
            case operation:
                value = f"{operation}({', '.join(f'u{a}' for a in node.arguments)})"
        lines.append(f"u{position} = asarray({value})")
    return lines


@dataclass
class _Plan:
    """Gives every value a place: a block of an array that is written anyway, or scratch.

    Attributes:
        lines: the statements of the loop's body.
        numbers: names of the scratch blocks for numbers.
        truths: names of the scratch blocks for truth values.
    """

    formula: Formula
    narrow: bool
    lines: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        formula = self.formula
        self._order = [
            position
            for position, node in enumerate(formula.nodes)
            if node.varies and node.operation != "array"
        ]
        self._last_use: dict[int, int] = {}
        for time, position in enumerate(self._order):
            self._last_use.update(dict.fromkeys(formula.nodes[position].arguments, time))
        self._last_use.update(dict.fromkeys(formula.results.values(), _FOREVER))
        if self.narrow:  # the blocks are copies in the compute type, so all may be overwritten
            self._writable = [f"a_{name}" for name in formula.arrays]
            self.numbers.extend(self._writable)
        else:
            self._writable = [f"a_{name}" for name in formula.results]
        self._place = {
            position: f"a_{node.label}"
            for position, node in enumerate(formula.nodes)
            if node.operation == "array"
        }
        self._occupant = {place: position for position, place in self._place.items()}

    def place_operations(self) -> None:
        for time, position in enumerate(self._order):
            node = self.formula.nodes[position]
            dying = [a for a in node.arguments if self._last_use[a] == time and a in self._place]
            place = self._choose(position, node, dying)
            self._emit(node, place)
            for argument in dying:
                self._occupant.pop(self._place[argument], None)
            self._place[position] = place
            self._occupant[place] = position

    def place_results(self) -> None:
        """Copy the results that are not at home yet, none over one that is still to be copied."""
        moves = {
            f"a_{name}": self._argument(node)
            for name, node in self.formula.results.items()
            if self._argument(node) != f"a_{name}"
        }
        while moves:
            free = [place for place in moves if place not in moves.values()]
            if free:
                self.lines.append(f"copyto({free[0]}, {moves.pop(free[0])})")
            else:  # a circle: arrays that are exchanged
                place = next(iter(moves))
                saved = self._new(truth=False)
                self.lines.append(f"copyto({saved}, {place})")
                moves = {to: saved if source == place else source for to, source in moves.items()}
        if self.narrow:
            self.lines += [f"copyto(v_{name}, a_{name})" for name in self.formula.results]

    def _choose(self, position: int, node: Node, dying: Sequence[int]) -> str:
        at_home = [f"a_{name}" for name, result in self.formula.results.items() if result == position]
        in_cache = [self._place[argument] for argument in dying]
        scratch = self.truths if node.truth else self.numbers
        for place in [*at_home, *in_cache, *scratch, *self._writable]:
            occupant = self._occupant.get(place)
            free = occupant is None or occupant in dying
            fits = place in scratch or (place in self._writable and not node.truth)
            # `where` reads its third argument once more at the end.
            clash = node.operation == "where" and place == self._argument(node.arguments[2])
            if free and fits and not clash:
                return place
        return self._new(node.truth)

    def _new(self, truth: bool) -> str:
        blocks = self.truths if truth else self.numbers
        blocks.append(f"{'c' if truth else 'b'}{len(blocks)}")
        return blocks[-1]

    def _argument(self, position: int) -> str:
        return self._place[position] if self.formula.nodes[position].varies else f"u{position}"

    def _emit(self, node: Node, place: str) -> None:
        arguments = [self._argument(argument) for argument in node.arguments]
        if node.operation == "where":
            condition, chosen, otherwise = arguments
            self._emit_where(condition, chosen, otherwise, place)
        elif node.operation == "sign":
            self._emit_sign(arguments[0], place)
        else:
            self.lines.append(f"{node.operation}({', '.join(arguments)}, out={place})")

    def _emit_where(self, condition: str, chosen: str, otherwise: str, place: str) -> None:
        """Select bits with a mask: 10 us a block, where a masked copy of random bits takes 170."""
        spare = [b for b in [*self.numbers, *self._writable] if self._occupant.get(b) is None]
        mask = next((block for block in spare if block != place), None) or self._new(truth=False)
        self.lines += [
            f"mask = {mask}.view(bits)",
            f"copyto(mask, {condition}.view(byte))",
            "negative(mask, out=mask)",  # 1 becomes all ones
            f"target = {place}.view(bits)",
            f"other = {otherwise}.view(bits)",
            f"bitwise_xor({chosen}.view(bits), other, out=target)",
            "bitwise_and(mask, target, out=target)",
            "bitwise_xor(target, other, out=target)",
        ]

    def _emit_sign(self, argument: str, place: str) -> None:
        """Blow up and cut off: 14 us a block, where NumPy's branches take 350 on random signs."""
        self.lines += [
            f"multiply({argument}, huge, out={place})",  # twice: the smallest number passes one
            f"multiply({place}, huge, out={place})",
            f"clip({place}, minus_one, plus_one, out={place})",
            f"add({place}, zero, out={place})",  # turns -0.0 into 0.0
        ]
