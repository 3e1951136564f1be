"""The arithmetic of scaling on numbers made by hand, and the command as a user starts it."""

import importlib.util
import json
import subprocess
import sys

import pytest

from distopt.bench import scaling, scaling_plot
from distopt.bench.worker import Job, Record
from distopt.communicators import launcher
from distopt.errors import BackendError

needs_mpirun = pytest.mark.skipif(launcher.find_launcher() is None, reason="no mpirun or mpiexec here")
TINY = ("--batch-per-rank", "4", "--global-batch", "6", "--steps", "2", "--warmup", "1", "--rounds", "1")


def _run(turn, program, ranks, step_seconds, exposed_ms=None, batch=100):
    return {
        "round": turn,
        "mode": "weak",
        "program": program,
        "ranks": ranks,
        "global_batch": batch * ranks,
        "examples_per_second": batch * ranks * len(step_seconds) / sum(step_seconds),
        "exposed_ms": exposed_ms,
        "peak_bytes": 1000 * ranks,
        "step_seconds": step_seconds,
    }


def _bench_scaling(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "distopt.cli", "bench", "scaling", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_efficiency_is_relative_to_the_fewest_ranks():
    assert scaling.efficiency(180.0, 2, 100.0) == pytest.approx(0.9)
    assert scaling.efficiency(300.0, 4, 200.0, 2) == pytest.approx(0.75)


def test_ratios_are_taken_within_a_round_and_then_the_median():
    # In round 1 the machine is half as fast for all: ratios stay, and no rate is compared across rounds.
    runs = []
    for turn, slower in ((0, 1), (1, 2), (2, 1)):
        runs += [
            _run(turn, "distopt", 1, [0.1 * slower] * 4, exposed_ms=1.0),
            _run(turn, "distopt", 2, [0.125 * slower] * 4, exposed_ms=12.5 * slower),
            _run(turn, "torch", 1, [0.3 * slower] * 4),
            _run(turn, "torch", 2, [0.5 * slower] * 4),
        ]
    one, two, torch_one, torch_two = scaling.summarize_runs(runs, "weak")
    assert [(r["program"], r["ranks"]) for r in (one, two, torch_one, torch_two)] == [
        ("distopt", 1),
        ("distopt", 2),
        ("torch", 1),
        ("torch", 2),
    ]
    assert one["examples_per_second"]["median"] == pytest.approx(1000)
    assert two["examples_per_second"]["least"] == pytest.approx(800)
    assert two["efficiency"]["least"] == two["efficiency"]["most"] == pytest.approx(0.8)
    assert torch_two["efficiency"]["median"] == pytest.approx(0.6)
    assert one["over_torch"]["median"] == pytest.approx(3.0)
    assert two["over_torch"]["most"] == pytest.approx(4.0)
    assert torch_one["over_torch"] is None
    assert two["exposed_share"] == pytest.approx(0.1)
    assert two["exposed_ms"] == pytest.approx(12.5)
    assert torch_one["exposed_share"] is None
    assert two["peak_bytes"] == 2000


def test_step_times_are_pooled_over_rounds():
    runs = [_run(0, "distopt", 1, [0.010, 0.020, 0.030]), _run(1, "distopt", 1, [0.040, 0.050])]
    row = scaling.summarize_runs(runs, "weak")[0]
    assert row["step_ms"]["least"] == pytest.approx(10)
    assert row["step_ms"]["median"] == pytest.approx(30)
    assert row["step_ms"]["p90"] == pytest.approx(46)  # 0.9 of the way along 10, 20, 30, 40, 50
    assert scaling.summarize_runs(runs, "strong") == []


def test_a_step_lasts_as_long_as_on_the_slowest_rank():
    def record(rank, seconds, exposed):
        return Record(rank, "host", "cpu:0", seconds, {"exposed communication": exposed}, 1, 2 + rank)

    job = Job("distopt", global_batch=12, steps=2)
    found = scaling.describe_run(job, [record(0, [1.0, 2.0], 0.5), record(1, [1.5, 1.0], 0.1)])
    assert found["step_seconds"] == [1.5, 2.0]
    assert found["examples_per_second"] == pytest.approx(24 / 3.0)
    assert found["exposed_ms"] == pytest.approx(150)
    assert found["peak_bytes"] == 3


def test_the_ceiling_is_as_if_waiting_for_each_other_cost_nothing():
    records = [Record(rank, "host", "cpu:0", s, {"x": 1.0}, 1, 2) for rank, s in ((0, [1, 2]), (1, [3, 1]))]
    found = scaling.describe_run(Job("independent", global_batch=10, steps=2), records)
    assert found["examples_per_second"] == pytest.approx(20 / 5)  # 3 + 2 seconds


def test_ours_is_compared_with_the_ceiling():
    runs = [_run(0, "distopt", 2, [0.2], exposed_ms=1.0), _run(0, "independent", 2, [0.19])]
    ours, ceiling = scaling.summarize_runs(runs, "weak")
    assert ours["over_independent"]["median"] == pytest.approx(0.95)
    assert ceiling["over_independent"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (1, 0)}, "ranks must be different numbers from 1 on"),
        ({"ranks": (2, 2)}, "ranks must be different numbers"),
        ({"modes": ("wide",)}, "modes must be among"),
        ({"ranks": (8,), "global_batch": 4}, "can't be cut for 8 ranks"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_options_that_can_not_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scaling.Options(**options)


def test_a_missing_plot_library_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(scaling, "run", lambda options: pytest.fail("measured"))
    with pytest.raises(BackendError, match=r"distopt\[plot\]"):
        scaling.main(scaling.Options(), plot_path="x.png")


@needs_mpirun
def test_the_command_measures_every_number_of_ranks_and_draws_them(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    files = ("--json", tmp_path / "scaling.json", "--plot", tmp_path / "scaling.png")
    done = _bench_scaling("--ranks", "1,3", *TINY, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "scaling.json").read_text())
    assert [(r["mode"], r["ranks"], r["global_batch"]) for r in result["results"]] == [
        ("weak", 1, 4),
        ("weak", 3, 12),
        ("strong", 1, 6),
        ("strong", 3, 6),
    ]
    assert len(result["runs"]) == 4
    assert all(len(run["step_seconds"]) == 2 and min(run["step_seconds"]) > 0 for run in result["runs"])
    assert result["environment"]["versions"]["numpy"]
    oversubscribed = launcher.usable_cores() < 3
    assert (result["oversubscribed"] == [3]) is oversubscribed
    assert ("thread(s) share" in done.stdout) is oversubscribed
    assert "weak, distopt" in done.stdout
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@needs_mpirun
def test_pytorch_and_the_ceiling_are_measured_beside_ours(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    path = tmp_path / "scaling.json"
    done = _bench_scaling("--ranks", "2", "--mode", "strong", *TINY, "--ceiling", "--peer", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, ceiling, theirs = json.loads(path.read_text())["results"]
    assert [r["program"] for r in (ours, ceiling, theirs)] == ["distopt", "independent", "torch"]
    assert ours["over_independent"]["count"] == 1
    assert ours["over_torch"]["count"] == 1
    assert theirs["exposed_ms"] is None


def test_every_second_round_goes_back(monkeypatch):
    record = Record(0, "host", "cpu:0", [0.5], {"exposed communication": 0.1}, 1, 2)
    monkeypatch.setattr(scaling, "run_ranks", lambda job, ranks: [record] * ranks)
    options = scaling.Options(ranks=(1, 2), modes=("weak",), steps=1, rounds=2, device="cpu")
    assert [(one["round"], one["ranks"]) for one in scaling.run(options)["runs"]] == [
        (0, 1),
        (0, 2),
        (1, 2),
        (1, 1),
    ]


def test_without_pytorch_the_command_says_so(monkeypatch):
    monkeypatch.setattr(scaling.peer, "why_missing", lambda device: "PyTorch is not installed")
    record = Record(0, "host", "cpu:0", [0.5], {"exposed communication": 0.1}, 1, 2)
    monkeypatch.setattr(scaling, "run_ranks", lambda job, ranks: [record] * ranks)
    result = scaling.run(scaling.Options(ranks=(1,), steps=1, peer=True, device="cpu"))
    assert result["left_out"] == {"torch": "PyTorch is not installed"}
    assert {row["program"] for row in result["results"]} == {"distopt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", "1,two"), "--ranks must be numbers"),
        (("--ranks", "1", "--mode", "wide"), "modes must be among"),
        (("--ranks", "1", "--device", "tpu"), "device must be 'cpu', 'cuda'"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message):
    done = _bench_scaling(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plot_has_a_row_of_two_pictures_for_each_mode(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    runs = [_run(0, "distopt", ranks, [0.1, 0.1], exposed_ms=1.0) for ranks in (1, 2)]
    result = {
        "results": scaling.summarize_runs(runs, "weak"),
        "threads": 1,
        "oversubscribed": [2],
        "environment": {"processor": "any", "cores_usable": 1, "time": "2000-01-01T00:00:00"},
    }
    scaling_plot.write(result, str(tmp_path / "new" / "one.png"))
    both = [*result["results"], *({**row, "mode": "strong"} for row in result["results"])]
    scaling_plot.write({**result, "results": both}, str(tmp_path / "two.png"))
    heights = [int.from_bytes((tmp_path / name).read_bytes()[20:24]) for name in ("new/one.png", "two.png")]
    assert heights[1] == 2 * heights[0]
