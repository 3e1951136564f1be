"""The benchmarks of the drift check and of sparse gradients: what they measure is what they say."""

import json

from distopt.backend import Device
from distopt.bench import drift, sparse
from distopt.communicators import connect
from distopt.testing import world


def test_the_drift_check_is_measured_beside_real_steps(tmp_path, capsys):
    with connect("local") as communicator:
        drift.main(communicator, Device(), 2, 2, 100, str(tmp_path / "d.json"))
    found = json.loads((tmp_path / "d.json").read_text())["drift"]
    # The tutorial's network has 1,068,298 parameters: values and averages; plain descent has no slots.
    assert found["bytes"] == 2 * 4 * 1_068_298 + 8  # and counts its steps
    assert found["share"]["median"] == found["check"]["median"] / (100 * found["step"]["median"])
    assert found["check"]["count"] == found["step"]["count"] == 2
    assert "a check every 100 steps takes" in capsys.readouterr().out


def test_ways_of_sparse_gradients_are_measured_in_turns():
    def run(communicator):
        return sparse.measure(communicator, Device(), 100, 4, [0.01, 1.0], 2)

    for found in world(2, run):
        assert [one["part"] for one in found] == [0.01, 1.0]
        assert all(one[mode]["count"] == 2 for one in found for mode in ("rows", "dense", "auto"))
        assert {one["chosen"] for one in found} <= {"rows", "dense"}


def test_the_table_names_the_way_that_is_chosen(tmp_path, capsys):
    with connect("local") as communicator:
        sparse.main(communicator, Device(), 50, 2, 1, str(tmp_path / "s.json"))
    assert len(json.loads((tmp_path / "s.json").read_text())["sparse"]) == 7
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 rank(s), a table of 50 x 2 float32, least ms on rank 0"
    assert all(line.endswith("rows") for line in lines[3:])
