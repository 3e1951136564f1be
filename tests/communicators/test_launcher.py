import os
import subprocess
import sys
import time

import pytest
from launching import needs_mpirun

from distopt.communicators import launcher
from distopt.communicators.launcher import Launcher, command, environment
from distopt.errors import LaunchError

OPEN_MPI = Launcher("/opt/mpirun", "openmpi", "5.0.11")
MPICH = Launcher("/opt/mpiexec", "mpich", "5.0.2")


@pytest.fixture
def fresh_search(monkeypatch, tmp_path):
    """A machine where only what the test puts into the folder can be found."""
    launcher.find_launcher.cache_clear()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    yield tmp_path
    launcher.find_launcher.cache_clear()


def install(folder, name, prints):
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\n/bin/echo '{prints}'\n")
    program.chmod(0o755)
    return str(program)


def test_open_mpi_is_recognised(fresh_search):
    path = install(fresh_search, "mpirun", "mpirun (Open MPI) 4.1.6")
    assert launcher.find_launcher() == Launcher(path, "openmpi", "4.1.6")


def test_mpich_is_recognised_by_the_name_mpiexec_too(fresh_search):
    text = "HYDRA build details:\n    Version:                                 4.2.1"
    path = install(fresh_search, "mpiexec", text)
    assert launcher.find_launcher() == Launcher(path, "mpich", "4.2.1")


def test_the_launcher_beside_python_is_preferred(fresh_search):
    install(fresh_search, "mpirun", "mpirun (Open MPI) 4.1.6")
    path = install(fresh_search / "nowhere", "mpiexec", "mpiexec (OpenRTE) 5.0.1")
    assert launcher.find_launcher() == Launcher(path, "openmpi", "5.0.1")


def test_programs_that_are_no_launcher_are_passed_over(fresh_search):
    install(fresh_search, "mpirun", "not an MPI")
    (fresh_search / "mpiexec").write_text("#!/no/such/interpreter\n")
    (fresh_search / "mpiexec").chmod(0o755)
    assert launcher.find_launcher() is None
    with pytest.raises(LaunchError, match=r"no mpirun or mpiexec .*'distopt\[local\]'"):
        command(2, ["x"])


@pytest.mark.parametrize(
    ("found", "arguments", "expected"),
    [
        (OPEN_MPI, (2, False, 1), "/opt/mpirun -n 2 --oversubscribe --bind-to none prog"),
        (
            OPEN_MPI,
            (2, True, 4),
            "/opt/mpirun -n 2 --map-by slot:PE=4:OVERSUBSCRIBE --bind-to core prog",
        ),
        (OPEN_MPI, (16, True, 1), "/opt/mpirun -n 16 --oversubscribe --bind-to none prog"),
        (MPICH, (3, False, 1), "/opt/mpiexec -n 3 -bind-to none prog"),
        (MPICH, (2, True, 2), "/opt/mpiexec -n 2 -bind-to core:2 prog"),
        (MPICH, (3, True, 3), "/opt/mpiexec -n 3 -bind-to none prog"),
    ],
)
def test_ranks_are_bound_only_when_asked_and_when_cores_suffice(monkeypatch, found, arguments, expected):
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    ranks, bind, threads = arguments
    line = command(ranks, ["prog"], bind=bind, threads=threads, launcher=found)
    assert " ".join(line) == expected


def test_fewer_than_one_rank_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        command(0, ["x"], launcher=OPEN_MPI)


@pytest.mark.parametrize(("ranks", "threads"), [(1, "8"), (2, "4"), (3, "2"), (16, "1")])
def test_cores_are_shared_out_as_threads(monkeypatch, ranks, threads):
    monkeypatch.setattr(launcher, "usable_cores", lambda: 8)
    made = environment(ranks, base={"OMP_NUM_THREADS": "64"})
    assert made["OMP_NUM_THREADS"] == made["OPENBLAS_NUM_THREADS"] == threads


def test_the_environment_forgets_an_outer_launcher_and_keeps_the_users_choices():
    outer = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "PMIX_RANK": "1",
        "PMI_FD": "9",
        "MPI_LOCALRANKID": "0",
        "OMPI_MCA_btl": "tcp,self",
        "OMPI_MCA_mpi_yield_when_idle": "0",
        "HOME": "/home/user",
    }
    made = environment(2, base=outer, threads=1)
    assert not {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_FD", "MPI_LOCALRANKID"} & set(made)
    assert made["OMPI_MCA_btl"] == "tcp,self"
    assert made["OMPI_MCA_mpi_yield_when_idle"] == "0"
    assert made["HOME"] == "/home/user"
    assert made["OMPI_ALLOW_RUN_AS_ROOT"] == made["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"


@needs_mpirun
@pytest.mark.parametrize("bind", [False, True])
def test_a_real_job_runs_quietly_on_all_ranks(bind):
    program = "import os; print('<%s>' % len(os.sched_getaffinity(0)), end='', flush=True)"
    cores = launcher.usable_cores()
    result = launcher.run(cores, [sys.executable, "-c", program], timeout_seconds=60, bind=bind, threads=1)
    assert result.returncode == 0
    assert result.stdout.count("<1>" if bind else f"<{cores}>") == cores
    assert result.stderr.strip("\0\n") == ""


@needs_mpirun
def test_a_job_that_takes_too_long_is_ended_with_all_its_ranks(tmp_path):
    program = f"import os, time; open('{tmp_path}/%d' % os.getpid(), 'w'); time.sleep(100)"
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.run(2, [sys.executable, "-c", program], timeout_seconds=3)
    ranks = [int(path.name) for path in tmp_path.iterdir()]
    assert len(ranks) == 2
    deadline = time.monotonic() + 5
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process_id):
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
