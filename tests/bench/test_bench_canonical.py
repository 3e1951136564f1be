import json

import pytest
from launching import needs_mpirun

from distopt.bench import canonical
from distopt.communicators import LocalCommunicator


def test_everything_is_measured_beside_plain_in_the_same_rounds():
    options = canonical.Options(
        ranks=(1,), shards=(2,), global_batch=4, steps=1, rounds=2, largest_bytes=16384
    )
    found = canonical.run_rank(options, LocalCommunicator())
    assert list(found["steps"]) == ["plain", "V=1", "V=2"]
    for row in found["steps"].values():
        assert row["ms"]["count"] == 2
        assert 0 < row["ms"]["least"] <= row["ms"]["median"]
    assert [row["bytes"] for row in found["exchanges"]] == [4096, 16384]
    for row in (found["steps"], *found["exchanges"]):
        assert row["plain"]["over_plain"]["median"] == 1
        assert row["V=2"]["over_plain"]["median"] > 0


@needs_mpirun
@pytest.mark.timeout(200)
def test_ranks_are_started_and_their_tables_printed(tmp_path, capsys):
    options = canonical.Options(
        ranks=(2,), shards=(3,), global_batch=6, steps=1, rounds=1, largest_bytes=4096
    )
    canonical.main(options, str(tmp_path / "result.json"))
    printed = capsys.readouterr().out
    assert "2 ranks" in printed
    assert "V=3 over plain" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert [run["ranks"] for run in result["runs"]] == [2]
    assert "commit" in result["environment"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"largest_bytes": 0}, "largest_bytes must be at least 4096, got 0"),
        ({"ranks": ()}, "ranks must be numbers from 1 on"),
        ({"global_batch": 3}, "a global batch of 3 can't be cut for 8"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        canonical.Options(**wrong)
