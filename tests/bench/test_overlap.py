import json
import subprocess

import pytest
from launching import ROOT, needs_mpirun, run_python

from distopt.bench.overlap import Options, hidden_share


def test_the_share_is_of_the_shorter_of_communication_and_backward():
    assert hidden_share(100.0, 76.0, 40.0, 30.0) == pytest.approx(0.8)
    assert hidden_share(100.0, 76.0, 30.0, 90.0) == pytest.approx(0.8)
    assert hidden_share(100.0, 110.0, 20.0, 30.0) == pytest.approx(-0.5)


@pytest.mark.parametrize("name", ["batch", "rounds", "hosts"])
def test_numbers_below_1_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Options(**{name: 0})


@needs_mpirun
def test_it_measures_over_the_ranks_of_a_job_and_writes_a_trace(tmp_path):
    options = {"batch": 2, "rounds": 1, "bucket_bytes": 1 << 20, "trace": str(tmp_path / "trace.json")}
    arguments = ["-m", "distopt.bench.overlap", json.dumps(options), str(tmp_path / "found.json")]
    done = run_python(2, arguments, 120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ranks"] == 2
    assert found["bucket_bytes"] == 1 << 20
    assert min(found["seconds"].values()) > 0
    lanes = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    # 4.27 MB: three of 1 MiB, then halves of what is left.
    assert sum(int(e["name"].split()[0]) for e in lanes if e["name"].endswith("bytes")) == 2 * 4_273_408


def _why_no_hosts():
    done = subprocess.run(
        ["bash", ROOT / "launch" / "hosts.sh", "--check"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


@needs_mpirun
@pytest.mark.skipif(bool(_why_no_hosts()), reason=_why_no_hosts() or "hosts can be made")
def test_pretended_hosts_have_names_and_a_network_of_their_own_and_leave_nothing():
    program = "from distopt import connect; c = connect('mpi'); print('at', c.host, c.size, c.local_size)"
    done = subprocess.run(
        ["bash", "launch/hosts.sh", "--hosts", "2", "--rate", "1gbit", "--", "python", "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("at")) == [
        "at h1 2 1",
        "at h2 2 1",
    ]
