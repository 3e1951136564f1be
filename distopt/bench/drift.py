"""What the drift check costs beside the steps of the CIFAR-10 tutorial's network. Runs on all ranks."""

from __future__ import annotations

from typing import Any

from distopt.backend import Device
from distopt.bench.report import environment, interleave, summarize, write_json
from distopt.bench.tables import text_table
from distopt.bench.workload import make_trainer
from distopt.communicators import Communicator
from distopt.data.prefetch import Prefetcher
from distopt.drift import DriftCheck, replicated

__all__ = ["main", "measure"]


def measure(
    communicator: Communicator, device: Device, batch: int, rounds: int, every: int = 100
) -> dict[str, Any]:
    """Time steps and checks in turns. Collective.

    Args:
        communicator: the ranks.
        device: of this rank.
        batch: examples of each rank in a step.
        rounds: one step and one check in each.
        every: steps between two checks, for the share.

    Returns:
        "step" and "check": summaries of seconds on this rank; "arrays"; "bytes" that a check reads;
        "bytes_per_second" of reading; "share" of a check every so many steps, by the least and by the median.
    """
    trainer = make_trainer(communicator, device, batch * communicator.size, rounds + 2)
    drift = DriftCheck(communicator, every)

    def check() -> None:
        drift.check(
            trainer.step, replicated(trainer.replicas[0].variables, trainer.optimizer, trainer.averages)
        )

    with Prefetcher(trainer._make_batches, 0) as batches:  # pyright: ignore[reportPrivateUsage]
        seconds = interleave({"step": lambda: trainer.train_step(batches), "check": check}, rounds)
    found: dict[str, Any] = {name: summarize(values) for name, values in seconds.items()}
    state = replicated(trainer.replicas[0].variables, trainer.optimizer, trainer.averages)
    found |= {
        "ranks": communicator.size,
        "every": every,
        "arrays": len(state),
        "bytes": sum(variable.value.nbytes for variable in state.values()),
        "bytes_per_second": drift.read_bytes / drift.reading_seconds,
        "share": {key: found["check"][key] / (every * found["step"][key]) for key in ("least", "median")},
    }
    return found


def main(
    communicator: Communicator, device: Device, batch: int, rounds: int, every: int, path: str | None
) -> None:
    """Measure on all ranks; rank 0 prints a table and writes the results to a JSON file."""
    found = measure(communicator, device, batch, rounds, every)
    if communicator.rank:
        return
    rows = [
        [name, *(f"{1000 * found[name][key]:.3f}" for key in ("least", "median"))]
        for name in ("step", "check")
    ]
    print(text_table(["ms, rank 0", "least", "median"], rows))
    print(
        f"{communicator.size} rank(s), {found['arrays']} arrays, {found['bytes'] / 1e6:.1f} MB read at "
        f"{found['bytes_per_second'] / 1e9:.1f} GB/s; a check every {every} steps takes "
        f"{100 * found['share']['least']:.3f} % of the time (medians: {100 * found['share']['median']:.3f} %)"
    )
    write_json({"environment": environment(), "drift": found}, path)
