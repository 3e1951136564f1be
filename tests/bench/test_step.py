"""The arithmetic of `bench step` on numbers made by hand, and the command as a user starts it."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from distopt.backend import Device
from distopt.bench import peer, step, workload
from distopt.communicators import LocalCommunicator

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: pip install 'distopt[bench]'"
)
TINY = ("--batch", "4", "--rounds", "2", "--steps", "1", "--device", "cpu")


def _bench_step(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "distopt.cli", "bench", "step", *TINY, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**launcher_environment(), **environment},
    )


def launcher_environment():
    from distopt.communicators import launcher

    found = launcher.environment(1, threads=1)
    found.pop("OPENBLAS_CORETYPE", None)
    return found


def test_ratios_are_of_speeds_in_the_same_round():
    seconds = {"distopt": [1.0, 2.0, 1.0], "a": [2.0, 4.0, 3.0], "b": [3.0, 2.0, 1.5]}
    found = step.speed_ratios(seconds)
    assert found["a"]["median"] == pytest.approx(2.0)
    assert found["b"]["median"] == pytest.approx(1.5)
    assert (found["best"]["least"], found["best"]["most"]) == pytest.approx((1.0, 2.0))  # 2, 1, 1.5
    assert "distopt" not in found


def test_alone_there_is_no_ratio():
    assert step.speed_ratios({"distopt": [1.0]}) == {}


def test_options_that_can_not_work_are_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        step.Options(rounds=0)


def test_the_command_gives_phases_and_memory_without_pytorch(tmp_path):
    path = tmp_path / "step.json"
    settings = {"OPENBLAS_CORETYPE": "Prescott", "DISTOPT_NUMBA": "0"}
    done = _bench_step("--no-peer", "--json", path, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("warning: OPENBLAS_CORETYPE=Prescott")
    result = json.loads(path.read_text())
    assert result["left_out"] == {"torch": "not asked for"}
    for network in ("with LRN", "without LRN"):
        assert [len(times) for times in result["seconds"][network].values()] == [2]
        found = result["processes"][f"distopt, {network}"]
        phases = found["phases_ms"]
        assert set(phases) == {"input", "forward", "backward", "exposed communication", "apply"}
        # All of a step is in some phase.
        assert sum(phases.values()) == pytest.approx(found["mean_step_ms"], rel=0.2)
        assert found["peak_bytes"] > found["start_bytes"] > 2**20
    assert "exposed communication" in done.stdout
    assert result["blas_kernels"]
    assert result["compiled_loops"] is False
    assert "plain NumPy" in done.stdout


@needs_torch
def test_pytorch_computes_the_same_losses_and_is_measured_in_both_layouts(tmp_path):
    path = tmp_path / "step.json"
    done = _bench_step("--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert max(result["largest_loss_difference"].values()) < 1e-4
    assert set(result["ratio"]["with LRN"]) == {"torch nchw", "torch channels_last", "best"}
    assert "warning" not in done.stdout
    assert set(result["processes"]) == {
        f"{program}, {network}" for program in ("distopt", "torch") for network in ("with LRN", "without LRN")
    }


@needs_torch
@pytest.mark.parametrize("normalize", [True, False])
def test_a_pytorch_step_moves_the_weights_as_ours_does(normalize):
    batch = workload.prepared_batch(6)
    trainer = workload.make_trainer(LocalCommunicator(), Device(), 6, 0, normalize)
    weights = {v.name: v.numpy().copy() for v in trainer.replicas[0].variables}
    theirs = peer.make_step(batch, Device(), layout="nchw", normalize=normalize, weights=weights)

    class Same:
        def get(self, number):
            return [batch]

    for _ in range(3):
        ours = trainer.train_step(Same()).loss
        assert float(theirs()) == pytest.approx(ours, rel=1e-5)


@needs_torch
def test_a_peer_that_computes_something_else_is_not_compared(monkeypatch):
    monkeypatch.setattr(peer, "WEIGHT_DECAY", 4.0)
    with pytest.raises(RuntimeError, match="their speeds can't be compared"):
        step._competitors(workload.prepared_batch(4), Device(), True, True)


def test_a_prepared_batch_is_what_the_tutorial_feeds_its_network():
    batch = workload.prepared_batch(5)
    assert batch.images.shape == (5, 24, 24, 3)
    np.testing.assert_allclose(batch.images.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(batch.images.std(axis=(1, 2, 3)), 1, atol=1e-4)
