"""How long one optimizer step takes on a CPU: Adam over one flat array, here and in PyTorch.

Every competitor updates arrays of its own from the same gradient, on one thread; ours by the formula that
`distopt.optimizers.Adam` runs over its arena. After the last round their weights are compared, so a fast
wrong result would show.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from distopt.backend import Array
from distopt.bench.report import (
    environment,
    interleave,
    ratios,
    summarize,
    write_json,
)
from distopt.elementwise import jitted
from distopt.optimizers.adam import adam

__all__ = ["main", "run"]

_STREAMS = 7  # value, m and v are read and written, the gradient is read
_BETA_1, _BETA_2, _EPSILON, _LEARNING_RATE = 0.9, 0.999, 1e-8, 1e-3


def run(
    size: int = 25_000_000, repeats: int = 7, dtype: Literal["float32", "float64"] = "float32"
) -> dict[str, Any]:
    """Time Adam steps of blocked NumPy, numba, and PyTorch's fused and foreach Adam, interleaved.

    Args:
        size: number of values.
        repeats: rounds that count; one more is a warm-up.
        dtype: of all arrays.

    Returns:
        `seconds` (a summary for each competitor), `over_torch_fused` (a summary of its time over
        that of PyTorch's fused kernel, round by round), `gigabytes_per_second`,
        `largest_difference` of the weights from those of the first competitor, `left_out` (why),
        and `environment`.

    Raises:
        ValueError: `size` or `repeats` is below 1, or `dtype` is another one.
    """
    if size < 1 or dtype not in ("float32", "float64"):
        raise ValueError(f"size must be positive, dtype float32 or float64; got {size}, {dtype!r}.")
    gradient = np.random.default_rng(0).standard_normal(size, np.dtype(dtype).type)
    competitors: dict[str, tuple[Callable[[], object], Array]] = {"numpy": _own("numpy", gradient)}
    left_out: dict[str, str] = {}
    if jitted.usable():
        competitors["numba"] = _own("numba", gradient)
    else:
        left_out["numba"] = "not installed or switched off; pip install 'distopt[cpu]'"
    if importlib.util.find_spec("torch") is not None:
        competitors["torch_fused"] = _torch(gradient, fused=True)
        competitors["torch_foreach"] = _torch(gradient, foreach=True)
    else:
        left_out["torch"] = "not installed; pip install 'distopt[bench]'"
    seconds = interleave({name: step for name, (step, _) in competitors.items()}, repeats)
    moved = _STREAMS * gradient.nbytes / 1e9
    reference = competitors["numpy"][1]
    return {
        "benchmark": "apply",
        "size": size,
        "dtype": dtype,
        "threads": 1,
        "seconds": {name: summarize(times) for name, times in seconds.items()},
        "over_torch_fused": ratios(seconds, "torch_fused") if "torch_fused" in seconds else {},
        "gigabytes_per_second": {name: moved / summarize(times)["median"] for name, times in seconds.items()},
        "largest_difference": {
            name: float(np.abs(value - reference).max()) for name, (_, value) in competitors.items()
        },
        "left_out": left_out,
        "environment": environment(),
    }


def _own(path: Literal["numpy", "numba"], gradient: Array) -> tuple[Callable[[], object], Array]:
    value, m, v = np.ones_like(gradient), np.zeros_like(gradient), np.zeros_like(gradient)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        root = math.sqrt(1 - _BETA_2**steps)
        adam(
            value,
            gradient,
            m,
            v,
            None,
            rate=_LEARNING_RATE * root / (1 - _BETA_1**steps),
            beta_1=_BETA_1,
            beta_2=_BETA_2,
            epsilon=_EPSILON * root,  # PyTorch adds it to the corrected root
            path=path,
        )

    return step, value


def _torch(gradient: Array, **kind: bool) -> tuple[Callable[[], object], Array]:
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(1)
    value = np.ones_like(gradient)
    parameter = torch.nn.Parameter(torch.from_numpy(value))
    parameter.grad = torch.from_numpy(gradient)
    optimizer = torch.optim.Adam(
        [parameter], lr=_LEARNING_RATE, betas=(_BETA_1, _BETA_2), eps=_EPSILON, **kind
    )
    return optimizer.step, value


def main(size: int, repeats: int, dtype: Literal["float32", "float64"], json_path: str | None) -> None:
    """Run the benchmark, print one line per competitor, and write JSON."""
    result = run(size, repeats, dtype)
    print(f"Adam over {size:,} {dtype} values, one thread, {repeats} rounds:")
    for name, seconds in result["seconds"].items():
        ratio = result["over_torch_fused"].get(name)
        compared = f", {ratio['median']:.2f} x torch_fused" if ratio else ""
        print(
            f"  {name:14} {seconds['median'] * 1e3:7.1f} ms "
            f"({seconds['low'] * 1e3:.1f} to {seconds['high'] * 1e3:.1f}){compared}"
        )
    for name, reason in result["left_out"].items():
        print(f"  {name:14} left out: {reason}")
    write_json(result, json_path)
