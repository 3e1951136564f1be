"""Does training get there, and is it the same on any number of ranks: real runs of `distopt train`."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distopt.bench.report import environment, write_json
from distopt.bench.tables import text_table
from distopt.communicators import launcher
from distopt.errors import DistoptError

__all__ = ["Options", "largest_difference", "main", "run"]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        seeds: one training to the end for each.
        ranks: of the trainings.
        steps: of the trainings.
        global_batch: examples in a step.
        curves: numbers of ranks whose first losses are compared, all with the first seed.
        curve_steps: how many losses.
        curve_learning_rates: one comparison at each. At the tutorial's 0.1 the first steps are unstable and
            double a difference in the last bit every step or so, from which order of summation alone
            makes 1e-3 within 50 steps; at 0.03 the same runs stay within 1e-5.
        data_dir: where the images are.
        timeout_seconds: for one training.

    Raises:
        ValueError: nothing to run, or a number below 1.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    ranks: int = 2
    steps: int = 2000
    global_batch: int = 128
    curves: tuple[int, ...] = (1, 2, 3, 4)
    curve_steps: int = 50
    curve_learning_rates: tuple[float, ...] = (0.1, 0.03)
    data_dir: str | None = None
    timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if not self.seeds or min(self.ranks, self.steps, self.global_batch, self.curve_steps) < 1:
            raise ValueError(
                f"convergence needs a seed, and ranks, steps and batch of at least 1; got {self}"
            )


def largest_difference(curves: dict[int, list[float]]) -> float:
    """Return the largest relative difference of any loss from that of the first curve, step by step."""
    first, *others = curves.values()
    return max(
        (abs(a - b) / abs(a) for other in others for a, b in zip(first, other, strict=True)), default=0.0
    )


def run(options: Options) -> dict[str, Any]:
    """Train and compare; returns accuracies, loss curves and their largest relative difference.

    Raises:
        DistoptError: a training failed; carries the end of what it printed.
    """
    trainings: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        records = _train(options, options.ranks, seed, options.steps, 100, None)
        trainings[str(seed)] = records[-1]
        print(f"seed {seed}: {100 * records[-1]['test_accuracy']:.2f} % (averaged weights)", flush=True)
    curves: dict[float, dict[int, list[float]]] = {}
    for rate in options.curve_learning_rates if options.curves else ():
        curves[rate] = {}
        for ranks in options.curves:
            records = _train(options, ranks, options.seeds[0], options.curve_steps, 1, rate)
            curves[rate][ranks] = [record["loss"] for record in records if "loss" in record]
    return {
        "benchmark": "convergence",
        "options": asdict(options) | {"data_dir": "given" if options.data_dir else "default"},
        "trainings": trainings,
        "curves": {str(rate): {str(r): losses for r, losses in c.items()} for rate, c in curves.items()},
        "largest_relative_difference": {str(rate): largest_difference(c) for rate, c in curves.items()},
        "after_10_steps": {
            str(rate): largest_difference({r: losses[:10] for r, losses in c.items()})
            for rate, c in curves.items()
        },
        "environment": environment(),
    }


def _train(
    options: Options, ranks: int, seed: int, steps: int, log_every: int, rate: float | None
) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, "-m", "distopt.cli", "train", "cifar10", "--output", folder]
        program += ["--global-batch", str(options.global_batch), "--steps", str(steps), "--seed", str(seed)]
        program += ["--log-every", str(log_every), "--checkpoint-every", str(steps), "--device", "cpu"]
        if rate is not None:
            program += ["--learning-rate", str(rate)]
        if options.data_dir is not None:
            program += ["--data-dir", options.data_dir]
        done = launcher.run(ranks, program, timeout_seconds=options.timeout_seconds)
        if done.returncode != 0:
            raise DistoptError(
                f"training on {ranks} ranks with seed {seed} ended with exit code {done.returncode}:\n"
                f"{(done.stdout + done.stderr)[-2000:]}"
            )
        return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def main(options: Options, json_path: str | None) -> None:
    """Run, print tables, and write JSON."""
    result = run(options)
    rows = [
        [
            seed,
            f"{100 * record['test_accuracy']:.2f} %",
            f"{100 * record['test_accuracy_raw']:.2f} %",
            f"{record['train_seconds']:.1f}",
            f"{record['examples_per_second']:,.0f}",
        ]
        for seed, record in result["trainings"].items()
    ]
    print(f"\nCIFAR-10, {options.steps} steps of {options.global_batch} examples, {options.ranks} rank(s):")
    print(text_table(["seed", "averaged weights", "raw weights", "train s", "examples/s"], rows))
    for rate, difference in result["largest_relative_difference"].items():
        print(
            f"\nlosses on {', '.join(map(str, options.curves))} ranks at learning rate {rate}: largest "
            f"relative difference {result['after_10_steps'][rate]:.1e} over 10 steps, {difference:.1e} over "
            f"{options.curve_steps}"
        )
    write_json(result, json_path)
