"""Run a formula on a GPU: one generated CUDA kernel that reads every array once and writes it once.

The source is plain CUDA C++ with two entry points, `NAME_DTYPE` for whole arrays and
`NAME_rows_DTYPE` for rows of tables. It has no launch-time constants: it compiles with NVRTC for
any architecture, and as C++ with a few definitions in front, which is how the tests run it without
a GPU.

Fused multiply-add is switched off: the kernels wait for memory, and without it a formula that `is
exact` gives the bits of the CPU paths. The exception is float32 numbers below 1.2e-38, which CuPy's
compiler options turn to zero.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from distopt.backend import Array, device_of
from distopt.elementwise.formula import Formula, Node

__all__ = ["COMPILE_OPTIONS", "run", "run_rows", "source"]

COMPILE_OPTIONS = ("--std=c++17", "--fmad=false")
"""What NVRTC is given to keep every operation rounded by itself."""

_THREADS = 256
_MOST_BLOCKS = 4096  # several waves on the largest GPU; the loop in the kernel does the rest

_STORAGE = {"float16": "__half", "float32": "float", "float64": "double"}


def run(formula: Formula, arrays: Sequence[Array], scalars: Sequence[Any], control: Array | None) -> None:
    """Apply a formula to flat CuPy arrays in place, on the current stream of their device.

    Starts one kernel and waits for nothing. The first call for a formula and dtype compiles it,
    which must not happen while a CUDA graph is captured: call once before.

    Args:
        formula: with settled options.
        arrays: one array for each of `formula.arrays`, 1-D, contiguous, of one size, dtype and
            device.
        scalars: one value for each of `formula.scalars`, of the compute type.
        control: None, or a device array that the kernel reads the scalars from.
    """
    size = int(arrays[0].size)
    per_thread = 16 // arrays[0].dtype.itemsize
    device = device_of(arrays[0])
    dtype = arrays[0].dtype.name
    with device.activate():
        kernel = _kernel(device.xp, formula, dtype, f"{formula.name}_{dtype}")
        _launch(kernel, -(-size // per_thread), [np.int64(size)], arrays, scalars, control)


def run_rows(
    formula: Formula,
    indices: Array,
    height: int,
    width: int,
    arrays: Sequence[Array],
    scalars: Sequence[Any],
    control: Array | None,
) -> None:
    """Apply a formula to some rows of tables in place; an index outside the tables is passed over.

    Args:
        formula: with settled options.
        indices: the rows, int64, 1-D, no row twice.
        height: rows in a table.
        width: values in a row.
        arrays: those that the rule returns are whole tables, the others have one row for each
            index.
        scalars: as for `run`.
        control: as for `run`.
    """
    device = device_of(arrays[0])
    dtype = arrays[0].dtype.name
    with device.activate():
        kernel = _kernel(device.xp, formula, dtype, f"{formula.name}_rows_{dtype}")
        sizes = [np.int64(indices.size), np.int64(height), np.int64(width), indices]
        _launch(kernel, int(indices.size) * width, sizes, arrays, scalars, control)


def _launch(
    kernel: Any,
    threads: int,
    sizes: Sequence[Any],
    arrays: Sequence[Array],
    scalars: Sequence[Any],
    control: Array | None,
) -> None:
    blocks = min(-(-threads // _THREADS), _MOST_BLOCKS)
    pointer = np.uint64(0) if control is None else control
    kernel((blocks,), (_THREADS,), (*sizes, *arrays, *scalars, pointer))


@functools.cache
def _module(xp: Any, formula: Formula, dtype: str) -> Any:
    return xp.RawModule(code=source(formula, dtype), options=COMPILE_OPTIONS, backend="nvrtc")


@functools.cache
def _kernel(xp: Any, formula: Formula, dtype: str, entry: str) -> Any:
    return _module(xp, formula, dtype).get_function(entry)


def source(formula: Formula, dtype: str) -> str:
    """Generate the CUDA C++ source of a formula for arrays of "float16", "float32" or "float64".

    Parameters of the entry points, in order: the sizes; a pointer for each of `formula.arrays`;
    each of `formula.scalars` in the compute type (float for float16 and float32, else double); and
    a pointer, which may be null, to an array of the scalars in device memory, which is taken
    instead of them.
    """
    settings = ", ".join(f"{name}={value}" for name, value in formula.options.items())
    narrow = dtype == "float16"
    return _TEMPLATE.format(
        title=f"{formula.name}({settings}) for {dtype}",
        include="#include <cuda_fp16.h>\n" if narrow else "",
        storage=_STORAGE[dtype],
        real="double" if dtype == "float64" else "float",
        lanes=16 // np.dtype(dtype).itemsize,
        load="__half2float(value)" if narrow else "value",
        store="__float2half_rn(value)" if narrow else "value",
        scalars="".join(f"    real {name};\n" for name in _scalar_fields(formula)),
        update=_update(formula),
        given=", ".join(f"s_{name}" for name in formula.scalars) or "real(0)",
        aligned=" | ".join(f"reinterpret_cast<unsigned long long>(p_{n})" for n in formula.arrays),
        dense_entry=f"{formula.name}_{dtype}",
        rows_entry=f"{formula.name}_rows_{dtype}",
        parameters=_parameters(formula),
        pack_loads="\n".join(_pack_load(formula, name) for name in formula.arrays),
        pack_lanes=_arguments(formula, "k_{0}.lane[lane]"),
        pack_stores="\n".join(
            f"            reinterpret_cast<Pack*>(p_{name})[pack] = k_{name};" for name in formula.results
        ),
        elements=_arguments(formula, "p_{0}[i]"),
        row_elements=", ".join(
            f"p_{name}[{'there' if name in formula.returned else 'here'}]" for name in formula.arrays
        ),
    )


def _scalar_fields(formula: Formula) -> list[str]:
    return [f"s_{name}" for name in formula.scalars] or ["unused"]


def _pack_load(formula: Formula, name: str) -> str:
    if name not in formula.reads:
        return f"            Pack k_{name};"
    const = "" if name in formula.results else "const "
    return f"            {const}Pack k_{name} = reinterpret_cast<const Pack*>(p_{name})[pack];"


def _arguments(formula: Formula, argument: str) -> str:
    return ", ".join(argument.format(name) for name in formula.arrays)


def _parameters(formula: Formula) -> str:
    arrays = [
        f"{'' if name in formula.results else 'const '}storage* __restrict__ p_{name}"
        for name in formula.arrays
    ]
    scalars = [f"real s_{name}" for name in formula.scalars]
    return ", ".join([*arrays, *scalars, "const Scalars* control"])


def _update(formula: Formula) -> str:
    """Write the function that computes one element; compilers hoist what doesn't vary."""
    parameters = ", ".join(
        f"storage{'' if name in formula.results else ' const'}& a_{name}" for name in formula.arrays
    )
    lines = [f"__device__ __forceinline__ void update(const Scalars& s, {parameters}) {{"]
    for position, node in enumerate(formula.nodes):
        kind = "bool" if node.truth else "real"
        lines.append(f"    const {kind} x{position} = {_expression(node)};")
    lines += [f"    a_{name} = store(x{node});" for name, node in formula.results.items()]
    return "\n".join([*lines, "}"])


_EXPRESSIONS = {
    "add": "{0} + {1}",
    "subtract": "{0} - {1}",
    "multiply": "{0} * {1}",
    "divide": "{0} / {1}",
    "power": "pow({0}, {1})",
    "negative": "-{0}",
    "absolute": "fabs({0})",
    "sqrt": "sqrt({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    # As NumPy: 0 for both zeros, NaN for NaN. fmax and fmin would drop a NaN.
    "sign": "{0} > 0 ? real(1) : {0} < 0 ? real(-1) : {0} + real(0)",
    "maximum": "{0} >= {1} || {0} != {0} ? {0} : {1}",
    "minimum": "{0} <= {1} || {0} != {0} ? {0} : {1}",
    "where": "{0} ? {1} : {2}",
    "isfinite": "{0} - {0} == 0",
    "isnan": "{0} != {0}",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "greater": "{0} > {1}",
    "greater_equal": "{0} >= {1}",
    "equal": "{0} == {1}",
    "not_equal": "{0} != {1}",
    "logical_and": "{0} && {1}",
    "logical_or": "{0} || {1}",
    "logical_not": "!{0}",
}


def _expression(node: Node) -> str:
    match node.operation:
        case "array":
            return f"load(a_{node.label})"
        case "scalar":
            return f"s.s_{node.label}"
        case "constant":
            return f"real({node.label})"
        case operation:
            return _EXPRESSIONS[operation].format(*[f"x{argument}" for argument in node.arguments])


_TEMPLATE = """\
// {title}, generated by distopt.elementwise.
{include}
typedef {storage} storage;
typedef {real} real;

struct Scalars {{
{scalars}}};

struct alignas(16) Pack {{
    storage lane[{lanes}];
}};

__device__ __forceinline__ real load(storage value) {{ return {load}; }}
__device__ __forceinline__ storage store(real value) {{ return {store}; }}

{update}

extern "C" __global__ void {dense_entry}(long long size, {parameters}) {{
    Scalars s = {{{given}}};
    if (control) s = *control;
    const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long stride = gridDim.x * (long long)blockDim.x;
    long long done = 0;
    if ((({aligned}) & 15) == 0) {{
        const long long packs = size / {lanes};
        for (long long pack = first; pack < packs; pack += stride) {{
{pack_loads}
#pragma unroll
            for (int lane = 0; lane < {lanes}; ++lane) {{
                update(s, {pack_lanes});
            }}
{pack_stores}
        }}
        done = packs * {lanes};
    }}
    for (long long i = done + first; i < size; i += stride) {{
        update(s, {elements});
    }}
}}

extern "C" __global__ void {rows_entry}(long long count, long long height, long long width,
                                        const long long* __restrict__ indices, {parameters}) {{
    Scalars s = {{{given}}};
    if (control) s = *control;
    const long long first = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    const long long stride = gridDim.x * (long long)blockDim.x;
    for (long long here = first; here < count * width; here += stride) {{
        const long long row = indices[here / width];
        if (row < 0 || row >= height) continue;
        const long long there = row * width + here % width;
        update(s, {row_elements});
    }}
}}
"""
