"""Run a formula as one loop compiled by numba: the same bits as `blocked`, in a third of the time.

The loop is compiled without numba's `fastmath`. It would let the compiler fuse and reorder
operations, so results would depend on which path an array's size selects, and on the machine. It
would also gain nothing: the loop waits for memory (Adam over 25 million float32 values on one
thread: 12.2 ms strict, 12.3 ms with contraction, 12.2 ms with all flags but those that ignore NaN;
PyTorch's fused kernel 13.1 ms in the same run).

The machine code is kept in memory only: compiling takes 0.1 to 0.4 s per rule, which is less
trouble than files that many ranks write into one home directory at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distopt.backend import Array
from distopt.elementwise.formula import Formula, Node

__all__ = ["is_compiled", "run", "run_rows", "source", "usable"]

_compiled: set[tuple[Formula, np.dtype[Any]]] = set()


def usable() -> bool:
    """Whether numba is installed, works, and isn't switched off by DISTOPT_NUMBA=0."""
    return os.environ.get("DISTOPT_NUMBA", "1") != "0" and _numba() is not None


@functools.cache
def _numba() -> Any:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("numba")
    except Exception as error:  # a numba older than NumPy raises several kinds
        warnings.warn(
            f"numba is installed but can't be imported ({type(error).__name__}: {error}); "
            "optimizers run in NumPy, about three times slower. Update numba, or set "
            "DISTOPT_NUMBA=0.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def is_compiled(formula: Formula, dtype: np.dtype[Any]) -> bool:
    """Whether a formula's loop for a dtype exists in this process."""
    return (formula, dtype) in _compiled


def run(formula: Formula, arrays: Sequence[Array], scalars: Sequence[Any]) -> None:
    """Apply a formula to flat float32 or float64 NumPy arrays in place.

    Args:
        formula: with settled options.
        arrays: one array for each of `formula.arrays`, 1-D, contiguous, of one size and dtype.
        scalars: one value for each of `formula.scalars`, of the arrays' dtype.
    """
    _compile(formula, arrays[0].dtype)[0](arrays[0].size, *arrays, *scalars)


def run_rows(
    formula: Formula, indices: Array, width: int, arrays: Sequence[Array], scalars: Sequence[Any]
) -> None:
    """Apply a formula to some rows of tables in place.

    Args:
        formula: with settled options.
        indices: the rows, int64, 1-D, each inside the tables.
        width: values in a row.
        arrays: as for `run`; those that the rule returns are whole tables, the others have one row
            for each index.
        scalars: as for `run`.
    """
    _compile(formula, arrays[0].dtype)[1](indices, width, *arrays, *scalars)


@functools.cache
def _compile(formula: Formula, dtype: np.dtype[Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    names = {"real": dtype.type, "np": np}
    exec(compile(source(formula), f"<{formula.name} for numba>", "exec"), names)
    jit = _numba().njit(error_model="numpy", nogil=True)
    _compiled.add((formula, dtype))
    return jit(names["update"]), jit(names["update_rows"])


def source(formula: Formula) -> str:
    """Generate the Python source that numba compiles: `update` and `update_rows`."""
    parameters = [f"p_{name}" for name in formula.arrays] + [f"s_{name}" for name in formula.scalars]
    once, each = _statements(formula)
    rows = {name: "there" if name in formula.returned else "here" for name in formula.arrays}
    lines = [
        f"def update(size, {', '.join(parameters)}):",
        *[f"    {line}" for line in once],
        "    for i in range(size):",
        *[f"        {line.format(place='p')}" for line in each],
        "",
        f"def update_rows(indices, width, {', '.join(parameters)}):",
        *[f"    {line}" for line in once],
        "    for row in range(indices.size):",
        "        here = row * width",
        "        there = indices[row] * width",
        # Slices, since only indices that can't be negative let the inner loop be vectorised.
        *[f"        r_{name} = p_{name}[{row} : {row} + width]" for name, row in rows.items()],
        "        for i in range(width):",
        *[f"            {line.format(place='r')}" for line in each],
        "",
    ]
    return "\n".join(lines)


def _statements(formula: Formula) -> tuple[list[str], list[str]]:
    """Return what is computed once and for each element; arrays are `{place}_NAME[i]`."""
    once: list[str] = []
    each: list[str] = []
    for position, node in enumerate(formula.nodes):
        (each if node.varies else once).append(f"x{position} = {_expression(node)}")
    each += [f"{{place}}_{name}[i] = x{node}" for name, node in formula.results.items()]
    return once, each


_EXPRESSIONS = {
    "add": "{0} + {1}",
    "subtract": "{0} - {1}",
    "multiply": "{0} * {1}",
    "divide": "{0} / {1}",
    "power": "{0} ** {1}",
    "negative": "-{0}",
    "absolute": "abs({0})",
    "sqrt": "np.sqrt({0})",
    "exp": "np.exp({0})",
    "log": "np.log({0})",
    # As NumPy: 0 for both zeros, NaN for NaN.
    "sign": "real(1) if {0} > real(0) else (real(-1) if {0} < real(0) else {0} + real(0))",
    "maximum": "{0} if {0} >= {1} or {0} != {0} else {1}",
    "minimum": "{0} if {0} <= {1} or {0} != {0} else {1}",
    "where": "{1} if {0} else {2}",
    "isfinite": "abs({0}) < real(np.inf)",
    "isnan": "{0} != {0}",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "greater": "{0} > {1}",
    "greater_equal": "{0} >= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
    "logical_and": "{0} & {1}",
    "logical_or": "{0} | {1}",
    "logical_not": "not {0}",
}


def _expression(node: Node) -> str:
    match node.operation:
        case "array":
            return f"{{place}}_{node.label}[i]"
        case "scalar":
            return f"s_{node.label}"
        case "constant":
            return f"real({node.label})"
        case operation:
            return _EXPRESSIONS[operation].format(*[f"x{argument}" for argument in node.arguments])
