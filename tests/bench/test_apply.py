"""The benchmark of the optimizer step, and what all benchmarks share."""

import importlib.util
import itertools
import json

import pytest

from distopt.bench import apply
from distopt.bench.report import environment, interleave, ratios, summarize, write_json


def test_competitors_take_turns_and_warm_up_uncounted():
    calls = []
    ticks = itertools.count()
    seconds = interleave(
        {
            "a": lambda: calls.append("a"),
            "b": lambda: calls.append("b"),
            "c": lambda: calls.append("c"),
        },
        repeats=3,
        warmup=1,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


def test_no_rounds_or_competitors_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        interleave({"a": print}, 0)
    with pytest.raises(ValueError, match="got 0"):
        interleave({}, 3)


def test_a_summary_holds_median_quartiles_and_extremes():
    expected = {"median": 3.0, "low": 2.0, "high": 4.0, "least": 1.0, "most": 9.0, "count": 5}
    assert summarize([9.0, 1.0, 2.0, 4.0, 3.0]) == expected
    assert summarize([2.0])["low"] == summarize([2.0])["high"] == 2.0


def test_ratios_are_taken_round_by_round():
    # A load that slows one round for both leaves the ratio alone.
    result = ratios({"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 2.0]}, "theirs")
    assert result["ours"]["median"] == result["ours"]["most"] == 0.5
    assert result["theirs"]["median"] == 1.0


def test_the_environment_names_machine_versions_and_command(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment()
    assert found["processor"]
    assert found["cores_usable"] >= 1
    assert found["versions"]["numpy"]
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    write_json(found, str(tmp_path / "new" / "result.json"))
    assert json.loads((tmp_path / "new" / "result.json").read_text()) == found


def test_the_benchmark_checks_that_all_competitors_end_at_the_same_weights(tmp_path, capsys):
    apply.main(40_000, 2, "float32", str(tmp_path / "apply.json"))
    result = json.loads((tmp_path / "apply.json").read_text())
    assert result["size"] == 40_000
    assert max(result["largest_difference"].values()) < 1e-6  # three steps of 1e-3 each
    assert result["seconds"]["numpy"]["count"] == 2
    printed = capsys.readouterr().out
    for name in ("numba", "torch"):
        there = importlib.util.find_spec(name) is not None
        assert (name in result["left_out"]) == (not there)
        assert f"{name} left out" not in printed if there else "left out: not installed" in printed


def test_a_missing_torch_is_reported_not_raised(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        apply.importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    apply.main(1000, 1, "float32", None)
    printed = capsys.readouterr().out
    assert "torch          left out: not installed; pip install 'distopt[bench]'" in printed
    assert "x torch_fused" not in printed


def test_a_wrong_size_or_dtype_is_refused():
    with pytest.raises(ValueError, match="got 0, 'float32'"):
        apply.run(size=0)
    with pytest.raises(ValueError, match="got 10, 'float16'"):
        apply.run(size=10, dtype="float16")
