"""The picture of `bench scaling`: examples per second and efficiency over ranks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distopt.errors import BackendError

__all__ = ["require_matplotlib", "write"]


def require_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        BackendError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError("a plot needs matplotlib; pip install 'distopt[plot]', or leave out --plot")


def write(result: Mapping[str, Any], path: str) -> None:
    """Draw a result of `scaling.run` into a PNG file, a row for each mode.

    Raises:
        BackendError: matplotlib is missing.
    """
    require_matplotlib()
    # The figure by itself, without pyplot: no window system, no state that others see.
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    modes = list(dict.fromkeys(row["mode"] for row in result["results"]))
    figure = figure_class(figsize=(9, 3.6 * len(modes)), layout="constrained")
    axes = figure.subplots(len(modes), 2, squeeze=False)
    for (left, right), mode in zip(axes, modes, strict=True):
        rows = [row for row in result["results"] if row["mode"] == mode]
        for program in dict.fromkeys(row["program"] for row in rows):
            _draw(left, right, program, [row for row in rows if row["program"] == program])
        left.set(title=f"{mode} scaling", xlabel="ranks", ylabel="examples/s", ylim=(0, None))
        right.set(title=f"{mode} scaling", xlabel="ranks", ylabel="efficiency, %", ylim=(0, 110))
        for axis in (left, right):
            axis.set_xticks(sorted({row["ranks"] for row in rows}))
            axis.grid(alpha=0.3)
            axis.legend()
    figure.suptitle(_caption(result))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def _draw(left: Any, right: Any, program: str, rows: list[Mapping[str, Any]]) -> None:
    ranks = [row["ranks"] for row in rows]
    for axis, key, scale in ((left, "examples_per_second", 1.0), (right, "efficiency", 100.0)):
        middle = [scale * row[key]["median"] for row in rows]
        below = [scale * (row[key]["median"] - row[key]["low"]) for row in rows]
        above = [scale * (row[key]["high"] - row[key]["median"]) for row in rows]
        axis.errorbar(ranks, middle, yerr=[below, above], marker="o", capsize=3, label=program)
    if program == "distopt":
        per_rank = rows[0]["examples_per_second"]["median"] / ranks[0]
        left.plot(ranks, [per_rank * n for n in ranks], "k--", linewidth=0.8, label="linear")


def _caption(result: Mapping[str, Any]) -> str:
    origin = result["environment"]
    text = (
        f"CIFAR-10 tutorial's network, {result['threads']} thread(s) per rank\n"
        f"{origin['processor']}, {origin['cores_usable']} core(s), {origin['time'][:10]}"
    )
    many = result["oversubscribed"]
    return f"{text}; {', '.join(map(str, many))} ranks share cores" if many else text
