"""The CUDA kernels of every elementwise rule: compiled by NVRTC, run as C++ on a CPU, run on a GPU.

The first two need no GPU. Rules are taken from the registry, so a new optimizer's rule is tested by
being there.
"""

import ctypes
import importlib
import itertools
import pkgutil
import re
import shutil
import subprocess

import numpy as np
import pytest

import distopt.optimizers
from distopt.backend import gpu_status
from distopt.elementwise import (
    DTYPES,
    elementwise,
    exp,
    isfinite,
    isnan,
    log,
    maximum,
    minimum,
    sign,
    sqrt,
    square,
    where,
)

for _module in pkgutil.walk_packages(distopt.optimizers.__path__, "distopt.optimizers."):
    importlib.import_module(_module.name)  # fills the registry


@elementwise
def kernel_adam(value, gradient, m, v, *, learning_rate, beta_1, beta_2, epsilon):
    m = beta_1 * m + (1 - beta_1) * gradient
    v = beta_2 * v + (1 - beta_2) * gradient * gradient
    value = value - learning_rate * m / (sqrt(v) + epsilon)
    return value, m, v


@elementwise
def kernel_of_everything(a, b, c, fresh, *, rate, limit, tame: bool = True, swap: bool = False):
    near = (abs(a) <= limit) & ~(b == 2) | isnan(c) & isfinite(b) & (a != rate)
    fresh = where(near, sign(a), minimum(maximum(b, -limit), rate)) / (1 + square(c))
    c = where((a < b) | (c >= rate), -c, c**-0.5 if tame else c**3)
    if swap:
        a = b
    b = b * (limit - 1.5) + fresh
    return a, b, c, fresh


@elementwise
def kernel_of_curves(a, *, power):
    a = exp(-abs(a)) + log(1 + abs(a)) ** power
    return (a,)


ARCHITECTURES = [75, 80, 90, 100, 120]
VARIANTS = [
    (rule, dict(zip(rule.options, setting, strict=True)), dtype)
    for rule in elementwise.registry.values()
    if rule.function.__module__.partition(".")[0] in ("distopt", __name__)
    for setting in itertools.product((False, True), repeat=len(rule.options))
    for dtype in DTYPES
]


def entries(rule, dtype):
    return f"{rule.name}_{dtype}", f"{rule.name}_rows_{dtype}"


def all_sources(variants):
    """One file with the kernels of all variants, each in a namespace and under numbered names."""
    parts = ["#include <cuda_fp16.h>\n"]
    for number, (rule, options, dtype) in enumerate(variants):
        text = rule.cuda_source(dtype, **options)
        for entry in entries(rule, dtype):
            text, count = re.subn(rf"\b{entry}\(", f"k{number}_{entry}(", text)
            assert count == 1
        parts.append(f"namespace v{number} {{\n{text}\n}}\n")
    return "".join(parts)


@pytest.fixture(scope="module")
def nvrtc():
    pytest.importorskip("cupy", reason="CuPy, which brings the NVRTC bindings, isn't installed")
    binding = importlib.import_module("cupy.cuda").nvrtc
    try:
        binding.getVersion()
    except Exception as error:  # its loader raises RuntimeErrors of several packages
        pytest.skip(f"NVRTC can't be loaded: {error}")
    return binding


def compile_with_nvrtc(nvrtc, text, *options):
    headers = importlib.import_module("cuda.pathfinder").find_nvidia_header_directory("cudart")
    if headers is None:
        pytest.skip("the CUDA headers (nvidia-cuda-runtime) aren't installed")
    options = ("--std=c++17", "--fmad=false", f"-I{headers}", *options)
    program = nvrtc.createProgram(text, "rules.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        return nvrtc.getPTX(program), nvrtc.getCUBIN(program) if "sm_" in options[-1] else b""
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_rule_compiles_for_every_architecture(nvrtc, architecture):
    _, cubin = compile_with_nvrtc(nvrtc, all_sources(VARIANTS), f"-arch=sm_{architecture}")
    assert cubin[:4] == b"\x7fELF"
    for number, (rule, _, dtype) in enumerate(VARIANTS):
        for entry in entries(rule, dtype):
            assert f"k{number}_{entry}".encode() in cubin


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_move_16_bytes_at_a_time_and_never_fuse_a_product_into_a_sum(nvrtc, dtype):
    text = kernel_adam.cuda_source(dtype)
    ptx, _ = compile_with_nvrtc(nvrtc, text, "-arch=compute_80")
    ptx = ptx.decode() if isinstance(ptx, bytes) else ptx
    wide = r"\.v4\.[bfu]32|\.v2\.[bfu]64|\.v8"
    loads = len(re.findall(rf"ld\.global(?:\.nc)?(?:{wide})", ptx))
    stores = len(re.findall(rf"st\.global(?:{wide})", ptx))
    assert (loads, stores) == (4 * (stores // 3), 3 * (loads // 4))  # the compiler may unroll
    assert stores
    assert not re.search(r"\bfma\.rn\.f", ptx)


SHIM = """
#include <cmath>
#include <cstring>
using std::exp; using std::fabs; using std::log; using std::pow; using std::sqrt;
#define __global__
#define __device__
#define __forceinline__ inline
struct Place { unsigned x; };
static Place blockIdx, threadIdx, blockDim, gridDim;
extern "C" void stand_at(unsigned block, unsigned blocks, unsigned thread, unsigned threads) {
    blockIdx.x = block; gridDim.x = blocks; threadIdx.x = thread; blockDim.x = threads;
}
"""
HALF = """
#pragma once
struct __half { _Float16 value; };
inline float __half2float(__half half) { return half.value; }
inline __half __float2half_rn(float value) { return {(_Float16)value}; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """All kernels as a shared library of functions that compute one thread's share."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "cuda_fp16.h").write_text(HALF)
    (folder / "kernels.cpp").write_text(SHIM + all_sources(VARIANTS))
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fPIC"]
    command += ["-shared", "-I.", "kernels.cpp", "-o", "kernels.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if "_Float16" in done.stderr:
        pytest.skip("g++ is too old for 16-bit floats")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


BLOCKS, THREADS = 3, 5


def run_kernel(library, entry, sizes, arrays, scalars, control=None):
    kernel = getattr(library, entry)
    real = {"float64": ctypes.c_double}.get(arrays[0].dtype.name, ctypes.c_float)
    arguments = [
        *[ctypes.c_longlong(n) if isinstance(n, int) else ctypes.c_void_p(n.ctypes.data) for n in sizes],
        *[ctypes.c_void_p(array.ctypes.data) for array in arrays],
        *[real(scalar) for scalar in scalars],
        ctypes.c_void_p(None if control is None else control.ctypes.data),
    ]
    for block, thread in itertools.product(range(BLOCKS), range(THREADS)):
        library.stand_at(block, BLOCKS, thread, THREADS)
        kernel(*arguments)


def aligned(values, dtype, offset=0):
    """A copy that begins `offset` values behind a 16-byte boundary."""
    raw = np.empty(values.size * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 16 + offset * np.dtype(dtype).itemsize
    array = raw[start : start + values.size * np.dtype(dtype).itemsize].view(dtype)
    array[:] = values.ravel()
    return array.reshape(values.shape)


def values_for(rule, dtype, shape, with_specials):
    """Normally distributed numbers, and, at the front, every pairing of some special ones."""
    rng = np.random.default_rng(7)
    values = {name: rng.standard_normal(shape).astype(dtype) for name in rule.arrays}
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, 2.0, 1e-7], dtype)
    for place, array in enumerate(values.values() if with_specials else ()):
        spread = np.repeat(special, 8) if place % 2 else np.tile(special, 8)
        array[:64] = np.roll(spread, place // 2)
    return values


def scalars_for(rule):
    return {name: 0.1 + 0.07 * place for place, name in enumerate(rule.scalars)}


def assert_same(actual, expected, exact):
    if exact:
        np.testing.assert_array_equal(actual, expected)
    else:
        wide = np.float64
        tolerance = {2: 2e-3, 4: 2e-5, 8: 1e-12}[expected.dtype.itemsize]
        np.testing.assert_allclose(actual.astype(wide), expected.astype(wide), tolerance, tolerance)


@pytest.mark.parametrize(
    "number", range(len(VARIANTS)), ids=lambda n: "-".join(map(str, (VARIANTS[n][0].name, n)))
)
def test_a_kernel_run_as_cpp_has_the_bits_of_the_numpy_path(library, number):
    rule, options, dtype = VARIANTS[number]
    formula, scalars = rule.formula(**options), scalars_for(rule)
    for offset in (0, 1):  # with and without the path for aligned arrays
        values = values_for(rule, dtype, 1003, with_specials=formula.exact)
        expected = {name: values[name].copy() for name in formula.arrays}
        given = {name: aligned(values[name], dtype, offset) for name in formula.arrays}
        whole = [expected.get(name) for name in rule.arrays]
        rule(*whole, **scalars, **options, path="numpy")
        arrays = list(given.values())
        run_kernel(library, f"k{number}_{entries(rule, dtype)[0]}", [1003], arrays, scalars.values())
        for name in formula.arrays:
            assert_same(given[name], expected[name], formula.exact)


@pytest.mark.parametrize(
    "number", range(len(VARIANTS)), ids=lambda n: "-".join(map(str, (VARIANTS[n][0].name, n)))
)
def test_a_rows_kernel_run_as_cpp_has_the_bits_of_the_numpy_path(library, number):
    rule, options, dtype = VARIANTS[number]
    formula, scalars = rule.formula(**options), scalars_for(rule)
    indices = np.array([8, 0, 3, 5])
    tables = values_for(rule, dtype, (9, 7), with_specials=False)
    values = {n: tables[n] if n in rule.outputs else tables[n][:4].copy() for n in formula.arrays}
    expected = {name: array.copy() for name, array in values.items()}
    whole = [expected.get(name) for name in rule.arrays]
    rule.rows(indices, *whole, **scalars, **options, path="numpy")
    # The kernel passes over indices outside the table: static shapes are filled up with them.
    filled = np.array([8, -1, 0, 3, 9, 5])
    for name in values:
        if name not in rule.outputs:
            values[name] = np.insert(values[name], [1, 3], 99, axis=0)
    entry = f"k{number}_{entries(rule, dtype)[1]}"
    run_kernel(library, entry, [6, 9, 7, filled], list(values.values()), scalars.values())
    for name in rule.outputs:
        if name in values:
            assert_same(values[name], expected[name], formula.exact)


def test_a_control_array_replaces_the_scalars(library):
    number = VARIANTS.index((kernel_adam, {}, "float32"))
    values = values_for(kernel_adam, "float32", 100, with_specials=False)
    expected = [array.copy() for array in values.values()]
    kernel_adam(*expected, learning_rate=0.5, beta_1=0.25, beta_2=0.75, epsilon=1.0)
    control = np.array([0.5, 0.25, 0.75, 1.0], np.float32)
    run_kernel(
        library,
        f"k{number}_kernel_adam_float32",
        [100],
        list(values.values()),
        [0, 0, 0, 0],
        control,
    )
    for actual, wanted in zip(values.values(), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "number", range(len(VARIANTS)), ids=lambda n: "-".join(map(str, (VARIANTS[n][0].name, n)))
)
def test_a_gpu_has_the_bits_of_the_cpu(number):
    status = gpu_status()
    if not status.usable:
        pytest.skip(status.reason)
    cupy = importlib.import_module("cupy")
    rule, options, dtype = VARIANTS[number]
    formula, scalars = rule.formula(**options), scalars_for(rule)
    values = values_for(rule, dtype, 100_003, with_specials=formula.exact)
    expected = [values[n].copy() if n in formula.arrays else None for n in rule.arrays]
    given = [None if array is None else cupy.asarray(array) for array in expected]
    rule(*expected, **scalars, **options, path="numpy")
    rule(*given, **scalars, **options)
    for actual, wanted in zip(given, expected, strict=True):
        if actual is not None:
            assert_same(actual.get(), wanted, formula.exact)


@pytest.mark.gpu
def test_a_gpu_updates_rows_and_reads_its_control_array_when_the_kernel_runs():
    status = gpu_status()
    if not status.usable:
        pytest.skip(status.reason)
    cupy = importlib.import_module("cupy")
    tables = [np.full((50, 6), 0.5, np.float32) for _ in range(4)]
    tables[1] = np.ones((3, 6), np.float32)
    indices = np.array([7, 49, 0])
    given = [cupy.asarray(table) for table in tables]
    control = cupy.asarray([0.5, 0.25, 0.75, 1.0], dtype=np.float32)
    rows = cupy.asarray(indices)
    kernel_adam.rows(rows, *given, control=control)  # compiles
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        kernel_adam.rows(rows, *given, control=control)
        graph = stream.end_capture()
    control[0] = 0.125
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    rest = {"beta_1": 0.25, "beta_2": 0.75, "epsilon": 1.0, "path": "numpy"}
    kernel_adam.rows(indices, *tables, learning_rate=0.5, **rest)
    kernel_adam.rows(indices, *tables, learning_rate=0.125, **rest)
    for actual, wanted in zip(given, tables, strict=True):
        np.testing.assert_array_equal(actual.get(), wanted)
