"""What the commands of the command line have in common: options, devices, errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from distopt.backend import Device
    from distopt.communicators import Communicator
    from distopt.models import Task

__all__ = ["DataDir", "DeviceOption", "Json", "choose_devices", "find_task", "limit_threads", "plain_errors"]

DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with the data; else DISTOPT_DATA, else a cache folder in the home directory."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, or one of them with a number; a usable GPU when not given.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]


@contextmanager
def plain_errors() -> Generator[None]:
    """Print an error that the user can mend without a traceback, and exit with 1."""
    from distopt.errors import DistoptError

    try:
        yield
    except (DistoptError, ValueError) as error:
        print(f"distopt: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def find_task(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: there is none of this name.
    """
    from distopt.models import TASKS

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def choose_devices(
    request: str | None, communicator: Communicator, replicas: int, threads_wanted: int | None = None
) -> list[Device]:
    """Choose this rank's devices, set its threads, and let rank 0 print every rank's choice."""
    from distopt.backend import Device, choose_device

    if replicas < 1:
        raise ValueError(f"--replicas-per-rank must be at least 1, got {replicas}")
    devices: list[Device] = []
    reason = ""
    for number in range(replicas):
        chosen, reason = choose_device(request, communicator.local_rank * replicas + number)
        # On a CPU the replicas are logical devices of one processor.
        devices.append(Device("cpu", number) if chosen.kind == "cpu" else chosen)
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
