"""One process: images per second of a training step beside PyTorch's, its phases, and its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from distopt.backend import Device, asnumpy, choose_device
from distopt.bench import blas, peer
from distopt.bench.report import environment, interleave, ratios, summarize, write_json
from distopt.bench.tables import text_table
from distopt.bench.worker import Job, Program, Record, run_ranks
from distopt.bench.workload import make_trainer, prepared_batch
from distopt.communicators import LocalCommunicator
from distopt.data.prefetch import Prefetcher
from distopt.elementwise import jitted
from distopt.replica import Batch

__all__ = ["Options", "main", "run", "speed_ratios"]

NETWORKS = {"with LRN": True, "without LRN": False}
_CHECKED_STEPS = 3
# Float32 in another order; a GPU's matrix units round products to 10 bits.
_LOSS_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-2}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        batch: examples in a step.
        threads: of every competitor.
        rounds: in each of which every competitor has a turn.
        steps: training steps in a turn.
        peer: whether PyTorch takes part, where it is installed.
        device: as `choose_device` reads it.

    Raises:
        ValueError: a number is below 1.
    """

    batch: int = 128
    threads: int = 1
    rounds: int = 7
    steps: int = 5
    peer: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def run(options: Options) -> dict[str, Any]:
    """Measure the step of both networks.

    Competitors get the same weights and one batch made before; that their losses agree over the first
    steps is checked. Phases and memory are of processes of their own, ours in the real training loop with
    its input.

    Returns:
        `seconds` per round of each network and competitor; `images_per_second`, a summary of each; `ratio`,
        a summary of distopt's speed over each competitor's and over the best of each round;
        `largest_loss_difference`; `processes` with phases and memory; `blas_kernels`; `compiled_loops`,
        whether numba takes part; `left_out` (why); `environment`.

    Raises:
        RuntimeError: PyTorch computes another loss.
        LaunchError: a process failed.
    """
    device, reason = choose_device(options.device, 0)
    why_no_peer = peer.why_missing(device) if options.peer else "not asked for"
    with threadpool_limits(options.threads):
        if why_no_peer is None:
            peer.set_threads(options.threads)
        batch = prepared_batch(options.batch)
        turns: dict[tuple[str, str], Callable[[], object]] = {}
        differences: dict[str, float] = {}
        for network, normalize in NETWORKS.items():
            steps, differences[network] = _competitors(batch, device, normalize, why_no_peer is None)
            for name, step in steps.items():
                turns[network, name] = _turn(step, options.steps, device)
        labels = {f"{network}, {name}": turn for (network, name), turn in turns.items()}
        timed = interleave(labels, options.rounds)
        kernels = blas.kernels()
    seconds: dict[str, dict[str, list[float]]] = {network: {} for network in NETWORKS}
    for network, name in turns:
        seconds[network][name] = timed[f"{network}, {name}"]
    images = options.batch * options.steps
    return {
        "benchmark": "step",
        "batch": options.batch,
        "threads": options.threads,
        "rounds": options.rounds,
        "steps": options.steps,
        "device": str(device),
        "device_reason": reason,
        "seconds": seconds,
        "images_per_second": {
            network: {name: summarize([images / s for s in times]) for name, times in found.items()}
            for network, found in seconds.items()
        },
        "ratio": {network: speed_ratios(found) for network, found in seconds.items()},
        "largest_loss_difference": differences,
        "processes": _processes(options, why_no_peer is None),
        "left_out": {"torch": why_no_peer} if why_no_peer else {},
        "blas_kernels": kernels,
        "compiled_loops": jitted.usable(),
        "environment": environment(gpu=device.kind == "cuda"),
    }


def speed_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Summarize distopt's speed over that of each competitor, and of the best one, in the same round.

    Args:
        seconds: of each competitor, "distopt" among them, in each round.
    """
    others = {name: times for name, times in seconds.items() if name != "distopt"}
    if not others:
        return {}
    best = [min(times) for times in zip(*others.values(), strict=True)]
    found = ratios({**seconds, "best": best}, "distopt")
    return {name: summary for name, summary in found.items() if name != "distopt"}


def _competitors(
    batch: Batch, device: Device, normalize: bool, with_peer: bool
) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return each competitor's step, which gives a loss, and by how much their first losses differ."""
    trainer = make_trainer(LocalCommunicator(), device, len(batch.labels), 0, normalize)
    batches = Prefetcher(lambda step: [batch], depth=0)
    steps: dict[str, Callable[[], Any]] = {"distopt": lambda: trainer.train_step(batches).loss}
    if with_peer:
        weights = {v.name: asnumpy(v.value).copy() for v in trainer.replicas[0].variables}
        for layout in peer.LAYOUTS:
            steps[f"torch {layout}"] = peer.make_step(
                batch, device, layout=layout, normalize=normalize, weights=weights
            )
    losses = {name: [float(step()) for _ in range(_CHECKED_STEPS)] for name, step in steps.items()}
    difference = 0.0
    for name, found in losses.items():
        for ours, theirs in zip(losses["distopt"], found, strict=True):
            difference = max(difference, abs(theirs / ours - 1.0))
        if difference > _LOSS_TOLERANCE[device.kind]:
            raise RuntimeError(
                f"from the same weights and images distopt's losses are {losses['distopt']}, those of "
                f"{name} {found}: they don't compute the same, so their speeds can't be compared. "
                "Please report this."
            )
    return steps, difference


def _turn(step: Callable[[], Any], steps: int, device: Device) -> Callable[[], object]:
    def turn() -> None:
        for _ in range(steps - 1):
            step()
        float(step())  # PyTorch on a GPU: wait for it
        device.synchronize()

    return turn


def _processes(options: Options, with_peer: bool) -> dict[str, dict[str, Any]]:
    """Return phases in ms per step and memory in bytes of each network's training in its own process."""
    programs: tuple[Program, ...] = ("distopt", "torch") if with_peer else ("distopt",)
    found: dict[str, dict[str, Any]] = {}
    for network, normalize in NETWORKS.items():
        for program in programs:
            job = Job(
                program,
                options.batch,
                steps=options.rounds * options.steps,
                threads=options.threads,
                normalize=normalize,
                device=options.device,
            )
            found[f"{program}, {network}"] = _describe(run_ranks(job, None)[0])
    return found


def _describe(record: Record) -> dict[str, Any]:
    steps = len(record.step_seconds)
    return {
        "step_ms": 1e3 * statistics.median(record.step_seconds),
        "mean_step_ms": 1e3 * statistics.mean(record.step_seconds),
        "phases_ms": {name: 1e3 * seconds / steps for name, seconds in record.phases_seconds.items()},
        "start_bytes": record.start_bytes,
        "peak_bytes": record.peak_bytes,
        "step_seconds": record.step_seconds,
    }


def main(options: Options, json_path: str | None = None) -> None:
    """Measure, print tables, and write the result."""
    blas.warn_of_choice()
    result = run(options)
    print(
        f"The CIFAR-10 tutorial's network, one process, {options.threads} thread(s), batch {options.batch}, "
        f"{result['device']}; {options.rounds} rounds of {options.steps} steps each, in turns"
    )
    for line in result["blas_kernels"]:
        print(f"BLAS: {line}")
    print(f"loops are {'compiled by numba' if result['compiled_loops'] else 'plain NumPy (no numba)'}")
    print(f"\n{speed_table(result)}\n\n{process_table(result)}")
    for name, reason in result["left_out"].items():
        print(f"{name} is left out: {reason}")
    if not result["left_out"]:
        largest = max(result["largest_loss_difference"].values())
        print(f"Losses of the first {_CHECKED_STEPS} steps agree to {largest:.1e} relative.")
    write_json(result, json_path)


def speed_table(result: Mapping[str, Any]) -> str:
    """Return images/s with the quartiles over rounds, and distopt's speed over each competitor's."""
    rows: list[list[str]] = []
    for network, found in result["images_per_second"].items():
        ratio = result["ratio"][network]
        for name, rate in found.items():
            rows.append([f"{network}, {name}", *_middle(rate, ",.0f"), *_middle(ratio.get(name), ".2f")])
        if ratio:
            rows.append([f"{network}, best of torch", "", "", *_middle(ratio["best"], ".2f")])
    return text_table(["", "images/s", "quartiles", "distopt / it", "quartiles"], rows)


def _middle(summary: Mapping[str, float] | None, style: str) -> tuple[str, str]:
    if summary is None:
        return "", ""
    return (
        f"{summary['median']:{style}}",
        f"{summary['low']:{style}} to {summary['high']:{style}}",
    )


def process_table(result: Mapping[str, Any]) -> str:
    """Return the phases of a step in ms, and memory, of the processes that trained alone."""
    phases: list[str] = []
    for found in result["processes"].values():
        phases += [phase for phase in found["phases_ms"] if phase not in phases]
    rows = [
        [
            name,
            *(f"{found['phases_ms'][p]:.2f}" if p in found["phases_ms"] else "-" for p in phases),
            f"{found['mean_step_ms']:.1f}",
            f"{found['start_bytes'] / 2**20:.0f}",
            f"{found['peak_bytes'] / 2**20:.0f}",
        ]
        for name, found in result["processes"].items()
    ]
    headers = ["alone, ms per step", *phases, "step", "MiB before", "MiB at peak"]
    return text_table(headers, rows)
