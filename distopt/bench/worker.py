"""Training steps in processes of their own, timed one by one: what `bench step` and `bench scaling` start.

`run_ranks` starts the ranks and gives their records; `main` is what a rank runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from threadpoolctl import threadpool_limits

from distopt.backend import Device, choose_device
from distopt.bench import peer
from distopt.bench.workload import make_trainer, prepared_batch
from distopt.communicators import Communicator, LocalCommunicator, connect, guard, launcher
from distopt.data.sampler import shard
from distopt.errors import LaunchError
from distopt.metrics import MetricsFile, Progress
from distopt.replica import Batch

__all__ = ["Job", "Program", "Record", "main", "run_ranks"]

Program = Literal["distopt", "independent", "torch"]


@dataclass(frozen=True)
class Job:
    """What the ranks shall do.

    Attributes:
        program: "distopt": its training loop, input included. "independent": the same on every rank's own
            part of the batch, without communication. "torch": PyTorch's step on a batch made before.
        global_batch: examples in a step, over all ranks.
        steps: how many are timed.
        warmup: how many go before.
        threads: of each rank.
        normalize: with the two local response normalizations, or without.
        device: as `choose_device` reads it.
    """

    program: Program
    global_batch: int
    steps: int = 20
    warmup: int = 5
    threads: int = 1
    normalize: bool = True
    device: str | None = None


@dataclass(frozen=True)
class Record:
    """What one rank measured.

    Attributes:
        rank: its number.
        host: where it ran.
        device: what it computed on.
        step_seconds: of each step.
        phases_seconds: of all steps together, by phase; empty for PyTorch.
        start_bytes: peak memory of the process before it made the network: interpreter and libraries.
        peak_bytes: peak memory of the process at the end.
    """

    rank: int
    host: str
    device: str
    step_seconds: list[float]
    phases_seconds: dict[str, float]
    start_bytes: int
    peak_bytes: int


def run_ranks(job: Job, ranks: int | None, timeout_seconds: float = 1800.0) -> list[Record]:
    """Run a job in new processes of this machine.

    Args:
        job: what they do.
        ranks: how many mpirun starts, each with cores of its own where there are enough; None runs one
            process without mpirun.
        timeout_seconds: limit of the run.

    Returns:
        A record per rank.

    Raises:
        LaunchError: there is no launcher, or the ranks failed.
        subprocess.TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory(prefix="distopt-bench-") as folder:
        output = Path(folder) / "records.json"
        command = [sys.executable, "-m", "distopt.bench.worker", json.dumps(asdict(job)), str(output)]
        if ranks is None:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                env=launcher.environment(1, threads=job.threads),
                check=False,
            )
        else:
            done = launcher.run(
                ranks, command, timeout_seconds=timeout_seconds, bind=True, threads=job.threads
            )
        if done.returncode or not output.exists():
            raise LaunchError(
                f"{job.program} on {ranks or 1} rank(s) ended with code {done.returncode}:\n"
                f"{(done.stdout + done.stderr)[-4000:]}"
            )
        return [Record(**record) for record in json.loads(output.read_text())]


def main(arguments: list[str] | None = None) -> None:
    """Run a job on this rank; rank 0 writes the records of all."""
    parser = argparse.ArgumentParser(
        description="Run the training steps of a benchmark; see `distopt bench`."
    )
    parser.add_argument("job", help="fields of a Job, as JSON")
    parser.add_argument("output", type=Path, help="file for the records of all ranks, as JSON")
    chosen = parser.parse_args(arguments)
    job = Job(**json.loads(chosen.job))
    with connect() as communicator, guard(communicator), threadpool_limits(job.threads):
        device, _ = choose_device(job.device, communicator.local_rank)
        if job.program == "torch":
            record = _run_torch(job, communicator, device, chosen.output.with_name("meeting"))
        else:
            record = _run_distopt(job, communicator, device)
        records = communicator.all_gather_object(asdict(record))
        if communicator.rank == 0:
            chosen.output.write_text(json.dumps(records))


class _StepTimes(Progress):
    """Notes when the training loop ends a step, and lets go of what came before the timed steps."""

    def __init__(self, trainer: Any, warmup: int) -> None:
        super().__init__(total=0, shown=False)
        self._trainer, self._warmup = trainer, warmup
        self.ends: list[float] = []
        self.phases: dict[str, float] = {}

    def step(self, number: int) -> None:
        if number < self._warmup:
            return
        phases = self._trainer.clock.take()
        if number > self._warmup:
            for phase, seconds in phases.items():
                self.phases[phase] = self.phases.get(phase, 0.0) + seconds
        self.ends.append(time.perf_counter())


def _run_distopt(job: Job, communicator: Communicator, device: Device) -> Record:
    start_bytes = _peak_bytes()
    members, batch = communicator, job.global_batch
    if job.program == "independent":
        own = shard(batch, communicator.rank, communicator.size)
        members, batch = LocalCommunicator(), own.stop - own.start
    trainer = make_trainer(members, device, batch, job.warmup + job.steps, job.normalize)
    times = _StepTimes(trainer, job.warmup)
    communicator.barrier()
    trainer.run(times, MetricsFile(None))
    return _record(communicator, device, times.ends, times.phases, start_bytes)


def _run_torch(job: Job, communicator: Communicator, device: Device, meeting_file: Path) -> Record:
    batch = prepared_batch(job.global_batch)
    own = shard(job.global_batch, communicator.rank, communicator.size)
    peer.set_threads(job.threads)
    if communicator.size > 1:
        peer.connect_gloo(communicator, meeting_file)
    start_bytes = _peak_bytes()
    step = peer.make_step(
        Batch(batch.images[own], batch.labels[own]),
        device,
        layout="channels_last",
        normalize=job.normalize,
        distributed=communicator.size > 1,
    )
    ends: list[float] = []
    for number in range(job.warmup + job.steps + 1):
        if number >= job.warmup:
            ends.append(time.perf_counter())
        if number < job.warmup + job.steps:
            loss = float(step())  # waits for a GPU, as distopt's step does for its loss
            if not math.isfinite(loss):
                raise ValueError(f"PyTorch's loss is {loss} at step {number}")
    return _record(communicator, device, ends, {}, start_bytes)


def _record(
    communicator: Communicator, device: Device, ends: list[float], phases: dict[str, float], start_bytes: int
) -> Record:
    return Record(
        rank=communicator.rank,
        host=communicator.host,
        device=str(device),
        step_seconds=[end - begin for begin, end in itertools.pairwise(ends)],
        phases_seconds=phases,
        start_bytes=start_bytes,
        peak_bytes=_peak_bytes(),
    )


def _peak_bytes() -> int:
    """Return the peak resident memory of this process.

    On Linux not from getrusage: what it tells of a young process includes the one that started it.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
