"""`distopt digest` and the options of canonical mode, as a user starts them."""

import re
import subprocess
import sys

import pytest

from distopt.communicators import launcher


def _distopt(*arguments, ranks=None):
    program = [sys.executable, "-m", "distopt.cli", *map(str, arguments)]
    if ranks is not None:
        if launcher.find_launcher() is None:
            pytest.skip("no mpirun or mpiexec here")
        return launcher.run(ranks, program, timeout_seconds=120)
    return subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)


def _train(folder, *options, ranks=None):
    fixed = ["digits", "--output", folder, "--global-batch", 24, "--steps", 6]
    done = _distopt("train", *fixed, *options, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _digest(path):
    done = _distopt("digest", path)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"^digest after step (\d+): ([0-9a-f]{64})$", done.stdout, re.MULTILINE)
    return found


@pytest.mark.timeout(300)
def test_train_prints_a_digest_that_is_the_checkpoints_and_that_of_other_ranks(tmp_path):
    printed = set()
    for name, ranks, replicas in (("alone", None, 1), ("three", 3, 1), ("two", 2, 2)):
        options = ["--canonical", 6, "--replicas-per-rank", replicas]
        lines = _train(tmp_path / name, *options, ranks=ranks).splitlines()
        assert any(", 1 thread(s) (" in line for line in lines)  # unless the user asks for others
        printed.add(lines[-1])
        step, digest = _digest(tmp_path / name)
        assert lines[-1] == f"digest after step {step}: {digest}"
        assert step == "6"
    assert len(printed) == 1
    (checkpoint,) = (tmp_path / "three").glob("checkpoint-*.safetensors")
    assert f"digest after step 6: {_digest(checkpoint)[1]}" in printed


@pytest.mark.timeout(300)
def test_plain_training_prints_none_and_has_another_digest_on_other_ranks(tmp_path):
    found = set()
    for ranks in (1, 3):
        assert "digest" not in _train(tmp_path / str(ranks), ranks=ranks)
        found.add(_digest(tmp_path / str(ranks)))
    assert len(found) == 2


def test_micro_batches_are_an_option_and_nonsense_is_told(tmp_path):
    assert "done: " in _train(tmp_path / "run", "--micro-batches", 3)
    for arguments, message in (
        (["train", "digits", "--canonical", 3, "--micro-batches", 2], "micro_batches=2 has no place beside"),
        (["train", "digits", "--canonical", 65], "from 1 to the global batch, 64"),
        (["digest", tmp_path / "nothing"], "there is no checkpoint"),
        (["digest", tmp_path], "there is no checkpoint in"),
    ):
        done = _distopt(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
