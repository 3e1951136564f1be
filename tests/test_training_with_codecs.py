"""Training with a codec: as settings, in the Trainer and from the command line."""

import re
import subprocess
import sys

import numpy as np
import pytest
import training

from distopt import checkpoint
from distopt.aggregators import AllReduce, Compressed
from distopt.communicators import LocalCommunicator, launcher
from distopt.errors import CommunicatorError
from distopt.exchange import make_aggregator
from distopt.testing import world
from distopt.trainer import Settings


def test_settings_choose_the_aggregator():
    with LocalCommunicator() as communicator:
        assert type(make_aggregator(Settings(8, 1), communicator)) is AllReduce
        made = make_aggregator(Settings(8, 1, codec="ef-topk:0.02", bucket_bytes=99), communicator)
        assert isinstance(made, Compressed)
        assert (made.codec.name, made.reduction, made.bucket_bytes) == ("ef-topk:0.02", "mean", 99)
        with pytest.raises(ValueError, match="codec 'zip': there is no such codec"):
            make_aggregator(Settings(8, 1, codec="zip"), communicator)


def _encode_everything(made):
    made.aggregator.min_elements = 0
    return made


@pytest.mark.parametrize("codec", ["ef-int8:16", "ef-topk:0.1", "int8:16:stochastic", "ef-powersgd:1"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_resumed_training_has_the_bits_of_an_undisturbed_one(codec, ranks, tmp_path):
    def run(communicator):
        whole = _encode_everything(training.trainer(communicator, steps=8, codec=codec, global_batch=17))
        expected = training.state(training.run(whole))
        options = {"codec": codec, "global_batch": 17, "output": tmp_path}
        training.run(_encode_everything(training.trainer(communicator, steps=4, **options)))
        communicator.barrier()
        second = _encode_everything(training.trainer(communicator, steps=8, **options))
        assert second.resume() == "resumed after step 4"
        found = training.state(training.run(second))
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
        return {name: value.tobytes() for name, value in found.items()}

    first, *others = world(ranks, run)
    assert all(other == first for other in others)


def test_a_training_goes_on_with_another_number_of_ranks(tmp_path):
    options = {"codec": "ef-topk:0.05", "output": tmp_path}
    world(3, lambda c: training.run(_encode_everything(training.trainer(c, steps=4, **options))) and None)
    arrays, _ = checkpoint.load(checkpoint.checkpoint_path(tmp_path, 4))
    residuals = {key: value for key, value in arrays.items() if key.startswith("aggregator:first:")}
    assert residuals
    assert all(value.shape[0] == 3 for value in residuals.values())

    def resumed(communicator):
        made = _encode_everything(training.trainer(communicator, steps=6, **options))
        made.resume()
        return made.aggregator.state() | training.run(made).aggregator.state()

    for state in world(2, resumed):
        assert all(state[key.removeprefix("aggregator:")].shape[0] == 2 for key in residuals)


def test_ranks_with_other_codecs_are_told_by_the_trainer():
    def run(communicator):
        training.trainer(communicator, codec="fp16" if communicator.rank else "bf16")

    with pytest.raises(CommunicatorError, match="codec: 'fp16' instead of 'bf16'"):
        world(2, run)


def _train(*arguments, ranks):
    if launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    program = [sys.executable, "-m", "distopt.cli", "train", "digits", *map(str, arguments)]
    return launcher.run(ranks, program, timeout_seconds=120)


def test_the_command_line_trains_and_resumes_with_a_codec(tmp_path):
    options = ["--codec", "ef-topk:0.05:fp16", "--output", tmp_path, "--global-batch", 50]
    done = _train(*options, "--steps", 60, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = re.search(
        r"test accuracy [\d.]+ % with averaged weights, ([\d.]+) % with raw ones", done.stdout
    )
    assert accuracy, done.stdout
    assert float(accuracy[1]) > 50  # of ten classes
    more = _train(*options, "--steps", 80, "--resume", ranks=3)
    assert more.returncode == 0, more.stdout + more.stderr
    assert "resumed after step 60" in more.stdout


def test_an_unknown_codec_is_an_error_in_plain_words():
    program = [sys.executable, "-m", "distopt.cli", "train", "digits", "--codec", "int7"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "codec 'int7': there is no such codec. There are fp16" in done.stderr
    assert "Traceback" not in done.stderr
