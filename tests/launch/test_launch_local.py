"""launch/local.sh: the command that it makes of its arguments, and what becomes of signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPEN_MPI = "mpirun (Open MPI) 5.0.11"
MPICH = "HYDRA build details:\n    Version:    5.0.2"


def usable_cores():
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")  # a container's share, in microseconds of a period
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return cores if quota == "max" else min(cores, -(-int(quota) // int(period)))


CORES = usable_cores()


@pytest.fixture
def environment(tmp_path, program):
    """An environment folder with a distopt that prints its arguments."""
    program(tmp_path / "env" / "bin" / "distopt", '#!/bin/sh\necho "distopt $*"\nexit "${CODE:-0}"\n')
    return str(tmp_path / "env")


def start(scripts, environment, *arguments, **more):
    return scripts.run("launch/local.sh", *arguments, DISTOPT_VENV=environment, **more)


def test_arguments_after_the_dashes_reach_distopt_unchanged(scripts, environment, launcher_stub):
    stub = launcher_stub(OPEN_MPI)
    done = start(
        scripts, environment, "-n", "2", "--", "train", "digits", "--output", "a b", "--seed=3",
        DISTOPT_MPIRUN=str(stub),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "distopt train digits --output a b --seed=3" in done.stdout.splitlines()


def test_the_exit_code_is_that_of_the_job(scripts, environment, launcher_stub):
    stub = str(launcher_stub(OPEN_MPI))
    done = start(scripts, environment, "-n", "2", "--", "x", DISTOPT_MPIRUN=stub, CODE="37")
    assert done.returncode == 37


def test_dry_run_prints_the_command_and_starts_nothing(scripts, environment, launcher_stub):
    stub = str(launcher_stub(OPEN_MPI))
    many = str(CORES + 1)
    done = start(scripts, environment, "-n", many, "--dry-run", "--", "train", "digits", DISTOPT_MPIRUN=stub)
    lines = done.stdout.splitlines()
    assert lines[-1].split() == [
        stub, "-n", many, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none",
        f"{environment}/bin/distopt", "train", "digits",
    ]  # fmt: skip
    assert "OMP_NUM_THREADS=1" in lines
    assert "OMPI_MCA_mpi_yield_when_idle=1" in lines
    assert "distopt train" not in lines


def test_threads_are_cores_by_ranks_and_binding_gives_each_rank_its_cores(
    scripts, environment, launcher_stub
):
    stub = str(launcher_stub(OPEN_MPI))
    arguments = ("-n", "1", "--bind", "core", "--dry-run", "--", "train")
    lines = start(scripts, environment, *arguments, DISTOPT_MPIRUN=stub).stdout.splitlines()
    assert f"OMP_NUM_THREADS={CORES}" in lines
    assert f"--map-by slot:PE={CORES} --bind-to core" in lines[-1]


def test_threads_asked_for_win_over_the_variable_and_that_over_the_default(
    scripts, environment, launcher_stub
):
    stub = str(launcher_stub(OPEN_MPI))
    shown = {}
    for name, extra in {"variable": (), "option": ("--threads", "5")}.items():
        done = start(
            scripts, environment, "-n", "1", *extra, "--dry-run", "--", "train",
            DISTOPT_MPIRUN=stub, OMP_NUM_THREADS="3",
        )  # fmt: skip
        shown[name] = [line for line in done.stdout.splitlines() if "BLAS_NUM" in line]
    assert shown == {"variable": ["OPENBLAS_NUM_THREADS=3"], "option": ["OPENBLAS_NUM_THREADS=5"]}


def test_mpich_gets_its_own_words(scripts, environment, launcher_stub):
    stub = str(launcher_stub(MPICH))
    arguments = ("-n", "1", "--threads", "1", "--bind", "core", "--dry-run", "--", "train")
    done = start(scripts, environment, *arguments, DISTOPT_MPIRUN=stub)
    assert f"{stub} -n 1 -bind-to core:1 {environment}" in done.stdout
    assert "OMPI_" not in done.stdout


def test_the_launcher_beside_distopt_comes_before_the_one_on_path(
    scripts, environment, launcher_stub, tmp_path
):
    beside = launcher_stub(OPEN_MPI, "env/bin")
    other = launcher_stub(MPICH, "other")
    path = f"{other.parent}:/usr/bin:/bin"
    done = start(scripts, environment, "-n", "1", "--dry-run", "--", "train", PATH=path)
    assert done.stdout.splitlines()[-1].startswith(str(beside))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-n", "0", "--", "train"], "-n must be a whole number from 1, got '0'"),
        (["-n", "two", "--", "train"], "got 'two'"),
        (["-n", "2", "--threads", "1.5", "--", "train"], "got '1.5'"),
        (["-n", "2", "--bind", "socks", "--", "train"], "auto, core, numa or none, got 'socks'"),
        (["-n", "2", "train"], "unknown argument 'train'"),
        (["-n", "2"], "nothing to run"),
        (["-n"], "-n needs a value"),
    ],
)
def test_wrong_arguments_are_named(scripts, environment, launcher_stub, arguments, told):
    stub = str(launcher_stub(OPEN_MPI))
    done = start(scripts, environment, *arguments, DISTOPT_MPIRUN=stub)
    assert done.returncode == 2
    assert told in done.stderr


def test_a_missing_launcher_is_told_with_the_command_that_mends_it(scripts, environment):
    done = start(scripts, environment, "-n", "2", "--", "train", DISTOPT_MPIRUN="/nowhere/mpirun")
    assert done.returncode == 1
    assert "no mpirun or mpiexec" in done.stderr
    assert "distopt[local]" in done.stderr


def test_a_missing_distopt_is_told_with_the_command_that_mends_it(scripts):
    done = scripts.run("launch/local.sh", "-n", "2", "--", "train")
    assert done.returncode == 1
    assert "distopt is not installed" in done.stderr
    assert "launch/venv.sh" in done.stderr


RANK = """#!{python}
import os, signal, sys, time
from mpi4py import MPI
comm = MPI.COMM_WORLD
kind, folder = sys.argv[1:]
if kind == "save":
    def save(number, frame):
        open(f"{{folder}}/saved{{comm.rank}}", "w").close()
        # The first rank to end takes the others with it: wait for them.
        while len([name for name in os.listdir(folder) if name.startswith("saved")]) < comm.size:
            time.sleep(0.01)
        os._exit(9)
    signal.signal(signal.SIGUSR1, save)
elif kind == "deaf":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
total = comm.allreduce(comm.rank + 1)
open(f"{{folder}}/up{{comm.rank}}", "w").write(f"{{comm.size}} {{total}} {{os.getpid()}}")
if kind == "abort":
    comm.Abort(7)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def job(scripts, tmp_path, program, real_mpi):
    """Starts local.sh with 2 real ranks: job(kind) gives the process and the ranks' folder."""
    program(tmp_path / "env" / "bin" / "distopt", RANK.format(python=sys.executable))
    folder = tmp_path / "out"
    folder.mkdir()
    started = []

    def begin(kind):
        process = subprocess.Popen(
            ["bash", scripts.clone / "launch/local.sh", "-n", "2", "--", kind, str(folder)],
            env=scripts.environment | real_mpi | {"DISTOPT_VENV": str(tmp_path / "env")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell can't trap what was ignored when it began, as it is under nohup.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process, folder

    yield begin
    # Killed ranks end their launcher, and that the script: nothing is left also where the script failed.
    for path in folder.glob("up*"):
        pid = int(path.read_text().split()[2])
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait(30)
        process.stdout.close()


def wait_for_ranks(process, folder):
    """Waits until both ranks are in their loop; returns what they wrote."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit and process.poll() is None:
        texts = [path.read_text() for path in sorted(folder.glob("up*"))]
        if len(texts) == 2 and all(texts):
            return texts
        time.sleep(0.05)
    raise AssertionError(f"the ranks did not start: {process.communicate(timeout=20)[0]}")


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_real_ranks_form_one_world_and_abort_gives_its_code(job):
    process, folder = job("abort")
    process.wait(60)
    assert process.returncode == 7
    texts = [path.read_text().split()[:2] for path in sorted(folder.glob("up*"))]
    assert texts == [["2", "3"], ["2", "3"]]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_signal_reaches_every_rank_as_usr1(job, number):
    process, folder = job("save")
    wait_for_ranks(process, folder)
    process.send_signal(number)
    assert process.wait(30) == 9
    assert {path.name for path in folder.glob("saved*")} == {"saved0", "saved1"}


def test_ctrl_c_ends_ranks_that_know_no_usr1_and_leaves_none_behind(job):
    process, folder = job("plain")
    texts = wait_for_ranks(process, folder)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) not in (0, None)
    assert not any(is_alive(int(text.split()[2])) for text in texts)


def test_the_second_signal_ends_ranks_that_go_on_after_the_first(job):
    process, folder = job("deaf")
    texts = wait_for_ranks(process, folder)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) not in (0, None)
    assert not any(is_alive(int(text.split()[2])) for text in texts)
