"""The programs of docs/extending.md keep the promises of what they extend, and are short."""

import os
import subprocess
import sys

import extending_page
import numpy as np
import pytest
from launching import ROOT

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import Fault, world
from distopt.variables import Variable

PROGRAM = "import sys\n\n" + extending_page.BLOCKS["communicator"] + "\n" + extending_page.BLOCKS["start"]
CONTRACT = """
from communicator_contract import CONTRACT
from contract_details import calls_that_differ_raise_on_every_rank_and_leave_all_usable

def check(communicator):
    for check in [*CONTRACT, calls_that_differ_raise_on_every_rank_and_leave_all_usable]:
        check(communicator)
"""
TRAINING = """
import numpy as np
import distopt
from distopt import ops

def check(communicator):
    x = np.arange(7.0) - 3.0
    bounds = {1: [0, 7], 2: [0, 5, 7], 3: [0, 4, 4, 7]}[communicator.size]  # rank 1 of 3 has none
    own = x[bounds[communicator.rank] : bounds[communicator.rank + 1]]
    w = distopt.Variable(np.array([1.0]), name="w")
    optimizer = distopt.SGD(0.1, gradient_aggregator=distopt.AllReduce(communicator))
    for _ in range(3):
        optimizer.minimize(lambda: ops.reduce_sum((w * own) ** 2), [w], examples=len(own))
    # The gradient is 2 w mean(x ** 2) = 8 w.
    np.testing.assert_allclose(w.numpy(), 0.2 ** 3, rtol=1e-12)
"""
DYING = """
import os
from distopt.errors import CommunicatorError

def check(communicator):
    communicator.barrier()
    if communicator.rank == 1:
        os._exit(7)
    try:
        communicator.all_gather_object("x" * 1_000_000)
    except CommunicatorError as error:
        print(error, flush=True)
        raise SystemExit(3)
"""
MAIN = """
if __name__ == "__main__":
    print("exit codes", start(int(sys.argv[1]), check))
"""


def run(tmp_path, ranks, check, seconds=250):
    script = tmp_path / "pipes.py"
    script.write_text(PROGRAM + check + MAIN)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "communicators")))
    return subprocess.run(
        [sys.executable, script, str(ranks)],
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("name", ["aggregator", "communicator"])
def test_an_extension_has_at_most_30_lines(name):
    lines = [line for line in extending_page.BLOCKS[name].splitlines() if line.strip()]
    assert len(lines) <= 30


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_communicator_keeps_the_contract(tmp_path, ranks):
    done = run(tmp_path, ranks, CONTRACT)
    assert done.stdout == f"exit codes {[0] * ranks}\n", done.stderr


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_communicator_trains(tmp_path, ranks):
    done = run(tmp_path, ranks, TRAINING, 60)
    assert done.stdout == f"exit codes {[0] * ranks}\n", done.stderr


def test_the_communicator_names_a_rank_that_died(tmp_path):
    done = run(tmp_path, 3, DYING, 60)
    *said, codes = done.stdout.splitlines()
    assert codes == "exit codes [3, 7, 3]", done.stderr
    assert len(said) == 2
    assert sum("lost rank 1" in line for line in said) >= 1


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_aggregator_takes_the_median_of_the_ranks_that_have_examples(ranks, arena):
    def rank(communicator):
        results = extending_page.medians(communicator, arena=arena)
        extending_page.check_medians(communicator, results)

    world(ranks, rank)


def nonsense_on_rank_1(communicator, aggregator):
    w = Variable(np.array([4.0]), name="w")
    optimizer = SGD(0.25, gradient_aggregator=aggregator)
    for _ in range(4):
        scale = -1e6 if communicator.rank == 1 else 1.0
        optimizer.minimize(lambda scale=scale: ops.reduce_sum(w * w) * scale, [w], examples=1)
    return float(w.numpy()[0])


def test_one_ranks_nonsense_spoils_the_mean_and_not_the_median():
    median = extending_page.program("aggregator")["MedianOfRanks"]
    found = world(3, lambda ranks: nonsense_on_rank_1(ranks, median(ranks)))
    assert found == [4.0 / 2**4] * 3  # each step halves it
    for value in world(3, lambda ranks: nonsense_on_rank_1(ranks, AllReduce(ranks))):
        assert value > 1e6


@pytest.mark.parametrize("kind", ["kill", "mismatch"])
def test_the_aggregators_ranks_end_together(kind):
    median = extending_page.program("aggregator")["MedianOfRanks"]
    with pytest.raises(CommunicatorError, match=r"rank 1 (was killed|called)"):
        world(2, lambda ranks: nonsense_on_rank_1(ranks, median(ranks)), faults=[Fault(kind, 1, step=3)])


@pytest.mark.parametrize(
    "test", [name for name in extending_page.program("faults") if name.startswith("test_")]
)
def test_the_tests_with_faults_pass(test):
    extending_page.program("faults")[test]()
