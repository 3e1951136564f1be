"""The report on what the machine has; missing things are taken away, or replaced by broken ones."""

import json
import os
import subprocess
import sys
import time

import pytest

from distopt import backend, doctor
from distopt.communicators import launcher


def rows_by_part(rows):
    return {row.part: row for row in rows}


@pytest.fixture
def no_launch(monkeypatch):
    """Takes out what starts other processes: for tests that look at something else."""
    monkeypatch.setattr(doctor, "_mpi", list)
    monkeypatch.setattr(doctor, "_gpu", list)


needs_mpirun = pytest.mark.skipif(
    launcher.find_launcher() is None, reason="there is no mpirun beside Python or on PATH"
)


@needs_mpirun
def test_a_machine_with_mpi_is_ready_and_two_ranks_were_really_run(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    assert doctor.run(path, data_dir=str(tmp_path)) == 0
    report = json.loads(path.read_text())
    states = {row["part"]: row["state"] for row in report["rows"]}
    for part in ("Python", "NumPy", "mpi4py", "MPI library", "mpirun", "two ranks"):
        assert states[part] == "ok"
    assert report["ready_for_cpu_training"] is True
    printed = capsys.readouterr().out
    assert "Everything that training on CPUs needs is here." in printed
    for row in report["rows"]:
        assert row["found"] in printed
        assert row["fix"] in printed


def test_every_row_that_is_not_ok_says_how_to_mend_it(no_launch, tmp_path):
    for row in doctor.examine(str(tmp_path)):
        assert row.found
        assert row.state == "ok" or row.fix, row


def test_without_mpi4py_the_report_names_it_and_the_exit_code_is_one(no_launch, monkeypatch, capsys):
    monkeypatch.undo()
    present = doctor._version
    monkeypatch.setattr(doctor, "_gpu", list)
    monkeypatch.setattr(doctor, "_version", lambda n: None if n == "mpi4py" else present(n))
    assert doctor.run() == 1
    printed = capsys.readouterr().out
    assert "pip install 'distopt[local]'" in printed
    assert "needs, and does not find: mpi4py" in printed


def test_an_mpi_library_that_does_not_load_is_reported_with_its_complaint(monkeypatch):
    monkeypatch.setattr(doctor, "_ASK_MPI", "raise RuntimeError('cannot load MPI library')")
    rows = rows_by_part(doctor._mpi())
    assert rows["MPI library"].state == "missing"
    assert "cannot load MPI library" in rows["MPI library"].found
    assert "two ranks" not in rows


@pytest.mark.parametrize(
    ("library", "vendor", "state"),
    [
        ("Open MPI", "openmpi", "ok"),
        ("MPICH", "mpich", "ok"),
        ("Intel MPI", "mpich", "ok"),
        ("Open MPI", "mpich", "missing"),
        ("MPICH", "openmpi", "missing"),
    ],
)
def test_a_launcher_of_another_mpi_is_refused(monkeypatch, library, vendor, state):
    here = launcher.Launcher("/opt/bin/mpirun", vendor, "5.0")
    monkeypatch.setattr(launcher, "find_launcher", lambda: here)
    row = doctor._launcher(library, "mend")
    assert row.state == state
    assert ("every rank would run alone" in row.found) == (state == "missing")


@needs_mpirun
@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("print('ranks 1 1')", "exit code 0: ranks 1 1 / ranks 1 1"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_ranks_that_do_not_find_each_other_or_fail_are_reported(monkeypatch, program, told):
    monkeypatch.setattr(doctor, "_TWO_RANKS", program)
    row = doctor._two_ranks()
    assert row.state == "missing"
    assert row.needed
    assert told in row.found


@needs_mpirun
def test_ranks_that_hang_end_the_report_in_bounded_time(monkeypatch):
    monkeypatch.setattr(doctor, "_TWO_RANKS", "import time; time.sleep(1000)")
    monkeypatch.setattr(doctor, "_RANKS_SECONDS", 3)
    begin = time.monotonic()
    row = doctor._two_ranks()
    assert time.monotonic() - begin < 20
    assert row.state == "missing"
    assert "no answer within 3 s" in row.found


def test_forced_blas_kernels_are_a_warning_and_own_choice_is_none():
    if doctor.blas_kernels() is None:
        pytest.skip("NumPy's BLAS here is not OpenBLAS, or this is not Linux")
    code = "import dataclasses, json; from distopt import doctor;" + (
        "print(json.dumps(dataclasses.asdict(doctor._blas())))"
    )

    def row(**environment):
        clean = {n: v for n, v in os.environ.items() if not n.startswith("OPENBLAS")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=clean | environment
        )
        return json.loads(done.stdout)

    free = row()
    assert free["state"] == "ok"
    forced = row(OPENBLAS_CORETYPE="Nehalem")
    if "x86_64" not in os.uname().machine or "Nehalem" in free["found"]:
        pytest.skip("this processor has no other kernels to force")
    assert forced["state"] == "warning"
    assert "OPENBLAS_CORETYPE=Nehalem" in forced["found"]
    assert forced["fix"] == "unset OPENBLAS_CORETYPE"


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor._cores().state == "ok"
    monkeypatch.setenv("OMP_NUM_THREADS", str(launcher.usable_cores() + 1))
    assert doctor._cores().state == "warning"
    assert "unset OMP_NUM_THREADS" in doctor._cores().fix


def test_the_data_row_tells_the_folder_and_how_to_fill_it(tmp_path):
    row = doctor._data(str(tmp_path))
    assert row.state == "missing"
    assert str(tmp_path) in row.found
    assert not row.needed


def test_without_cupy_the_cpu_is_named_as_what_is_used(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    (row,) = doctor._gpu()
    assert (row.part, row.state, row.needed) == ("CuPy", "missing", False)
    assert "distopt[cuda13]" in row.fix


def test_inside_a_slurm_job_the_row_names_it(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert doctor._slurm().found == "inside job 42: 8 task(s) on n[1-2]"


@pytest.mark.gpu
@pytest.mark.skipif(not backend.gpu_status().usable, reason=backend.gpu_status().reason)
def test_on_a_gpu_machine_cupy_the_gpu_and_nvrtc_are_ok():
    rows = rows_by_part(doctor._gpu())
    assert {part: rows[part].state for part in ("CuPy", "GPU", "NVRTC")} == dict.fromkeys(
        ("CuPy", "GPU", "NVRTC"), "ok"
    )
