"""all_reduce as nccl-tests prints it: ours in allocated and other memory, beside raw MPI and gloo."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distopt.backend import Device
from distopt.bench import peer
from distopt.bench.report import environment, ratios, summarize, write_json
from distopt.bench.tables import text_table
from distopt.communicators import launcher
from distopt.communicators.connect import announced_ranks
from distopt.errors import LaunchError

__all__ = ["MODELS", "Options", "bus_factor", "main", "parse_sizes", "run", "summarize_rows", "table"]

MODELS = ("resnet50",)
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        ranks: how many mpirun starts; those that are there, under a launcher.
        sizes: bytes of the arrays of float32; empty for none.
        repeats: rounds; in each, every competitor has a turn.
        peer: also measure PyTorch's gloo.
        model: name of a model whose gradients are reduced as in a training step, or None.

    Raises:
        ValueError: a number is too small or a size no multiple of 4, an unknown model, or nothing to measure.
    """

    ranks: int = 2
    sizes: Sequence[int] = ()
    repeats: int = 15
    peer: bool = False
    model: str | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.repeats < 1:
            raise ValueError(f"ranks and repeats must be at least 1, got {self.ranks} and {self.repeats}")
        if any(size < 4 or size % 4 for size in self.sizes):
            raise ValueError(f"sizes must be multiples of 4 bytes, got {list(self.sizes)}")
        if self.model is not None and self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        if not self.sizes and self.model is None:
            raise ValueError("nothing to measure: give sizes or a model")


def parse_sizes(text: str) -> list[int]:
    """Return sizes in bytes: of "4..256M" those from 4 bytes on by factors of 4, of "4,1K,3M" these.

    Raises:
        ValueError: they can't be read.
    """
    if ".." not in text:
        return [_bytes(part) for part in text.split(",")]
    first, _, last = text.partition("..")
    sizes, most = [_bytes(first)], _bytes(last)
    while sizes[-1] * 4 <= most:
        sizes.append(sizes[-1] * 4)
    return sizes


def _bytes(text: str) -> int:
    text = text.strip().lower()
    number = text.rstrip("kmg")
    unit = text[len(number) :]
    if not number.isdigit() or unit not in _UNITS or not int(number):
        raise ValueError(f"a size must be a number of bytes, with K, M or G behind or without, got {text!r}")
    return int(number) * _UNITS[unit]


def bus_factor(ranks: int) -> float:
    """Return by what algorithm bandwidth is multiplied for bus bandwidth: 2 (n - 1) / n.

    nccl-tests' doc/PERFORMANCE.md: so much of an array's size each rank must send at least, so the result
    can be compared with the speed of a link, whatever the number of ranks.
    """
    return 2 * (ranks - 1) / ranks


def run(options: Options, timeout_seconds: float = 3600.0) -> dict[str, Any] | None:
    """Measure in new processes of this machine, or in those that a launcher has started.

    Returns:
        `results`, see `summarize_rows`; `model`, the same for the model, or None; `choices` (which algorithm
        was chosen for which size, and why); `communicator`, `ranks`, `oversubscribed`, `left_out` (why),
        `environment`. None on the ranks of a launcher but rank 0.

    Raises:
        LaunchError: there is no mpirun, or the ranks failed.
    """
    why_no_peer = peer.why_missing(Device("cpu")) if options.peer else "not asked for (--peer)"
    fields = {**asdict(options), "peer": why_no_peer is None}
    if announced_ranks() is not None:
        from distopt.bench import allreduce_ranks

        measured = allreduce_ranks.measure(fields)
    else:
        measured = _start(fields, options.ranks, timeout_seconds)
    if measured is None:
        return None
    ranks = measured["ranks"]
    return {
        "benchmark": "allreduce",
        "ranks": ranks,
        "oversubscribed": measured["most_on_a_host"] > launcher.usable_cores(),
        "communicator": measured["communicator"],
        "choices": measured["choices"],
        "results": [
            row for one in measured["sizes"] for row in summarize_rows(one["size"], one["competitors"], ranks)
        ],
        "model": measured["model"]
        and {
            "name": options.model,
            **{key: measured["model"][key] for key in ("tensors", "size")},
            "results": summarize_rows(measured["model"]["size"], measured["model"]["competitors"], ranks),
        },
        "left_out": {"gloo": why_no_peer} if why_no_peer else {},
        "environment": environment(),
    }


def _start(fields: Mapping[str, Any], ranks: int, timeout_seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="distopt-bench-") as folder:
        output = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "distopt.bench.allreduce_ranks", json.dumps(fields), str(output)]
        try:
            done = launcher.run(ranks, command, timeout_seconds=timeout_seconds, bind=True, threads=1)
        except subprocess.TimeoutExpired as error:
            raise LaunchError(f"the benchmark's ranks were not done after {timeout_seconds:g} s") from error
        if done.returncode or not output.exists():
            raise LaunchError(
                f"the benchmark's {ranks} rank(s) ended with code {done.returncode}:\n"
                f"{(done.stdout + done.stderr)[-4000:]}"
            )
        return json.loads(output.read_text())


def summarize_rows(size: int, competitors: Mapping[str, Any], ranks: int) -> list[dict[str, Any]]:
    """Return a row for each competitor at one size.

    Args:
        size: bytes.
        competitors: name -> `seconds` of each round, of the slowest rank, and `wrong`, numbers that were not
            the sum, over all ranks.
        ranks: how many.

    Returns:
        `microseconds` (a summary, see `report.summarize`), `algorithm_gbps` and `bus_gbps` (10^9 bytes per
        second, of the median), `over_mpi` (how many times raw MPI's speed, a summary of the ratios within a
        round; None for itself), `wrong`.
    """
    seconds = {name: found["seconds"] for name, found in competitors.items()}
    slower = {name: ratios(seconds, name)["mpi"] for name in seconds} if "mpi" in seconds else {}
    rows: list[dict[str, Any]] = []
    for name, found in competitors.items():
        microseconds = summarize([1e6 * one for one in found["seconds"]])
        bandwidth = size / microseconds["median"] / 1e3
        rows.append(
            {
                "size": size,
                "count": size // 4,
                "type": "float32",
                "operation": "sum",
                "competitor": name,
                "microseconds": microseconds,
                "algorithm_gbps": bandwidth,
                "bus_gbps": bandwidth * bus_factor(ranks),
                "over_mpi": slower[name] if name != "mpi" and slower else None,
                "wrong": found["wrong"],
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as text, in nccl-tests' columns; and how many times the speed of raw MPI."""
    cells = [
        [
            row["competitor"],
            f"{row['size']}",
            f"{row['count']}",
            row["type"],
            row["operation"],
            f"{row['microseconds']['median']:.2f}",
            f"{row['microseconds']['least']:.2f}",
            f"{row['microseconds']['low']:.2f}-{row['microseconds']['high']:.2f}",
            f"{row['algorithm_gbps']:.2f}",
            f"{row['bus_gbps']:.2f}",
            f"{row['wrong']}",
            "-" if row["over_mpi"] is None else f"{row['over_mpi']['median']:.2f}",
        ]
        for row in rows
    ]
    columns = ["size B", "count", "type", "redop", "time us", "least", "quartiles", "algbw GB/s"]
    return text_table(["", *columns, "busbw GB/s", "#wrong", "x mpi"], cells)


def main(options: Options, json_path: str | None = None) -> None:
    """Measure, print tables, and write the result; on ranks of a launcher, rank 0 does.

    Raises:
        LaunchError: see `run`, or a sum was wrong.
    """
    result = run(options)
    if result is None:
        return
    if result["oversubscribed"]:
        print(
            f"warning: {result['ranks']} ranks share {launcher.usable_cores()} core(s): they wait for each "
            "other's turns, and small sizes tell about the scheduler"
        )
    print(f"{result['ranks']} ranks: {result['communicator']}; {options.repeats} rounds, in turns")
    print(
        "mpi: one MPI_Allreduce, in place, on other memory; allocated: ours in communicator.allocate's "
        "memory; plain: ours in other memory. Times are medians over rounds of the slowest rank's; x mpi: "
        "the median ratio within a round"
    )
    if result["results"]:
        print(f"\n{table(result['results'])}\n")
    if result["model"]:
        found = result["model"]
        print(f"\n{found['name']}: {found['tensors']} tensors, {found['size']} bytes")
        print(f"{table(found['results'])}\n")
    for where, words in result["choices"].items():
        print(f"{where}: {words}")
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}")
    write_json(result, json_path)
    rows = [*result["results"], *(result["model"]["results"] if result["model"] else [])]
    wrong = [f"{row['competitor']} at {row['size']} bytes" for row in rows if row["wrong"]]
    if wrong:
        raise LaunchError(f"wrong sums by {', '.join(wrong)}")
