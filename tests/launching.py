"""How tests start programs under mpirun."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from distopt.communicators import launcher
from distopt.communicators.connect import announced_ranks

ROOT = Path(__file__).parents[1]

needs_mpirun = pytest.mark.skipif(
    launcher.find_launcher() is None or announced_ranks() is not None,
    reason="no mpirun of Open MPI or MPICH beside Python or on PATH"
    if launcher.find_launcher() is None
    else "already under a launcher",
)


def mpirun_command(n: int, program: Sequence[str] = ()) -> list[str]:
    """Return the command line that runs `program` on n ranks of one thread."""
    return launcher.command(n, program, threads=1)


def run_python(n: int, arguments: Sequence[str], timeout_seconds: float, **environment: str):
    """Run Python with `arguments` on n ranks of one thread, with this checkout's distopt."""
    return launcher.run(
        n,
        [sys.executable, *arguments],
        timeout_seconds=timeout_seconds,
        threads=1,
        cwd=ROOT,
        extra_environment={"PYTHONPATH": str(ROOT), **environment},
    )
