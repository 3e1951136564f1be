"""Weak and strong scaling over ranks of this machine, beside PyTorch's DistributedDataParallel."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from distopt.backend import choose_device
from distopt.bench import blas, peer, scaling_plot
from distopt.bench.report import environment, summarize, write_json
from distopt.bench.tables import text_table
from distopt.bench.worker import Job, Program, Record, run_ranks
from distopt.communicators import launcher

__all__ = ["Mode", "Options", "describe_run", "efficiency", "main", "run", "summarize_runs"]

Mode = Literal["weak", "strong"]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        ranks: numbers of ranks; efficiency is relative to the smallest.
        modes: "weak": every rank has `batch_per_rank` examples; "strong": all share `global_batch`.
        batch_per_rank: examples of a rank in a step of weak scaling.
        global_batch: examples of all ranks in a step of strong scaling.
        steps: timed steps of a run.
        warmup: steps before them.
        rounds: in each of which every number of ranks has a run.
        threads: of each rank.
        ceiling: also run ranks that don't communicate, in turns with ours: what the cores, which share
            memory and power, allow at most.
        peer: also run PyTorch's DistributedDataParallel over gloo, in turns with ours.
        device: as `choose_device` reads it.

    Raises:
        ValueError: a number is below 1, no or repeated ranks, an unknown mode, or a global batch smaller
            than the number of ranks.
    """

    ranks: Sequence[int] = (1, 2, 4)
    modes: Sequence[str] = ("weak", "strong")
    batch_per_rank: int = 128
    global_batch: int = 256
    steps: int = 20
    warmup: int = 5
    rounds: int = 3
    threads: int = 1
    ceiling: bool = False
    peer: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch_per_rank", "global_batch", "steps", "warmup", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks must be different numbers from 1 on, as in 1,2,4; got {self.ranks}")
        if not self.modes or not set(self.modes) <= set(get_args(Mode)):
            raise ValueError(f"modes must be among {get_args(Mode)}, got {self.modes}")
        if "strong" in self.modes and self.global_batch < max(self.ranks):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be cut for {max(self.ranks)} ranks; "
                "make it at least as large as the number of ranks"
            )

    def batch(self, mode: str, ranks: int) -> int:
        """Return the global batch of a number of ranks."""
        return self.batch_per_rank * ranks if mode == "weak" else self.global_batch


def run(options: Options) -> dict[str, Any]:
    """Measure every number of ranks `rounds` times, in turns.

    Returns:
        `runs`, with the seconds of each step; `results`, their summary (see `summarize_runs`);
        `oversubscribed`, the numbers of ranks that need more cores than there are; `left_out` (why);
        `environment`.

    Raises:
        BackendError: there is no such device.
        LaunchError: there is no mpirun, or a run failed.
    """
    device, _ = choose_device(options.device, 0)
    why_no_peer = peer.why_missing(device) if options.peer else "not asked for (--peer)"
    programs: list[Program] = ["distopt"]
    if options.ceiling:
        programs.append("independent")
    if why_no_peer is None:
        programs.append("torch")
    cases: list[tuple[str, int, Program]] = [
        (mode, ranks, program) for mode in options.modes for ranks in options.ranks for program in programs
    ]
    runs: list[dict[str, Any]] = []
    for turn in range(options.rounds):
        # There and back again: what is compared stays close in time, and a drift hits both sides.
        for mode, ranks, program in cases if turn % 2 == 0 else cases[::-1]:
            job = Job(
                program,
                options.batch(mode, ranks),
                steps=options.steps,
                warmup=options.warmup,
                threads=options.threads,
                device=options.device,
            )
            records = run_ranks(job, ranks)
            runs.append({"round": turn, "mode": mode, **describe_run(job, records)})
    return {
        "benchmark": "scaling",
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "warmup": options.warmup,
        "oversubscribed": [
            ranks for ranks in options.ranks if ranks * options.threads > launcher.usable_cores()
        ],
        "results": [row for mode in options.modes for row in summarize_runs(runs, mode)],
        "runs": runs,
        "left_out": {"torch": why_no_peer} if why_no_peer else {},
        "environment": environment(),
    }


def describe_run(job: Job, records: Sequence[Record]) -> dict[str, Any]:
    """Return what a run of some ranks measured: a step lasts as long as on the slowest rank.

    Ranks without communication count as if they waited for each other after every step, at no cost.
    """
    step_seconds = [max(times) for times in zip(*(r.step_seconds for r in records), strict=True)]
    seconds = max(sum(r.step_seconds) for r in records)
    if job.program == "independent":
        seconds = sum(step_seconds)
    exposed = [r.phases_seconds.get("exposed communication", 0.0) / job.steps for r in records]
    return {
        "program": job.program,
        "ranks": len(records),
        "global_batch": job.global_batch,
        "examples_per_second": job.global_batch * job.steps / seconds,
        "exposed_ms": 1e3 * statistics.mean(exposed) if records[0].phases_seconds else None,
        "peak_bytes": max(r.peak_bytes for r in records),
        "devices": [r.device for r in records],
        "step_seconds": step_seconds,
    }


def summarize_runs(runs: Sequence[Mapping[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Return a row for each program and number of ranks of one mode.

    Args:
        runs: as `describe_run` gives them, with "round" and "mode".
        mode: whose runs are taken.

    Returns:
        `examples_per_second` (a summary over rounds), `step_ms` (`least`, `median` and `p90` of all steps),
        `efficiency`, and the rate over that of the others that took part, `over_independent` and
        `over_torch` (summaries of the ratios within a round),
        `exposed_ms` and `exposed_share` of the mean step (medians over rounds), `peak_bytes`.
    """
    cases: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for one in runs:
        if one["mode"] == mode:
            cases.setdefault((one["program"], one["ranks"]), []).append(one)
    rates = {
        case: {one["round"]: one["examples_per_second"] for one in found} for case, found in cases.items()
    }
    rows: list[dict[str, Any]] = []
    for (program, ranks), found in cases.items():
        base = min(other for other_program, other in cases if other_program == program)
        own, rates_base = rates[program, ranks], rates[program, base]
        others = {other: rates.get((other, ranks)) for other in ("independent", "torch")}
        step_ms = 1e3 * np.concatenate([one["step_seconds"] for one in found])
        exposed = [one["exposed_ms"] for one in found if one["exposed_ms"] is not None]
        shares = [
            one["exposed_ms"] / (1e3 * one["global_batch"] / one["examples_per_second"])
            for one in found
            if one["exposed_ms"] is not None
        ]
        rows.append(
            {
                "mode": mode,
                "program": program,
                "ranks": ranks,
                "global_batch": found[0]["global_batch"],
                "examples_per_second": summarize(list(own.values())),
                "step_ms": {
                    "least": float(step_ms.min()),
                    "median": float(np.median(step_ms)),
                    "p90": float(np.percentile(step_ms, 90)),
                },
                "efficiency": summarize(
                    [efficiency(own[turn], ranks, rates_base[turn], base) for turn in own]
                ),
                **{
                    f"over_{other}": summarize([own[turn] / theirs[turn] for turn in own])
                    if theirs and program == "distopt"
                    else None
                    for other, theirs in others.items()
                },
                "exposed_ms": statistics.median(exposed) if exposed else None,
                "exposed_share": statistics.median(shares) if shares else None,
                "peak_bytes": max(one["peak_bytes"] for one in found),
            }
        )
    return sorted(rows, key=lambda row: (row["program"], row["ranks"]))


def efficiency(rate: float, ranks: int, base_rate: float, base_ranks: int = 1) -> float:
    """Return a rank's share of the rate, over that of a rank where there are few; 1 is perfect.

    The same in weak and in strong scaling, as rates count examples, not steps.
    """
    return (rate / ranks) / (base_rate / base_ranks)


def main(options: Options, json_path: str | None = None, plot_path: str | None = None) -> None:
    """Measure, print a table, and write the result and a plot.

    Raises:
        BackendError: a plot is wanted and matplotlib is missing; before anything is measured.
    """
    if plot_path is not None:
        scaling_plot.require_matplotlib()
    blas.warn_of_choice()
    cores = launcher.usable_cores()
    too_many = [ranks for ranks in options.ranks if ranks * options.threads > cores]
    if too_many:
        print(
            f"warning: {', '.join(map(str, too_many))} ranks of {options.threads} thread(s) share "
            f"{cores} core(s); their rows are marked with * and tell nothing about scaling"
        )
    result = run(options)
    print(
        f"The CIFAR-10 tutorial's network on ranks of {options.threads} thread(s); {options.rounds} rounds "
        f"of {options.steps} steps after {options.warmup}, in turns; distopt makes its input as it goes"
    )
    print(f"\n{table(result)}\n")
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}")
    write_json(result, json_path)
    if plot_path is not None:
        scaling_plot.write(result, plot_path)


def table(result: Mapping[str, Any]) -> str:
    """Return the rows of a result as text."""
    rows = [
        [
            f"{row['mode']}, {row['program']}",
            f"{row['ranks']}{'*' if row['ranks'] in result['oversubscribed'] else ''}",
            f"{row['global_batch']}",
            f"{row['examples_per_second']['median']:,.0f}",
            f"{row['step_ms']['least']:.1f}",
            f"{row['step_ms']['median']:.1f}",
            f"{row['step_ms']['p90']:.1f}",
            f"{100 * row['efficiency']['median']:.1f} %",
            "-" if row["exposed_ms"] is None else f"{row['exposed_ms']:.2f}",
            "-" if row["exposed_share"] is None else f"{100 * row['exposed_share']:.1f} %",
            "-" if row["over_independent"] is None else f"{100 * row['over_independent']['median']:.1f} %",
            "-" if row["over_torch"] is None else f"{row['over_torch']['median']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for row in result["results"]
    ]
    return text_table(
        [
            "",
            "ranks",
            "global batch",
            "examples/s",
            "step ms: least",
            "median",
            "p90",
            "efficiency",
            "exposed ms",
            "share",
            "of ceiling",
            "over torch",
            "MiB",
        ],
        rows,
    )
