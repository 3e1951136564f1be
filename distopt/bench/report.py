"""What benchmarks share: fair timing of competitors, summaries, and results with their origin.

Competitors take turns, one call each per round, so a neighbour's load or a change of the clock hits
all of them. They are compared by the ratio within a round, whose median such changes hardly move.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distopt.backend import gpu_status

__all__ = ["argument_parser", "environment", "interleave", "ratios", "summarize", "write_json"]

_PACKAGES = ("distopt", "numpy", "numba", "cupy-cuda13x", "cupy-cuda12x", "mpi4py", "torch")
_VARIABLES = ("OMP_", "OPENBLAS_", "MKL_", "NUMBA_", "DISTOPT_", "CUDA_VISIBLE_DEVICES", "NCCL_")


def interleave(
    competitors: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turns, in an order that is rotated from round to round.

    Args:
        competitors: what to call, by name. A call must include waiting for a device.
        repeats: rounds that count.
        warmup: rounds before them that don't: compilation, first touch of memory.
        clock: gives seconds.

    Returns:
        The seconds of each competitor in each round.

    Raises:
        ValueError: `repeats` is below 1 or there is no competitor.
    """
    if repeats < 1 or not competitors:
        raise ValueError(
            f"repeats must be at least 1, got {repeats}, and so must be the number of competitors, "
            f"got {len(competitors)}."
        )
    names = list(competitors)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = clock()
            competitors[name]()
            took = clock() - begin
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the quartiles as `low` and `high`, the extremes, and the count."""
    if len(values) == 1:
        low = high = values[0]
    else:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "median": statistics.median(values),
        "low": low,
        "high": high,
        "least": min(values),
        "most": max(values),
        "count": len(values),
    }


def ratios(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Summarize each competitor's time over the baseline's in the same round; below 1 is faster."""
    return {
        name: summarize([a / b for a, b in zip(times, seconds[baseline], strict=True)])
        for name, times in seconds.items()
    }


def environment(*, gpu: bool = False) -> dict[str, Any]:
    """Return the machine, the versions, the commit and the command that a result is from.

    Args:
        gpu: also look for GPUs, which loads CuPy and runs a kernel.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": _commit(),
        "processor": _processor(),
        "cores_usable": _cores_usable(),
        "load_average": os.getloadavg()[0],
        "gpu": gpu_status().reason if gpu else "not looked for",
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "blas": _blas(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def write_json(result: Mapping[str, Any], path: str | None) -> None:
    """Write a result to a file, or to standard output for "-"; None writes nothing."""
    if path is None:
        return
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def argument_parser(description: str, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have: --json and --repeats."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", metavar="FILE", help="write the result here; - is the terminal")
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds (%(default)s)")
    return parser


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return this checkout's commit, with + for changed files; None for an installed package."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # a virtual environment isn't it
        return _git("describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _cores_usable() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _blas() -> str:
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
