import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from launching import ROOT, needs_mpirun, run_python

from distopt.bench import allreduce, allreduce_ranks, resnet50
from distopt.communicators import launcher
from distopt.errors import LaunchError


def _bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "distopt", "bench", "allreduce", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=launcher.environment(1) | {"PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4..1K", [4, 16, 64, 256, 1024]),
        ("4..100", [4, 16, 64]),
        ("12,3k,2M", [12, 3072, 2 * 2**20]),
        ("1M..256M", [2**20, 2**22, 2**24, 2**26, 2**28]),
    ],
)
def test_sizes_are_read(text, sizes):
    assert allreduce.parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "4..x", "1.5M", "0", "4T", "-4"])
def test_sizes_that_can_not_be_read_are_refused(text):
    with pytest.raises(ValueError, match="a size must be a number of bytes"):
        allreduce.parse_sizes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": (6,)}, r"multiples of 4 bytes, got \[6\]"),
        ({"sizes": (4,), "ranks": 0}, "at least 1, got 0 and"),
        ({"sizes": (4,), "model": "vgg"}, "must be one of resnet50, got 'vgg'"),
        ({}, "nothing to measure"),
    ],
)
def test_options_that_can_not_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        allreduce.Options(**options)


def test_resnet50_has_the_tensors_that_it_is_known_for():
    """Counts of torchvision's resnet50: 161 parameters, 25,557,032 numbers, 53 of them filters."""
    shapes = resnet50.shapes()
    assert len(shapes) == 161
    assert sum(int(np.prod(shape)) for shape in shapes) == 25_557_032
    assert sum(len(shape) == 4 for shape in shapes) == 53
    assert shapes[0] == (7, 7, 3, 64)
    assert shapes[-2:] == [(2048, 1000), (1000,)]
    assert sum(int(np.prod(shape)) <= 4096 for shape in shapes) == 108


def test_bandwidths_are_those_of_nccl_tests():
    """1 MB in 100 us is 10 GB/s; of 4 ranks, each must send 1.5 times the size."""
    found = {
        "mpi": {"seconds": [2e-4, 2e-4, 4e-4], "wrong": 0},
        "allocated": {"seconds": [1e-4, 1e-4, 1e-4], "wrong": 3},
    }
    raw, ours = allreduce.summarize_rows(1_000_000, found, ranks=4)
    assert ours["algorithm_gbps"] == pytest.approx(10)
    assert ours["bus_gbps"] == pytest.approx(15)
    assert ours["over_mpi"]["median"] == pytest.approx(2)
    assert ours["over_mpi"]["most"] == pytest.approx(4)
    assert ours["wrong"] == 3
    assert raw["over_mpi"] is None
    assert raw["count"] == 250_000
    assert [allreduce.bus_factor(ranks) for ranks in (1, 2, 4)] == [0, 1, 1.5]


def test_the_check_knows_the_sum():
    parts = [allreduce_ranks.pattern(rank, 50) for rank in range(3)]
    assert len({part.tobytes() for part in parts}) == 3
    assert (sum(parts) == allreduce_ranks.expected_sum(3, 50)).all()


def test_a_wrong_sum_ends_the_benchmark_with_its_name(monkeypatch, capsys):
    found = {"mpi": {"seconds": [1e-3], "wrong": 0}, "plain": {"seconds": [1e-3], "wrong": 2}}
    measured = {
        "ranks": 2,
        "most_on_a_host": launcher.usable_cores() + 1,
        "communicator": "any",
        "choices": {},
        "sizes": [{"size": 8, "competitors": found}],
        "model": None,
    }
    monkeypatch.setattr(allreduce, "announced_ranks", lambda: None)
    monkeypatch.setattr(allreduce, "_start", lambda *arguments: measured)
    with pytest.raises(LaunchError, match="wrong sums by plain at 8 bytes"):
        allreduce.main(allreduce.Options(sizes=(8,)))
    shown = capsys.readouterr().out
    assert "busbw GB/s" in shown
    assert "warning: 2 ranks share" in shown


@needs_mpirun
def test_the_command_measures_all_sizes_and_the_model(tmp_path):
    path = tmp_path / "allreduce.json"
    files = ("--json", path, "--model", "resnet50")
    done = _bench("--ranks", 2, "--sizes", "4,64K", "--repeats", 2, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(path.read_text())
    assert [(row["size"], row["competitor"]) for row in result["results"]] == [
        (size, name) for size in (4, 65536) for name in ("mpi", "allocated", "plain")
    ]
    assert all(row["wrong"] == 0 and row["microseconds"]["least"] > 0 for row in result["results"])
    assert result["model"]["size"] == 4 * 25_557_032
    assert {row["competitor"]: row["wrong"] for row in result["model"]["results"]} == {
        "mpi": 0,
        "arena": 0,
        "mpi, one by one": 0,
        "mpi, one buffer": 0,
    }
    assert result["oversubscribed"] is (launcher.usable_cores() < 2)
    assert "gloo is left out: not asked for" in done.stdout


@needs_mpirun
def test_gloo_takes_part_on_ranks_that_mpirun_started():
    if find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")
    arguments = ["-m", "distopt", "bench", "allreduce", "--sizes", "1K", "--repeats", "2", "--peer"]
    done = run_python(2, arguments, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\ngloo ") == 1  # one rank speaks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "4..x"), "a size must be a number of bytes"),
        (("--model", "vgg"), "model must be one of resnet50"),
        (("--sizes", "none"), "nothing to measure"),
    ],
)
def test_bad_arguments_give_one_line(arguments, message):
    done = _bench(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_mpirun
def test_one_rank_is_refused():
    done = _bench("--ranks", 1, "--sizes", "4")
    assert done.returncode == 1
    assert "start at least 2" in done.stderr
