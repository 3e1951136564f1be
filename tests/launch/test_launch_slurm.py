"""launch/slurm.sbatch: by a stand-in for Slurm's commands, and on a real one where there is one."""

import os
import shutil
import subprocess
import sys

import pytest

SCONTROL = "#!/bin/sh\nexit 1\n"

# srun as it is with an MPI that it can't start: every task finds itself alone in its world.
SRUN = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
ranks = int(arguments[arguments.index("--ntasks") + 1])
kind = next((a for a in arguments if a.startswith("--mpi=")), "--mpi=none")
program = arguments[next(i for i, a in enumerate(arguments) if a[0] == "/"):]
world = ranks if kind == os.environ["WORKING"] else 1
host = ranks if os.environ.get("HOST", "shared") == "shared" else 1
if "-c" in program:
    for _ in range(ranks):
        print("world", world, "host", min(world, host))
else:
    print("srun", *arguments[:arguments.index(program[0])], flush=True)
    sys.exit(subprocess.run(program).returncode)
"""

# The python of the environment: answers which MPI it has without having one.
PYTHON = "#!/bin/sh\necho '{vendor}'\n"


@pytest.fixture
def batch(scripts, program, tmp_path):
    """Runs slurm.sbatch as Slurm would: batch(vendor, working kind, arguments...)."""

    def run(vendor, working, *arguments, **environment):
        folder = tmp_path / "env" / "bin"
        program(folder / "distopt", '#!/bin/sh\necho "distopt $*"\nexit "${CODE:-0}"\n')
        program(folder / "python3", PYTHON.format(vendor=vendor))
        program(tmp_path / "slurm" / "scontrol", SCONTROL)
        program(tmp_path / "slurm" / "srun", SRUN.format(python=sys.executable))
        spool = tmp_path / "spool" / "slurm_script"  # Slurm runs a copy from its own folder
        spool.parent.mkdir(exist_ok=True)
        shutil.copy(scripts.clone / "launch" / "slurm.sbatch", spool)
        return subprocess.run(
            ["bash", spool, *arguments],
            env=scripts.environment
            | {
                "PATH": f"{tmp_path / 'slurm'}:/usr/bin:/bin",
                "SLURM_JOB_ID": "12",
                "SLURM_JOB_NUM_NODES": "1",
                "SLURM_JOB_NODELIST": "n1",
                "SLURM_NTASKS": "4",
                "SLURM_NTASKS_PER_NODE": "4",
                "SLURM_TASKS_PER_NODE": "4",
                "SLURM_CPUS_PER_TASK": "3",
                "SLURM_SUBMIT_DIR": str(scripts.clone),
                "DISTOPT_VENV": str(tmp_path / "env"),
                "DISTOPT_MPIRUN": "/nowhere/mpirun",
                "WORKING": working,
            }
            | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(("vendor", "kind"), [("Open MPI", "pmix"), ("MPICH", "pmi2")])
def test_srun_is_used_with_the_plugin_that_the_mpi_needs(batch, vendor, kind):
    done = batch(vendor, f"--mpi={kind}", "train", "cifar10", "--output", "a b")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"4 ranks on n1 (4 per node, 3 threads each), started by srun-{kind}")
    assert lines[1] == f"srun --ntasks 4 --cpus-per-task 3 --kill-on-bad-exit=1 --mpi={kind}"
    assert lines[2] == "distopt train cifar10 --output a b"


def test_the_exit_code_of_the_training_is_that_of_the_job(batch):
    assert batch("MPICH", "--mpi=pmi2", "train", CODE="9").returncode == 9


def test_worlds_of_one_rank_are_refused_with_what_was_tried(batch):
    done = batch("MPICH", "--mpi=none", "train")
    assert done.returncode == 2
    assert "no way to start gives one MPI world of 4 ranks with MPICH" in done.stderr
    assert "srun-pmi2: world 1 host 1" in done.stderr
    assert "distopt train" not in done.stdout


def test_mpirun_is_used_where_no_srun_works(batch, program, tmp_path):
    stub = program(
        tmp_path / "mpi" / "mpirun",
        "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'mpirun (Open MPI) 5.0'; exit; }\n"
        'case "$*" in *" -c "*) for i in 1 2 3 4; do echo world 4 host 4; done ;;\n'
        '*) echo "mpirun $*" ;; esac\n',
    )
    done = batch("Open MPI", "--mpi=none", "train", DISTOPT_MPIRUN=str(stub), DISTOPT_TIMEOUT="60")
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith("mpirun -n 4 --bind-to none")
    assert "-x DISTOPT_TIMEOUT" in command
    assert "-x OMP_NUM_THREADS" in command
    assert command.endswith("/distopt train")


def test_ranks_that_do_not_see_their_host_are_taken_only_with_a_warning(batch):
    done = batch("MPICH", "--mpi=pmi2", "train", HOST="apart")
    assert done.returncode == 0
    assert "started by srun-pmi2" in done.stdout
    assert "may take the same GPU" in done.stderr.replace("\n", " ").replace("slurm.sbatch: ", "")


def test_ranks_that_differ_from_gpus_are_told(batch):
    done = batch("MPICH", "--mpi=pmi2", "train", SLURM_GPUS_ON_NODE="8")
    assert "8 GPUs but 4 ranks per node" in done.stderr
    equal = batch("MPICH", "--mpi=pmi2", "train", SLURM_GPUS_ON_NODE="4")
    assert "GPUs" not in equal.stderr


def test_a_launcher_that_is_named_is_taken_without_a_trial(batch):
    done = batch("", "--mpi=none", "--dry-run", "train", DISTOPT_LAUNCHER="srun-pmix")
    assert done.returncode == 0, done.stderr
    assert "--mpi=pmix" in done.stdout
    assert "distopt train" in done.stdout.splitlines()[-1]
    assert "distopt train" not in done.stdout.splitlines()
    wrong = batch("", "--mpi=none", "train", DISTOPT_LAUNCHER="prun")
    assert wrong.returncode == 2
    assert "got 'prun'" in wrong.stderr


def test_outside_of_a_job_it_says_how_to_submit(scripts):
    done = scripts.run("launch/slurm.sbatch", "train", "cifar10")
    assert done.returncode == 2
    assert "sbatch launch/slurm.sbatch train cifar10" in done.stderr


def why_no_slurm():
    if shutil.which("sbatch") is None:
        return "there is no sbatch here"
    try:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return "slurmctld does not answer"
    return "" if " UP" in ping.stdout else "no slurmctld is running (is SLURM_CONF set?)"


@pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())
@pytest.mark.parametrize(("kind", "code"), [("sum", 0), ("abort", 5)])
def test_a_real_job_of_two_ranks(scripts, program, tmp_path, real_mpi, kind, code):
    # The environment of this Python stands for one that has distopt.
    rank = program(
        tmp_path / "bin" / "distopt",
        f"#!{sys.executable}\nimport sys\nfrom mpi4py import MPI\n"
        "comm = MPI.COMM_WORLD\n"
        "total = comm.allreduce(comm.rank + 1)\n"
        "print('rank', comm.rank, 'of', comm.size, 'sum', total, flush=True)\n"
        "if sys.argv[1] == 'abort': comm.Abort(5)\n",
    )
    program(tmp_path / "bin" / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    log = tmp_path / "log"
    done = subprocess.run(
        ["sbatch", "--wait", f"--output={log}", scripts.clone / "launch" / "slurm.sbatch", kind],
        env=os.environ | real_mpi | {"DISTOPT_VENV": str(rank.parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
    )
    printed = log.read_text()
    lines = sorted(line for line in printed.splitlines() if line.startswith("rank "))
    assert lines == ["rank 0 of 2 sum 3", "rank 1 of 2 sum 3"], printed
    # An MPI library may end the rank by a signal after Abort; the job must fail either way.
    assert done.returncode == code or (code and done.returncode > 128), printed
