"""Find out how this process was started, and give it its communicator."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

from distopt.communicators.communicator import Communicator
from distopt.communicators.guard import install
from distopt.communicators.local import LocalCommunicator
from distopt.communicators.tuning import algorithm_from_environment, checked_name
from distopt.communicators.watchdog import timeout_from_environment
from distopt.errors import LaunchError

__all__ = ["announced_ranks", "connect"]

Kind = Literal["auto", "local", "mpi"]

# By priority: inside a Slurm job mpirun's own variables are right, and Slurm's describe mpirun's
# daemons.
_SIZE_VARIABLES = (
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "an MPICH-like launcher (mpiexec, or srun --mpi=pmi2)"),
    ("MV2_COMM_WORLD_SIZE", "MVAPICH's launcher"),
    ("JSM_NAMESPACE_SIZE", "jsrun"),
    ("SLURM_STEP_NUM_TASKS", "srun"),
)


def announced_ranks(environ: Mapping[str, str] = os.environ) -> tuple[int | None, str] | None:
    """Read from the environment how many ranks the launcher has started.

    Returns:
        The number (None where the launcher does not tell it) and the launcher's name; None if this
        process was started by none.

    Raises:
        LaunchError: a launcher's variable holds no number.
    """
    for variable, launcher in _SIZE_VARIABLES:
        text = environ.get(variable)
        if text is None:
            continue
        if not text.isdigit():
            raise LaunchError(f"{variable} of {launcher} must be a number of ranks, got {text!r}")
        return int(text), f"{launcher} ({variable}={text})"
    return (None, "a PMIx launcher (PMIX_RANK is set)") if "PMIX_RANK" in environ else None


def connect(
    kind: Kind = "auto", *, overlap: bool | None = None, algorithm: str | None = None
) -> Communicator:
    """Return this process's communicator.

    Under MPI an unhandled exception on any rank from now on ends the whole job (see guard.py), and
    a wait in a collective is limited by the environment variable DISTOPT_TIMEOUT (600 s; see
    watchdog.py).

    Args:
        kind: "auto": MPI when a launcher has started several ranks, else local. "local": one rank.
            "mpi": MPI, whatever the environment says.
        overlap: whether all_reduce goes on in the background of the computation; None: where it
            pays, which is between hosts. Only for MPI.
        algorithm: how all_reduce is done, wherever it can be done so: "mpi", "mpi-nonblocking" (with
            overlap=True), "shared" (ranks of one host), "ring" or "hierarchical" (several hosts), or
            "auto": the fastest, as measured. The environment variable DISTOPT_ALLREDUCE if None. Only
            for MPI.

    Returns:
        A communicator of all ranks. It is closed when the process ends, if not before.

    Raises:
        LaunchError: the launcher started several ranks but MPI sees another number, or mpi4py is
            missing.
        ValueError: `kind`, DISTOPT_TIMEOUT or DISTOPT_ALLREDUCE can't be read, the algorithm is not
            possible here, or differs between ranks.
    """
    if kind not in get_args(Kind):
        raise ValueError(f'kind must be "auto", "local" or "mpi", got {kind!r}')
    chosen = algorithm_from_environment() if algorithm is None else checked_name(algorithm)
    announced = announced_ranks()
    if kind == "local" or (kind == "auto" and (announced is None or announced[0] == 1)):
        return LocalCommunicator()
    mpi = _import_mpi(announced)
    size: int = mpi.world_size()
    if announced is not None and announced[0] is not None and announced[0] != size:
        raise LaunchError(
            f"{announced[1]} started {announced[0]} ranks, but MPI sees {size}: they would run "
            f"as independent jobs. mpi4py uses {mpi.library_name()}. Start the job with that "
            "MPI's own mpirun, or with the --mpi option of srun that fits it (pmix for Open MPI, "
            "pmi2 for MPICH; see `srun --mpi=list`)."
        )
    communicator: Communicator = mpi.MpiCommunicator(
        overlap=overlap, algorithm=chosen, timeout_seconds=timeout_from_environment()
    )
    install(communicator)
    atexit.register(communicator.close)
    return communicator


def _import_mpi(announced: tuple[int | None, str] | None) -> Any:
    why = f"the job was started by {announced[1]}" if announced else "MPI was asked for"
    mend = (
        "Install it with `pip install 'distopt[local]'`, which brings an MPI, or with "
        "`pip install 'distopt[mpi]'` for the MPI of your site."
    )
    if importlib.util.find_spec("mpi4py") is None:
        raise LaunchError(f"{why}, but mpi4py is not installed. {mend}")
    try:
        return importlib.import_module("distopt.communicators.mpi")
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        raise LaunchError(f"{why}, but mpi4py can't be used ({error}). {mend}") from error
