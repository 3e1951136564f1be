"""What a user does wrong, or asks for too early, is told once, in one line, on any number of ranks."""

import os
import signal
import subprocess
import sys

import pytest
import training
from launching import needs_mpirun

from distopt import checkpoint
from distopt.command_options import bucket_bytes_of, plain_errors
from distopt.communicators import launcher
from distopt.communicators.connect import announced_ranks
from distopt.communicators.shared_memory import _size
from distopt.errors import CheckpointError
from distopt.signals import SignalNotes
from distopt.testing import world

TRAIN = ["train", "digits", "--steps", "2", "--global-batch", "8"]


def distopt(*arguments, ranks, program=None):
    start = [sys.executable, *(["-m", "distopt.cli"] if program is None else ["-c", program])]
    command = [*start, *map(str, arguments)]
    if ranks > 1:
        return launcher.run(ranks, command, timeout_seconds=100)
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def ours(done):
    """Return the lines of stderr that distopt wrote, not the launcher."""
    return [line for line in done.stderr.splitlines() if "distopt" in line or "Traceback" in line]


@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codec", "zip"], "codec 'zip': there is no such codec"),
        (["--canonical", "9"], "canonical must be a number of shards from 1 to the global batch, 8"),
        (["--bucket-mib", "inf"], "--bucket-mib must be a size in MiB above 0, as in 4 or 0.5, got inf"),
        (["--data-dir", "x", "--progress", "dots"], "progress must be 'auto', 'bar' or 'lines', got 'dots'"),
        (["--output", "/proc/distopt/o"], "--output /proc/distopt/o: "),
    ],
)
def test_a_mistake_is_one_line_of_one_rank(arguments, message, ranks):
    done = distopt(*TRAIN, *arguments, ranks=ranks)
    assert done.returncode == 1
    (line,) = ours(done)
    assert line.startswith(f"distopt: error: {message}")
    assert "MPI_ABORT" not in done.stderr + done.stdout
    assert "step 2" not in done.stdout


@needs_mpirun
def test_too_few_canonical_shards_for_the_ranks_are_told_once():
    (line,) = ours(distopt(*TRAIN, "--canonical", 2, ranks=3))
    assert line.startswith("distopt: error: 2 canonical shards can't be shared by 3 ranks x 1 replicas")


@needs_mpirun
def test_a_timeout_that_is_no_number_is_told_by_rank_0_first(monkeypatch):
    monkeypatch.setenv("DISTOPT_TIMEOUT", "soon")
    done = distopt(*TRAIN, ranks=2)
    assert done.returncode == 1
    line, *more = ours(done)
    assert line.startswith("distopt: error: DISTOPT_TIMEOUT must be a number of seconds")
    assert set(more) <= {line}  # the launcher is mostly, not always, faster than the other rank
    assert "Traceback" not in done.stderr


@needs_mpirun
def test_what_one_rank_alone_raises_still_ends_the_job():
    program = (
        "import os, sys\n"
        "from distopt.communicators import connect\n"
        "from distopt.command_options import plain_errors, same_error_everywhere\n"
        "with plain_errors(), connect() as communicator:\n"
        "    with same_error_everywhere(communicator):\n"
        "        if communicator.rank == 1:\n"
        "            raise ValueError('only here')\n"
        "    communicator.barrier()\n"
    )
    done = distopt(ranks=3, program=program)
    assert done.returncode == 1
    assert "rank 1 of 3 on host" in done.stderr
    assert "ended the job: ValueError: only here" in done.stderr


@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_during_start_up_stops_before_the_first_step(tmp_path, ranks, name):
    # The signal comes when the last rank chooses its devices, long before the training loop.
    program = (
        "import os, signal, sys\n"
        "import distopt.backend as backend\n"
        "from distopt.cli import main\n"
        "choose = backend.choose_device\n"
        "def asked(*arguments):\n"
        f"    if os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', '0')) == '{ranks - 1}':\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "    return choose(*arguments)\n"
        "backend.choose_device = asked\n"
        "main(sys.argv[1:])\n"
    )
    done = distopt(*TRAIN, "--output", tmp_path, ranks=ranks, program=program)
    assert done.returncode == 3, done.stderr
    assert f"stopped before the first step because rank {ranks - 1} on " in done.stdout
    assert f" got {name}: " in done.stdout
    assert checkpoint.paths(tmp_path) == []


def test_one_that_listens_later_takes_over_what_was_noted():
    early, late = SignalNotes(), SignalNotes()
    with early.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        with late.listening():
            assert late.asked == signal.SIGUSR1
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    assert early.asked == signal.SIGUSR1


@pytest.mark.parametrize("size", [float("inf"), float("nan"), -1.0, 0.0, 1e308])
def test_a_bucket_of_no_size_names_the_option(size):
    with pytest.raises(ValueError, match=r"--bucket-mib must be a size in MiB above 0.* got "):
        bucket_bytes_of(size)
    assert bucket_bytes_of(0.5) == 524288
    assert bucket_bytes_of(None) is None


def test_an_error_before_ranks_know_each_other_exits_with_1(capsys, monkeypatch):
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)
    import typer

    with pytest.raises(typer.Exit) as caught, plain_errors():
        raise ValueError("no")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "distopt: error: no\n"


WAYS = [
    ({"codec": "int8"}, {}, "--codec int8, this run has no --codec"),
    ({}, {"codec": "fp16"}, "no --codec, this run has --codec fp16"),
    ({"adasum": True}, {}, "--adasum, this run has no --adasum"),
    ({}, {"delayed": True}, "no --delayed, this run has --delayed"),
    ({"local_steps": 2}, {"local_steps": 4}, "--local-steps 2, this run has --local-steps 4"),
]


@pytest.mark.parametrize(("wrote", "resumes", "words"), WAYS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_resuming_in_another_way_names_both(tmp_path, ranks, wrote, resumes, words):
    def run(communicator):
        training.run(training.trainer(communicator, output=tmp_path, **wrote))
        with pytest.raises(CheckpointError, match=f"was written with {words}: it would go on as another"):
            training.trainer(communicator, output=tmp_path, **resumes).resume()
        return training.trainer(communicator, output=tmp_path, **wrote).resume()

    assert world(ranks, run) == ["resumed after step 4"] * ranks


def test_a_checkpoint_that_does_not_tell_its_way_is_resumed(tmp_path):
    def run(communicator):
        training.run(training.trainer(communicator, output=tmp_path))
        (path,) = checkpoint.paths(tmp_path)
        arrays, manifest = checkpoint.load(path)
        for key in ("codec", "adasum", "delayed", "local_steps"):
            del manifest[key]
        checkpoint.save(path, arrays, manifest)
        return training.trainer(communicator, output=tmp_path, codec="fp16").resume()

    assert world(1, run) == ["resumed after step 4"]


@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_newest_checkpoint_is_warned_of_where_the_user_sees_it(tmp_path, ranks):
    assert distopt(*TRAIN, "--output", tmp_path, ranks=ranks).returncode == 0
    (tmp_path / "checkpoint-00000009.safetensors").write_bytes(b"cut off")
    done = distopt(*TRAIN, "--output", tmp_path, "--steps", 4, "--resume", ranks=ranks)
    assert done.returncode == 0, done.stderr
    warning = f"warning: {tmp_path / 'checkpoint-00000009.safetensors'} is truncated or altered"
    assert done.stdout.count(warning) == 1
    assert done.stdout.index(warning) < done.stdout.index("resumed after step 2")


@pytest.mark.parametrize(("size", "words"), [(4096, "4 KiB"), (1 << 20, "1.0 MiB"), (7_999_488, "7.6 MiB")])
def test_small_shared_memory_is_told_in_kib(size, words):
    assert _size(size) == words


@pytest.mark.skipif(announced_ranks() is not None, reason="makes an MPI of its own")
@needs_mpirun
@pytest.mark.parametrize(
    ("asked", "words"), [("shared", "alone, though shared was asked for: "), ("auto", "alone: ")]
)
def test_shared_memory_that_fails_though_asked_for_by_name_is_told_so(asked, words, monkeypatch):
    monkeypatch.setenv("DISTOPT_ALLREDUCE", asked)
    program = (
        "import errno, os\n"
        "import numpy as np\n"
        "def full(*arguments):\n"
        "    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "os.posix_fallocate = full\n"
        "from distopt import connect\n"
        "communicator = connect()\n"
        "found = communicator.all_reduce(np.ones(9, np.float32)).wait()\n"
        "assert (found == 2).all()\n"
    )
    done = distopt(ranks=2, program=program)
    assert done.returncode == 0, done.stderr
    assert f"reduces without shared memory, by MPI {words}/dev/shm has no room for " in done.stderr
    assert done.stderr.count("without shared memory") == 1
