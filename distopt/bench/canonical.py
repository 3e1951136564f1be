"""What canonical mode costs: steps beside plain ones, and its exchange beside all_reduce.

Everything that is compared runs in the same processes, in turns. `main` starts the ranks with mpirun;
`run_rank` is what each of them does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from distopt.aggregators.tree import Tree
from distopt.backend import Device, choose_device
from distopt.bench import blas
from distopt.bench.report import environment, interleave, ratios, summarize, write_json
from distopt.bench.tables import text_table
from distopt.bench.workload import make_trainer, prepared_batch
from distopt.communicators import Communicator, connect, guard, launcher
from distopt.communicators.communicator import cut
from distopt.errors import LaunchError
from distopt.replica import Batch
from distopt.step import make_pieces

__all__ = ["Options", "main", "run", "run_rank"]

_BUCKET_BYTES = 4 << 20  # what the aggregators exchange at a time
_PLAIN = "plain"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        ranks: numbers of ranks, each a run of its own.
        shards: numbers of canonical shards to try beside that of the ranks; too small ones are left out.
        global_batch: examples in a step, over all ranks.
        steps: training steps in a turn.
        rounds: in each of which everything has a turn.
        largest_bytes: of the arrays to exchange, from 4 KiB on in steps of 4 times.
        threads: of each rank.
        device: as `choose_device` reads it.

    Raises:
        ValueError: a number is out of range.
    """

    ranks: Sequence[int] = (2, 4)
    shards: Sequence[int] = (8,)
    global_batch: int = 128
    steps: int = 5
    rounds: int = 9
    largest_bytes: int = 256 << 20
    threads: int = 1
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("global_batch", "steps", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.largest_bytes < 4096:
            raise ValueError(f"largest_bytes must be at least 4096, got {self.largest_bytes}")
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be numbers from 1 on, as in 2,4; got {self.ranks}")
        if self.global_batch < max(*self.ranks, *self.shards):
            raise ValueError(
                f"a global batch of {self.global_batch} can't be cut for {max(*self.ranks, *self.shards)} "
                "ranks or shards; make it larger"
            )

    def tried(self, ranks: int) -> list[int]:
        """Return the numbers of shards to try on a number of ranks."""
        return [ranks, *(shards for shards in self.shards if shards > ranks)]

    def sizes(self) -> list[int]:
        """Return the sizes of the arrays to exchange, in bytes."""
        return [size for power in range(12, 40, 2) if (size := 1 << power) <= self.largest_bytes]


def run(options: Options) -> dict[str, Any]:
    """Measure on each number of ranks.

    Returns:
        `runs`: for each number of ranks the `steps`, with summaries of milliseconds a step and of the ratio
        to plain ones in the same round, and the `exchanges` likewise, by size; `environment`.

    Raises:
        LaunchError: there is no mpirun, or the ranks failed.
    """
    runs: list[dict[str, Any]] = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory(prefix="distopt-bench-") as folder:
            output = Path(folder) / "result.json"
            job = json.dumps(asdict(options))
            command = [sys.executable, "-m", "distopt.bench.canonical", job, str(output)]
            done = launcher.run(ranks, command, timeout_seconds=3600.0, bind=True, threads=options.threads)
            if done.returncode or not output.exists():
                raise LaunchError(
                    f"the benchmark on {ranks} rank(s) ended with code {done.returncode}:\n"
                    f"{(done.stdout + done.stderr)[-4000:]}"
                )
            runs.append(json.loads(output.read_text()))
    oversubscribed = [n for n in options.ranks if n * options.threads > launcher.usable_cores()]
    return {
        "benchmark": "canonical",
        "global_batch": options.global_batch,
        "rounds": options.rounds,
        "runs": runs,
        "oversubscribed": oversubscribed,
        "environment": environment(),
    }


def run_rank(options: Options, communicator: Communicator) -> dict[str, Any]:
    """Measure on this communicator; the result is rank 0's."""
    device, _ = choose_device(options.device, communicator.local_rank)
    with threadpool_limits(options.threads):
        return {
            "ranks": communicator.size,
            "communicator": communicator.description,
            "steps": _steps(options, communicator, device),
            "exchanges": [_exchanges(options, communicator, size) for size in options.sizes()],
        }


def _steps(options: Options, communicator: Communicator, device: Device) -> dict[str, Any]:
    """Time the training step of the CIFAR-10 network, on input that was made before."""
    choices = {_PLAIN: None, **{f"V={n}": n for n in options.tried(communicator.size)}}
    competitors = {name: _stepper(options, communicator, device, n) for name, n in choices.items()}
    seconds = interleave(competitors, options.rounds, warmup=2)
    ms = {name: [1e3 * s / options.steps for s in times] for name, times in seconds.items()}
    over = ratios(seconds, _PLAIN)
    return {name: {"ms": summarize(ms[name]), "over_plain": over[name]} for name in ms}


def _stepper(
    options: Options, communicator: Communicator, device: Device, canonical: int | None
) -> Callable[[], None]:
    trainer = make_trainer(communicator, device, options.global_batch, 10**9, canonical=canonical)
    whole = prepared_batch(options.global_batch)
    always = _Always(
        [
            Batch(whole.images[p.examples], whole.labels[p.examples], 0, p.examples.start, p.regularized)
            for p in make_pieces(trainer.settings, communicator, 1)
        ]
    )

    def step() -> None:
        for _ in range(options.steps):
            trainer.train_step(always)
        device.synchronize()
        communicator.barrier()

    return step


class _Always:
    """Gives the same batches in every step."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def get(self, step: int) -> list[Batch]:
        """Return the batches."""
        del step
        return self._batches


def _exchanges(options: Options, communicator: Communicator, size: int) -> dict[str, Any]:
    """Time the sum of one array a rank, in place: plain, and canonical with its shards summed before."""
    count = size // 4

    def plain(array: Any) -> None:
        for part in _buckets(count):
            communicator.all_reduce(array[part]).wait()
        communicator.barrier()

    flat = communicator.allocate(count, np.float32)
    competitors: dict[str, Callable[[], object]] = {_PLAIN: lambda: plain(flat)}
    for shards in options.tried(communicator.size):
        competitors[f"V={shards}"] = _ordered(communicator, shards, flat)
    # The same number on every rank: an estimate would differ between them.
    rounds = max(5, min(200, options.rounds * (64 << 20) // (8 * size)))
    seconds = interleave(competitors, rounds, warmup=2)
    over = ratios(seconds, _PLAIN)
    return {
        "bytes": size,
        **{
            name: {"us": summarize([1e6 * s for s in times]), "over_plain": over[name]}
            for name, times in seconds.items()
        },
    }


def _ordered(communicator: Communicator, shards: int, flat: Any) -> Callable[[], None]:
    tree = Tree(shards)
    spans = [range(part.start, part.stop) for part in cut(shards, communicator.size)]
    nodes = [tree.nodes_of(span) for span in spans]
    order = tree.order_of(nodes)
    most = max(order.counts)
    partials = [communicator.allocate(flat.size, flat.dtype) for _ in range(most - 1)]
    arrays = [*partials[: order.counts[communicator.rank] - 1], flat]

    def run_once() -> None:
        for part in _buckets(flat.size):
            communicator.combine([array[part] for array in arrays], order).wait()
        communicator.barrier()

    return run_once


def _buckets(count: int) -> list[slice]:
    length = _BUCKET_BYTES // 4
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def main(options: Options, json_path: str | None = None) -> None:
    """Measure, print tables, and write the result."""
    blas.warn_of_choice()
    result = run(options)
    for one in result["runs"]:
        marked = (
            " (more than there are cores: the ratios are what counts)"
            if one["ranks"] in result["oversubscribed"]
            else ""
        )
        print(f"\n{one['ranks']} ranks{marked}, {one['communicator']}\n")
        print(f"The CIFAR-10 network, global batch {options.global_batch}, input made before:\n")
        print(_step_table(one["steps"]))
        print(
            "\nOne array a rank, in place, in buckets of 4 MiB; microseconds, and times plain all_reduce:\n"
        )
        print(_exchange_table(one["exchanges"]))
    write_json(result, json_path)


def _step_table(steps: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{found['ms']['least']:.1f}",
            f"{found['ms']['median']:.1f}",
            f"{found['ms']['least'] / steps[_PLAIN]['ms']['least']:.3f}",
            f"{found['over_plain']['median']:.3f}",
        ]
        for name, found in steps.items()
    ]
    return text_table(["", "step ms: least", "median", "least over plain's", "median over plain"], rows)


def _exchange_table(exchanges: list[dict[str, Any]]) -> str:
    names = [name for name in exchanges[0] if name != "bytes"]
    rows = [
        [
            f"{one['bytes']:,}",
            *(f"{one[name]['us']['median']:,.0f}" for name in names),
            *(f"{one[name]['over_plain']['median']:.2f}" for name in names[1:]),
        ]
        for one in exchanges
    ]
    return text_table(["bytes", *names, *(f"{name} over plain" for name in names[1:])], rows)


def _rank_main() -> None:
    parser = argparse.ArgumentParser(description="What a rank of `distopt bench canonical` runs.")
    parser.add_argument("options", help="fields of Options, as JSON")
    parser.add_argument("output", type=Path, help="file for the result, as JSON")
    chosen = parser.parse_args()
    with connect("mpi") as communicator, guard(communicator):
        result = run_rank(Options(**json.loads(chosen.options)), communicator)
        if communicator.rank == 0:
            chosen.output.write_text(json.dumps(result))


if __name__ == "__main__":
    _rank_main()
