"""What the commands of the command line have in common: options, devices, errors in one line."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distopt.backend import Device
    from distopt.communicators import Communicator
    from distopt.models import Task

__all__ = [
    "DataDir",
    "DeviceOption",
    "Json",
    "bucket_bytes_of",
    "choose_devices",
    "devices_of",
    "find_task",
    "limit_threads",
    "make_output",
    "plain_errors",
    "same_error_everywhere",
    "say_devices",
]

DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with the data; else DISTOPT_DATA, else a cache folder in the home directory."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, or one of them with a number; a usable GPU when not given.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]


_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_RANK_0_FIRST_SECONDS = 1.0  # it has spoken by then, and its launcher has ended the others


@contextmanager
def plain_errors() -> Generator[None]:
    """Print an error that the user can mend without a traceback, and exit with 1.

    Under a launcher rank 0 speaks first, and alone where its launcher then ends the others: this is for
    errors before ranks can talk to each other; see `same_error_everywhere`.
    """
    from distopt.errors import DistoptError

    try:
        yield
    except (DistoptError, ValueError) as error:
        rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
        if rank != "0":
            time.sleep(_RANK_0_FIRST_SECONDS)
        _print_error(str(error))
        raise typer.Exit(1) from error


@contextmanager
def same_error_everywhere(communicator: Communicator, *kinds: type[Exception]) -> Generator[None]:
    """Print what all ranks raise in the block once, and exit with 1 on every rank, without MPI_Abort.

    What some ranks alone raise ends the job as under `guard`, and so does every other exception. Collective,
    at the end of the block.

    Args:
        communicator: the ranks.
        kinds: of exceptions that every rank raises or none, where the block communicates: a rank that
            raised alone would meet others in another collective. By default those that a user's mistake
            raises, for a block that does not communicate.
    """
    from distopt.communicators import guard
    from distopt.errors import DistoptError

    error: Exception | None = None
    with guard(communicator):
        expected = kinds or (DistoptError, ValueError)
        try:
            yield
        except expected as caught:
            error = caught
        everyone = communicator.all_gather_object(None if error is None else str(error))
        if error is not None and None in everyone:
            raise error
    if error is not None:
        if communicator.rank == 0:
            for message in dict.fromkeys(everyone):
                _print_error(message)
        raise typer.Exit(1) from error


def _print_error(message: str) -> None:
    print(f"distopt: error: {message}", file=sys.stderr, flush=True)


def bucket_bytes_of(mib: float | None) -> int | None:
    """Return --bucket-mib in bytes.

    Raises:
        ValueError: it is no size.
    """
    if mib is None:
        return None
    size = mib * (1 << 20)
    if not (math.isfinite(size) and size >= 1):
        raise ValueError(
            f"--bucket-mib must be a size in MiB above 0, as in 4 or 0.5, got {mib:g}; leave it out to have "
            "it measured"
        )
    return int(size)


def make_output(folder: Path | None, communicator: Communicator) -> None:
    """Make the folder of --output on rank 0, and see that files can be written there. Collective.

    Raises:
        CheckpointError: it can't be made or written to; on every rank.
    """
    from distopt.errors import CheckpointError
    from distopt.ranks import from_rank_0

    def make() -> None:
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise CheckpointError(
                f"--output {folder}: {error.strerror or error}. Name a folder that can be made and "
                "written to."
            ) from error

    from_rank_0(communicator, make)


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: there is none of this name.
    """
    from distopt.models import TASKS

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def choose_devices(request: str | None, communicator: Communicator, replicas: int) -> list[Device]:
    """Choose this rank's devices, set its threads, and let rank 0 print every rank's choice. Collective."""
    return say_devices(*devices_of(request, communicator, replicas), communicator)


def devices_of(request: str | None, communicator: Communicator, replicas: int) -> tuple[list[Device], str]:
    """Choose this rank's devices; returns the reason, too.

    Raises:
        BackendError: what is asked for is not there.
        ValueError: no such device, or no replica.
    """
    from distopt.backend import Device, choose_device

    if replicas < 1:
        raise ValueError(f"--replicas-per-rank must be at least 1, got {replicas}")
    devices: list[Device] = []
    reason = ""
    for number in range(replicas):
        chosen, reason = choose_device(request, communicator.local_rank * replicas + number)
        # On a CPU the replicas are logical devices of one processor.
        devices.append(Device("cpu", number) if chosen.kind == "cpu" else chosen)
    return devices, reason


def say_devices(
    devices: list[Device], reason: str, communicator: Communicator, threads_wanted: int | None = None
) -> list[Device]:
    """Set this rank's threads, let rank 0 print every rank's devices, and return this rank's. Collective."""
    threads = limit_threads(communicator, threads_wanted)
    line = (
        f"rank {communicator.rank} of {communicator.size} on {communicator.host}: "
        f"{', '.join(map(str, devices))}, {threads} thread(s) ({reason})"
    )
    for text in communicator.all_gather_object(line):
        if communicator.rank == 0:
            print(text, flush=True)
    return devices


def limit_threads(communicator: Communicator, wanted: int | None = None) -> int:
    """Give each rank of a host its share of the cores for matrix products, unless the user said how many.

    Canonical mode wants 1, whatever the number of ranks: sums within a product depend on the threads.
    """
    from threadpoolctl import threadpool_limits

    asked = os.environ.get("OMP_NUM_THREADS") or os.environ.get("OPENBLAS_NUM_THREADS")
    if asked and asked.isdigit():
        return int(asked)
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
    mine = len(cores) or os.cpu_count() or 1
    # Ranks that a launcher bound have cores of their own; others share theirs.
    ranks = communicator.all_gather_object((communicator.host, cores))
    sharing = sum(1 for host, others in ranks if host == communicator.host and (not cores or others & cores))
    threads = max(1, mine // max(1, sharing)) if wanted is None else wanted
    threadpool_limits(threads)
    return threads
