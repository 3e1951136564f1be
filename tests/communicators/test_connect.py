import importlib.util
import subprocess
import sys

import pytest

from distopt.communicators import LocalCommunicator, connect
from distopt.communicators.connect import announced_ranks
from distopt.communicators.launcher import environment
from distopt.communicators.watchdog import timeout_from_environment
from distopt.errors import LaunchError

needs_mpi4py = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed"
)


def run_alone(program, **variables):
    """Run a program as a process of its own, which no launcher started."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(1) | {"PYTHONPATH": ":".join(sys.path), **variables},
        check=False,
    )


@pytest.mark.parametrize(
    ("variables", "ranks", "launcher"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4, "Open MPI"),
        ({"PMI_SIZE": "3"}, 3, "MPICH"),
        ({"JSM_NAMESPACE_SIZE": "6"}, 6, "jsrun"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 8, "srun"),
        ({"PMIX_RANK": "0"}, None, "PMIx"),
        # mpirun inside a batch job: Slurm's step is that of mpirun's daemons, one per node.
        ({"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "16"}, 16, "Open MPI"),
    ],
)
def test_the_launcher_is_found_in_the_environment(variables, ranks, launcher):
    found = announced_ranks(variables)
    assert found is not None
    assert found[0] == ranks
    assert launcher in found[1]


def test_a_batch_script_that_calls_python_directly_is_one_rank():
    assert announced_ranks({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None


def test_a_launcher_that_tells_nonsense_is_an_error():
    with pytest.raises(LaunchError, match=r"PMI_SIZE .* got 'many'"):
        announced_ranks({"PMI_SIZE": "many"})


@pytest.mark.parametrize("variables", [{}, {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_one_rank_is_local_and_does_not_import_mpi4py(variables):
    program = "import sys; from distopt.communicators import connect; print(connect().name);"
    program += "print([name for name in sys.modules if name.partition('.')[0] == 'mpi4py'])"
    assert run_alone(program, **variables).stdout.split() == ["local", "[]"]


def test_local_is_local_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert isinstance(connect("local"), LocalCommunicator)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="got 'nccl'"):
        connect("nccl")


@needs_mpi4py
def test_ranks_that_would_run_as_independent_jobs_are_refused():
    """As under `srun` with the wrong PMI: 4 processes, each of which MPI believes to be alone."""
    result = run_alone("from distopt.communicators import connect; connect()", SLURM_STEP_NUM_TASKS="4")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "LaunchError: srun (SLURM_STEP_NUM_TASKS=4) started 4 ranks, but MPI sees 1" in last
    assert "srun --mpi=list" in last


def test_missing_mpi4py_under_a_launcher_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"mpi4py is not installed.*'distopt\[local\]'"):
        connect()


def test_an_mpi4py_without_an_mpi_says_what_failed(monkeypatch, tmp_path):
    broken = tmp_path / "mpi4py"
    broken.mkdir()
    (broken / "__init__.py").write_text("")
    (broken / "MPI.py").write_text("raise RuntimeError('cannot load MPI library')")
    result = run_alone(
        "from distopt.communicators import connect; connect()",
        PYTHONPATH=":".join([str(tmp_path), *sys.path]),
        OMPI_COMM_WORLD_SIZE="2",
    )
    last = result.stderr.strip().splitlines()[-1]
    assert "LaunchError" in last
    assert "mpi4py can't be used (cannot load MPI library)" in last


@pytest.mark.parametrize(("text", "seconds"), [("", 600.0), ("2.5", 2.5), ("0", 0.0)])
def test_the_timeout_is_read_from_the_environment(monkeypatch, text, seconds):
    monkeypatch.setenv("DISTOPT_TIMEOUT", text)
    assert timeout_from_environment() == seconds


@pytest.mark.parametrize("text", ["-1", "soon", "nan"])
def test_a_timeout_that_is_no_time_is_refused(monkeypatch, text):
    monkeypatch.setenv("DISTOPT_TIMEOUT", text)
    with pytest.raises(ValueError, match=f"got '{text}'"):
        timeout_from_environment()
