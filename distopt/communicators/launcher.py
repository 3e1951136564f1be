"""Start a program on N ranks of this machine: find mpirun, and say to it what it needs.

For benchmarks and tests; users start jobs with their own mpirun, srun or launch/local.sh.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distopt.errors import LaunchError

__all__ = ["Launcher", "command", "environment", "find_launcher", "run", "usable_cores"]

# What a launcher tells its ranks; a job started from inside another one must not see it.
_PREFIXES = ("OMPI_COMM_", "OMPI_APP_", "OMPI_FILE_", "OMPI_FIRST_", "OMPI_NUM_", "OMPI_UNIVERSE")
_MORE_PREFIXES = ("PMIX_", "PMI_", "PRTE_LAUNCHED", "HYDI_", "HYDRA_", "MPI_LOCAL", "MPIR_CVAR_CH3")


@dataclass(frozen=True)
class Launcher:
    """An MPI launcher: its path, and which MPI it belongs to."""

    path: str
    vendor: Literal["openmpi", "mpich"]
    version: str


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def find_launcher() -> Launcher | None:
    """Look for mpirun or mpiexec: beside this Python, where a wheel puts it, then on PATH."""
    beside = str(Path(sys.executable).parent)
    for folder in (beside, None):
        for name in ("mpirun", "mpiexec"):
            path = shutil.which(name, path=folder)
            launcher = _identify(path) if path else None
            if launcher is not None:
                return launcher
    return None


def _identify(path: str) -> Launcher | None:
    try:
        shown = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None  # there, but unusable: the next one may do
    if "Open MPI" in shown or "OpenRTE" in shown:
        return Launcher(path, "openmpi", shown.splitlines()[0].rpartition(" ")[2])
    if "HYDRA" in shown or "MPICH" in shown:
        versions = [line for line in shown.splitlines() if "Version" in line]
        return Launcher(path, "mpich", versions[0].split()[-1] if versions else "unknown")
    return None


def command(
    ranks: int,
    program: Sequence[str],
    *,
    bind: bool = False,
    threads: int | None = None,
    launcher: Launcher | None = None,
) -> list[str]:
    """Return the command line that runs `program` on `ranks` ranks; see `environment` for the rest.

    Args:
        ranks: how many.
        program: the program and its arguments, as in `[sys.executable, "-m", "distopt"]`.
        bind: give each rank `threads` cores of its own. Only for one job at a time: two jobs would
            get the same cores. Without effect on more ranks than cores.
        threads: threads of a rank; cores // ranks if None.
        launcher: as found by `find_launcher` if None.

    Raises:
        LaunchError: there is no launcher.
        ValueError: fewer than one rank.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    launcher = launcher or find_launcher()
    if launcher is None:
        raise LaunchError(
            "no mpirun or mpiexec of Open MPI or MPICH was found beside Python or on PATH. "
            "Install an MPI with `pip install 'distopt[local]'`, or load your site's MPI module."
        )
    threads = threads or max(1, usable_cores() // ranks)
    bind = bind and ranks * threads <= usable_cores()
    if launcher.vendor == "mpich":
        binding = ["-bind-to", f"core:{threads}"] if bind else ["-bind-to", "none"]
    elif bind:
        binding = ["--map-by", f"slot:PE={threads}:OVERSUBSCRIBE", "--bind-to", "core"]
    else:
        binding = ["--oversubscribe", "--bind-to", "none"]
    return [launcher.path, "-n", str(ranks), *binding, *program]


def environment(
    ranks: int, *, threads: int | None = None, base: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment to start `command` with.

    It lets Open MPI run as root, share cores politely (without yielding an allreduce on a busy
    machine takes 10 to 60 times as long) and keep a harmless notice of its one-sided UCX component
    to itself; it gives each rank its share of threads; and it forgets any launcher that started
    this process.

    Args:
        ranks: how many will run.
        threads: threads of a rank; cores // ranks if None.
        base: what to start from; this process's environment if None. What it says about binding,
            components and yielding stays.
    """
    source = os.environ if base is None else base
    kept = {name: value for name, value in source.items() if not name.startswith(_PREFIXES + _MORE_PREFIXES)}
    count = str(threads or max(1, usable_cores() // ranks))
    defaults = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_MCA_osc": "^ucx",
    }
    return defaults | kept | {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}


def run(
    ranks: int,
    program: Sequence[str],
    *,
    timeout_seconds: float,
    bind: bool = False,
    threads: int | None = None,
    cwd: str | os.PathLike[str] | None = None,
    extra_environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program on several ranks and return its exit code, stdout and stderr.

    When the time is over, or this process is interrupted, the whole job is ended.

    Raises:
        LaunchError: there is no launcher.
        subprocess.TimeoutExpired: it took too long; carries what was printed until then.
    """
    process = subprocess.Popen(
        command(ranks, program, bind=bind, threads=threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        cwd=cwd,
        env=environment(ranks, threads=threads) | dict(extra_environment or {}),
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        out, err = _end(process)
        raise subprocess.TimeoutExpired(error.cmd, error.timeout, out, err) from None
    except BaseException:
        _end(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    # First ask: only the launcher knows its ranks, which are in process groups of their own.
    process.terminate()
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()
