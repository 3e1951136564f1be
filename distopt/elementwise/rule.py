"""`@elementwise` and `Rule`: check a call's arrays and scalars, and send it down the right path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from distopt.backend import Array, memory_pool, namespace
from distopt.elementwise import blocked, cuda, jitted
from distopt.elementwise.checks import check_arrays, check_indices, dtype_name, kind_of, number
from distopt.elementwise.formula import Formula, Signature
from distopt.elementwise.reader import read_formulas

__all__ = ["CpuPath", "Elementwise", "Rule", "elementwise"]

CpuPath: TypeAlias = Literal["auto", "numpy", "numba"]

_JIT_FROM_SIZE = 262_144
"""Arrays from this size on are worth compiling a loop for; Adam in NumPy takes 0.4 ms there."""


class Rule:
    """One elementwise formula, ready to update arrays in place; made by `@elementwise`.

    Attributes:
        name: the function's name.
        function: the function itself, which can be called on NumPy arrays: it returns new values
            (but an augmented assignment in it changes its argument).
        arrays: names of the positional parameters.
        scalars: names of the keyword-only parameters that are numbers.
        options: names of the keyword-only parameters annotated `bool`.
        defaults: default values of scalars and options.
        outputs: the arrays that the function returns, and that a call updates.
        formulas: what was read, by the settings of the options.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        read: tuple[Signature, Mapping[tuple[bool, ...], Formula]] | None = None,
    ) -> None:
        # `read` is there where the formulas were made from another rule's, not from a source.
        signature, self.formulas = read or read_formulas(function)
        self.name = function.__name__
        self.function = function
        self.arrays = signature.arrays
        self.scalars = signature.scalars
        self.options = signature.options
        self.defaults: Mapping[str, float | bool] = signature.defaults
        self.outputs = next(iter(self.formulas.values())).returned
        functools.update_wrapper(self, function)

    def __reduce__(self) -> tuple[Callable[[str], Rule], tuple[str]]:
        return _named, (self.name,)  # copies of optimizers share their rules

    def __repr__(self) -> str:
        return f"<elementwise rule {self.name}({', '.join(self.arrays)})>"

    def __call__(
        self,
        *arrays: Array | None,
        control: Array | None = None,
        path: CpuPath = "auto",
        **settings: Any,
    ) -> None:
        """Update the arrays named in `outputs` in place.

        Args:
            *arrays: one for each name in `self.arrays`: NumPy or CuPy, float16, float32 or float64,
                of one shape. Those that are updated must be C-contiguous and writable and overlap
                no other. An array that the chosen options make unused can be None.
            control: all scalars in the order of `self.scalars`, as a 1-D array on the arrays'
                device, in their type (float32 for float16). A GPU reads it when the kernel runs, so
                a captured CUDA graph sees new values in it. Instead of scalars by keyword.
            path: "numpy" or "numba" to insist on one of the CPU's paths. They give the same bits
                unless the formula has exp, log or a general power; such formulas are left to NumPy.
            **settings: scalars as Python numbers, rounded to the compute type first, and options.

        Raises:
            TypeError: an array, scalar or option is missing, unknown or of the wrong kind.
            ValueError: arrays differ in shape, dtype or device, or can't be updated in place.

        Cost: each array is read once and each updated one written once. Adam over 25 million
        float32 values takes 12 ms by numba and 33 ms by NumPy on one thread of an AMD Zen 5.
        """
        formula, scalars = self._settle(settings, control)
        used = self._used(formula, arrays)
        check_arrays(self.name, used, formula)
        first = next(iter(used.values()))
        for name, array in used.items():
            if array.shape != first.shape:
                raise ValueError(
                    f"{self.name}: {name} has shape {array.shape}, but {next(iter(used))} has "
                    f"{first.shape}. All arrays of an elementwise rule have one shape."
                )
        if first.size:
            xp = namespace(first)
            flat = [xp.ascontiguousarray(array).reshape(-1) for array in used.values()]
            values = self._values(scalars, control, first)
            if xp is np:
                _cpu_path(formula, first.dtype, first.size, path).run(formula, flat, values)
            else:
                cuda.run(formula, flat, values, control)

    def rows(
        self,
        indices: Array,
        *arrays: Array | None,
        control: Array | None = None,
        path: CpuPath = "auto",
        **settings: Any,
    ) -> None:
        """Update some rows of tables in place, as a sparse gradient asks for.

        Args:
            indices: the rows, integers, 1-D, no row twice. On a GPU an index outside the tables is
                passed over, and rows named twice are not noticed: looking would make the host wait.
            *arrays: those in `self.outputs` are whole tables of shape [rows, ...]; the others have
                one row for each index, shape [len(indices), ...].
            control: as in a call.
            path: as in a call.
            **settings: as in a call.

        Raises:
            TypeError: as in a call, or `indices` are no integers.
            ValueError: as in a call, or an index appears twice.
            IndexError: an index is outside the tables.
        """
        formula, scalars = self._settle(settings, control)
        used = self._used(formula, arrays)
        check_arrays(self.name, used, formula)
        height, width = self._check_rows(indices, used)
        if not indices.size or not width:
            return
        xp = namespace(indices)
        rows: Array = xp.ascontiguousarray(indices, dtype=np.int64)
        first = next(iter(used.values()))
        values = self._values(scalars, control, first)
        flat = {name: xp.ascontiguousarray(array).reshape(-1) for name, array in used.items()}
        if xp is not np:
            cuda.run_rows(formula, rows, height, width, [*flat.values()], values, control)
            return
        check_indices(self.name, rows, height)
        if _cpu_path(formula, first.dtype, rows.size * width, path) is jitted:
            jitted.run_rows(formula, rows, width, [*flat.values()], values)
        else:
            self._gathered(formula, rows, {n: a.reshape(-1, width) for n, a in flat.items()}, values)

    def formula(self, **options: bool) -> Formula:
        """Return the formula with settled options; those left out take their defaults."""
        return self._settle(dict.fromkeys(self.scalars, 0.0) | options, None)[0]

    def uses(self, **options: bool) -> tuple[str, ...]:
        """Return the arrays that are read or written with these options; the others can be None."""
        return self.formula(**options).arrays

    def cuda_source(self, dtype: Any, **options: bool) -> str:
        """Return the CUDA C++ source of the kernels for a dtype and a setting of the options."""
        return cuda.source(self.formula(**options), dtype_name(self.name, np.dtype(dtype)))

    def python_source(self, dtype: Any, path: Literal["numpy", "numba"], **options: bool) -> str:
        """Return the Python source of one of the CPU paths, for reading."""
        formula = self.formula(**options)
        if path == "numba":
            return jitted.source(formula)
        return blocked.source(formula, np.dtype(dtype_name(self.name, np.dtype(dtype))))[0]

    def _settle(self, settings: Mapping[str, Any], control: Array | None) -> tuple[Formula, list[float]]:
        known = (*self.scalars, *self.options)
        for name in settings:
            if name not in known:
                raise TypeError(
                    f"{self.name} has no scalar or option {name!r} (given {settings[name]!r}); it "
                    f"takes {', '.join(known) or 'none'}, by keyword."
                )
        if control is not None and (both := [name for name in self.scalars if name in settings]):
            raise TypeError(
                f"{self.name}: the scalars {', '.join(both)} are given by keyword and also in "
                "`control`. Give them in one way."
            )
        values = {**self.defaults, **settings}
        wanted = known if control is None else self.options
        if missing := [name for name in wanted if name not in values]:
            raise TypeError(f"{self.name} needs {', '.join(missing)} by keyword; given: {settings}.")
        for name in self.options:
            if not isinstance(values[name], bool | np.bool_):
                raise TypeError(
                    f"{self.name}: the static option {name} must be True or False, got {values[name]!r}."
                )
        scalars = [] if control is not None else [number(self.name, n, values[n]) for n in self.scalars]
        return self.formulas[tuple(bool(values[name]) for name in self.options)], scalars

    def _used(self, formula: Formula, arrays: Sequence[Array | None]) -> dict[str, Array]:
        if len(arrays) != len(self.arrays):
            raise TypeError(
                f"{self.name} takes {len(self.arrays)} arrays ({', '.join(self.arrays)}), got {len(arrays)}."
            )
        used: dict[str, Array] = {}
        for name, array in zip(self.arrays, arrays, strict=True):
            if name in formula.arrays:
                if array is None:
                    raise TypeError(
                        f"{self.name}: {name} is None, but with {dict(formula.options)} it is needed."
                    )
                used[name] = array
        return used

    def _values(self, scalars: Sequence[float], control: Array | None, array: Array) -> list[Any]:
        """Round the scalars to the compute type; under a GPU's control array they are not read."""
        dtype = blocked.compute_type(array.dtype)
        if control is None:
            with np.errstate(over="ignore"):  # infinity is what a float32 kernel would see
                return [dtype.type(scalar) for scalar in scalars]
        if namespace(control) is not namespace(array):
            raise TypeError(
                f"{self.name}: `control` is a {kind_of(control)} array, the others are "
                f"{kind_of(array)} arrays."
            )
        if control.shape != (len(self.scalars),) or control.dtype != dtype:
            raise ValueError(
                f"{self.name}: `control` must hold {', '.join(self.scalars)} as {dtype} in shape "
                f"({len(self.scalars)},), got {control.dtype} in {control.shape}."
            )
        if not control.flags.c_contiguous:
            raise ValueError(f"{self.name}: `control` must be contiguous, has strides {control.strides}.")
        return [*control] if namespace(array) is np else [dtype.type(0)] * len(self.scalars)

    def _check_rows(self, indices: Array, used: Mapping[str, Array]) -> tuple[int, int]:
        """Return the height of the tables and the number of values in a row."""
        kind = getattr(getattr(indices, "dtype", None), "kind", "?")
        if kind not in "iu" or indices.ndim != 1:
            raise TypeError(
                f"{self.name}.rows: indices must be a 1-D array of integers, got "
                f"{type(indices).__name__} of {getattr(indices, 'dtype', 'no dtype')}."
            )
        table_name, table = next((n, a) for n, a in used.items() if n in self.outputs)
        if namespace(indices) is not namespace(table):
            raise TypeError(
                f"{self.name}.rows: indices are in a {kind_of(indices)} array, the tables are "
                f"{kind_of(table)} arrays. Keep all on one device."
            )
        if not table.ndim:
            raise ValueError(f"{self.name}.rows: {table_name} has no dimensions; a table has rows.")
        for name, array in used.items():
            shape = table.shape if name in self.outputs else (indices.size, *table.shape[1:])
            if array.shape != shape:
                raise ValueError(
                    f"{self.name}.rows: {name} has shape {array.shape}, expected {shape}: "
                    f"{indices.size} indices into {table_name} of shape {table.shape}."
                )
        height = int(table.shape[0])
        return height, int(table.size) // height if height else 1

    def _gathered(
        self, formula: Formula, rows: Array, tables: Mapping[str, Array], values: Sequence[Any]
    ) -> None:
        """Gather, update and scatter as many rows at a time as a block holds."""
        first = next(iter(tables.values()))
        some = max(1, blocked.BLOCK_BYTES // (first.itemsize * first.shape[1]))
        for start in range(0, rows.size, some):
            chosen = rows[start : start + some]
            parts: dict[str, Array] = {}
            for name, table in tables.items():
                if name not in self.outputs:
                    parts[name] = table[start : start + some]
                    continue
                parts[name] = memory_pool.empty((chosen.size, first.shape[1]), table.dtype)
                if name in formula.reads:
                    # The indices were checked; "clip" is the mode that writes to `out` directly.
                    np.take(table, chosen, axis=0, out=parts[name], mode="clip")
            blocked.run(formula, [part.reshape(-1) for part in parts.values()], values)
            for name in formula.results:
                tables[name][chosen] = parts[name]


def _cpu_path(formula: Formula, dtype: np.dtype[Any], size: int, path: CpuPath) -> Any:
    if path == "numpy":
        return blocked
    compilable = dtype != np.float16
    if path == "numba":
        if not jitted.usable() or not compilable:
            missing = "numba is missing, broken, or switched off by DISTOPT_NUMBA=0"
            reason = missing if compilable else "numba has no float16 on a CPU"
            raise ValueError(f"{formula.name}: path 'numba' can't run on {dtype}: {reason}.")
        return jitted
    if path != "auto":
        raise ValueError(f"{formula.name}: path must be 'auto', 'numpy' or 'numba', got {path!r}.")
    # Which path is taken depends on sizes and history, so it must not show in the bits.
    wanted = size >= _JIT_FROM_SIZE or jitted.is_compiled(formula, dtype)
    return jitted if compilable and formula.exact and wanted and jitted.usable() else blocked


class Elementwise:
    """The decorator that makes a `Rule` of a formula, and keeps all rules.

    Attributes:
        registry: every rule by its name.
    """

    def __init__(self) -> None:
        self.registry: dict[str, Rule] = {}

    def __call__(self, function: Callable[..., Any]) -> Rule:
        """Read a formula and return its rule.

        Raises:
            SyntaxError: the formula uses something that can't be generated; it names line and
                construct.
            ValueError: the source can't be found, or another function's rule has this name.
        """
        return self.add(Rule(function))

    def add(self, rule: Rule) -> Rule:
        """Put a rule into the registry and return it.

        Raises:
            ValueError: another function's rule has its name.
        """
        known = self.registry.get(rule.name)
        if known is not None and _origin(known.function) != _origin(rule.function):
            raise ValueError(
                f"there is a rule {rule.name!r} in {'.'.join(_origin(known.function))} already; "
                f"names of rules are unique. Rename the one in {'.'.join(_origin(rule.function))}."
            )
        self.registry[rule.name] = rule
        return rule


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _named(name: str) -> Rule:
    return elementwise.registry[name]


elementwise = Elementwise()
"""The decorator; see the package's docstring."""
