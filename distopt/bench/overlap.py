"""How much of the communication hides behind the backward pass, between hosts.

What can be hidden is the shorter of two times: that of the communication by itself, and that from the
moment when the first bucket is complete to the end of the backward pass. What is hidden is the time of a
step that begins to communicate after its backward pass, less that of a step that overlaps:

    hidden share = (serial - overlapped) / min(communication, backward after the first bucket)

Each is the least of many rounds, the slowest rank of each round, all kinds of steps in turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from distopt.aggregators import AllReduce, Ticket
from distopt.backend import Device
from distopt.bench.report import environment, write_json
from distopt.bench.workload import make_trainer, prepared_batch
from distopt.communicators import Communicator, connect, guard
from distopt.communicators.connect import announced_ranks
from distopt.errors import LaunchError
from distopt.timeline import Timeline, text_picture, write_trace

__all__ = ["Options", "hidden_share", "main"]

_HOSTS_SCRIPT = Path(__file__).parents[2] / "launch" / "hosts.sh"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        batch: examples of a rank.
        rounds: in each, every kind of step has a turn.
        bucket_bytes: None measures the best.
        hosts: pretended hosts to start, where this is not under mpirun already.
        rate: of their cards, as tc writes it.
        trace: file for the timeline of one overlapped step; None writes none.

    Raises:
        ValueError: a number is below 1.
    """

    batch: int = 128
    rounds: int = 20
    bucket_bytes: int | None = None
    hosts: int = 2
    rate: str = "1gbit"
    trace: str | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "hosts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def hidden_share(
    serial: float, overlapped: float, communication: float, backward_after_first: float
) -> float:
    """Return the share of what can be hidden that is hidden; see the module. All in seconds."""
    return (serial - overlapped) / min(communication, backward_after_first)


def main(options: Options, json_path: str | None = None) -> None:
    """Measure over the ranks of this job, or start pretended hosts for it; print, and write the result.

    Raises:
        LaunchError: not under mpirun, and no hosts can be made here; the message says why.
    """
    if announced_ranks() is not None:
        with connect("mpi", overlap=True) as communicator, guard(communicator), threadpool_limits(1):
            _report(_measure(options, communicator), communicator, json_path)
        return
    if not _HOSTS_SCRIPT.exists():
        raise LaunchError(f"{_HOSTS_SCRIPT} is not there: start this with mpirun over hosts of your own")
    with tempfile.TemporaryDirectory(prefix="distopt-bench-") as folder:
        output = Path(folder) / "result.json"
        rank = [sys.executable, "-m", "distopt.bench.overlap", json.dumps(asdict(options)), str(output)]
        where = ["--hosts", str(options.hosts), "--rate", options.rate]
        done = subprocess.run(["bash", str(_HOSTS_SCRIPT), *where, "--", *rank], check=False)
        if done.returncode or not output.exists():
            raise LaunchError(f"the ranks ended with code {done.returncode}; what they said is above")
        write_json(json.loads(output.read_text()), json_path)


def _report(result: dict[str, Any], communicator: Communicator, json_path: str | None) -> None:
    if communicator.rank:
        return
    for name, seconds in result["seconds"].items():
        print(f"{name:28}{1e3 * seconds:9.1f} ms")
    print(f"{'hidden':28}{100 * result['hidden_share']:9.0f} % of what can be hidden")
    print(result["picture"])
    write_json(result, json_path)


def _measure(options: Options, communicator: Communicator) -> dict[str, Any]:
    trainer = make_trainer(communicator, Device("cpu", 0), options.batch * communicator.size, 1)
    replica, batch = trainer.replicas[0], prepared_batch(options.batch)
    aggregator = AllReduce(communicator, "mean", options.bucket_bytes)
    whole = [(variable.gradient, variable) for variable in replica.variables]
    aggregator.reduce(whole, Ticket(examples=1.0))  # measures the bucket size, and tells which slab leads
    bucket = aggregator.bucket_bytes or 1

    def compute() -> float:
        tape, loss, _ = replica.forward(batch)
        finals = [
            (v.slab.end(v) * v.dtype.itemsize, now()) for _, v in replica.gradients(tape, loss) if v.slab
        ]
        first = min(bucket, max(stop for stop, _ in finals))
        return finals[-1][1] - next(moment for stop, moment in finals if stop >= first)

    def step(overlapped: bool) -> float:
        tape, loss, ticket = replica.forward(batch)
        stream = replica.gradients(tape, loss)
        aggregator.reduce(stream if overlapped else list(stream), ticket)
        return aggregator.exposed_seconds

    def communicate() -> float:
        aggregator.reduce(whole, Ticket(examples=1.0))
        return aggregator.exposed_seconds

    now = time.perf_counter
    kinds: dict[str, Callable[[], float]] = {
        "computation": compute,
        "communication": communicate,
        "serial step": lambda: step(False),
        "overlapped step": lambda: step(True),
    }
    took: dict[str, list[float]] = {name: [] for name in kinds}
    inner: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.rounds + 1):
        for name, run in kinds.items():
            communicator.barrier()
            began = now()
            value = run()
            pair = communicator.all_gather_object((now() - began, value))
            if number:  # the first round is another matter
                took[name].append(max(seconds for seconds, _ in pair))
                inner[name].append(max(value for _, value in pair))
    timeline = Timeline(communicator)
    aggregator.recorder = timeline.add
    step(True)
    spans = timeline.gather()
    if options.trace and communicator.rank == 0:
        write_trace(spans, options.trace)
    seconds = {name: min(values) for name, values in took.items()}
    seconds["backward after first bucket"] = min(inner["computation"])
    seconds["exposed when overlapped"] = min(inner["overlapped step"])
    return {
        "options": asdict(options),
        "ranks": communicator.size,
        "communicator": communicator.description,
        "gradient_bytes": sum(slab.gradients.nbytes for slab in replica.arena.slabs),
        "bucket_bytes": bucket,
        "seconds": seconds,
        "rounds_seconds": took,
        "hidden_share": hidden_share(
            seconds["serial step"],
            seconds["overlapped step"],
            seconds["communication"],
            seconds["backward after first bucket"],
        ),
        "picture": text_picture(spans),
        "environment": environment(),
    }


if __name__ == "__main__":
    main(Options(**json.loads(sys.argv[1])), sys.argv[2])
