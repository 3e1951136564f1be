"""The command line as a user starts it: in processes of their own, on the digits."""

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from distopt import checkpoint
from distopt.communicators import launcher


def _distopt(*arguments, ranks=None, timeout=120):
    program = [sys.executable, "-m", "distopt.cli", *map(str, arguments)]
    if ranks is not None:
        if launcher.find_launcher() is None:
            pytest.skip("no mpirun or mpiexec here")
        return launcher.run(ranks, program, timeout_seconds=timeout)
    return subprocess.run(program, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("ranks", [None, 2, 3])
def test_digits_train_evaluate_and_resume(tmp_path, ranks):
    options = ["digits", "--output", tmp_path, "--global-batch", 50, "--log-every", 20]
    done = _distopt("train", *options, "--steps", 40, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"step 40  loss \d\.\d+  lr [\d.e-]+  [\d,]+ examples/s  [\d.]+ ms/step", done.stdout)
    final = re.search(r"done: .* test accuracy ([\d.]+) % with averaged weights", done.stdout)
    assert final, done.stdout
    assert float(final[1]) > 50  # of ten classes, after 40 steps
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [20, 40, 40]
    assert records[-1]["test_accuracy"] == pytest.approx(float(final[1]) / 100, abs=1e-4)

    shown = _distopt("evaluate", tmp_path, ranks=ranks)
    assert shown.returncode == 0, shown.stderr
    assert f"accuracy {final[1]} % (360 examples, averaged weights)" in shown.stdout

    more = _distopt("train", *options, "--steps", 60, "--resume", ranks=ranks)
    assert more.returncode == 0, more.stdout + more.stderr
    assert "resumed after step 40" in more.stdout
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [20, 40, 40, 60, 60]


def test_twenty_and_twenty_steps_are_forty_bit_for_bit(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder, steps, extra in ((whole, 40, []), (halves, 20, []), (halves, 40, ["--resume"])):
        done = _distopt("train", "digits", "--output", folder, "--steps", steps, *extra, ranks=2)
        assert done.returncode == 0, done.stderr
    first, _ = checkpoint.load(checkpoint.checkpoint_path(whole, 40))
    second, _ = checkpoint.load(checkpoint.checkpoint_path(halves, 40))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "imagenet"], "unknown task 'imagenet'; there are cifar10, digits"),
        (
            ["train", "digits", "--learning-rate", "-1"],
            "learning_rate must be finite and not negative, got -1",
        ),
        (["train", "digits", "--global-batch", "2", "--replicas-per-rank", "2"], "can't be cut for"),
        (["train", "digits", "--replicas-per-rank", "0"], "--replicas-per-rank must be at least 1"),
        (["train", "digits", "--device", "tpu"], "device must be 'cpu', 'cuda'"),
        (["train", "digits", "--resume"], "--resume needs --output"),
        (["evaluate", "nowhere.safetensors"], "there is no checkpoint"),
    ],
)
def test_bad_arguments_end_every_rank_with_a_clear_error(arguments, message):
    began = time.monotonic()
    done = _distopt(*arguments, ranks=2, timeout=60)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
    assert time.monotonic() - began < 30


def test_a_rank_that_raises_ends_the_job_with_its_rank_and_host_last(tmp_path):
    program = (
        "import sys, distopt.trainer as t\n"
        "from distopt import connect\n"
        "from distopt.cli import main\n"
        "step = t.Trainer.train_step\n"
        "def failing(self, batches):\n"
        "    if self.communicator.rank == 1 and self.step == 3:\n"
        "        raise RuntimeError('broken on purpose')\n"
        "    return step(self, batches)\n"
        "t.Trainer.train_step = failing\n"
        "main(['train', 'digits', '--steps', '50'])\n"
    )
    path = tmp_path / "failing.py"
    path.write_text(program)
    if launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    began = time.monotonic()
    done = launcher.run(3, [sys.executable, str(path)], timeout_seconds=60)
    assert done.returncode != 0
    assert time.monotonic() - began < 30
    assert "RuntimeError: broken on purpose" in done.stderr
    assert re.search(r"rank 1 of 3 on host \S+ ended the job: RuntimeError: broken on purpose", done.stderr)


def test_help_names_every_option():
    shown = _distopt("train", "--help").stdout
    for option in (
        "--data-dir",
        "--global-batch",
        "--steps",
        "--seed",
        "--output",
        "--replicas-per-rank",
        "--resume",
    ):
        assert option in shown


def test_importing_distopt_needs_neither_mpi_nor_cupy_nor_numba():
    code = (
        "import sys\n"
        "for name in ('mpi4py', 'cupy', 'numba', 'typer', 'rich', 'torch', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import distopt\n"
        "x, y = distopt.Variable(5.0), distopt.Variable(3.0)\n"
        "distopt.SGD(0.1).minimize(lambda: x**2 + x * y + 3, [x, y])\n"
        "print(x.numpy().round(4), y.numpy().round(4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3.7", "2.5"], done.stderr


def test_a_signal_stops_all_ranks_with_a_checkpoint_and_exit_code_3(tmp_path):
    program = (
        "import os, pathlib, signal, sys, threading, time\n"
        "from distopt.cli import main\n"
        f"metrics = pathlib.Path({str(tmp_path / 'o' / 'metrics.jsonl')!r})\n"
        "def ask():\n"
        "    while not (metrics.exists() and metrics.stat().st_size):\n"  # until training goes on
        "        time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    threading.Thread(target=ask, daemon=True).start()\n"
        f"main(['train', 'digits', '--steps', '1000000', '--output', {str(tmp_path / 'o')!r}])\n"
    )
    path = tmp_path / "stopped.py"
    path.write_text(program)
    found = launcher.find_launcher()
    if found is None or found.vendor != "openmpi":
        pytest.skip("no mpirun of Open MPI here")
    done = launcher.run(2, [sys.executable, str(path)], timeout_seconds=100)
    assert done.returncode == 3, done.stderr
    step = int(re.search(r"stopped after step (\d+) because a rank was asked to", done.stdout)[1])
    assert checkpoint.paths(tmp_path / "o")[-1] == checkpoint.checkpoint_path(tmp_path / "o", step)
