"""The programs of docs/extending.md keep the promises of what they extend, and are short."""

import os
import subprocess
import sys

import extending_page
import numpy as np
import pytest
from launching import ROOT

from distopt import ops
from distopt.aggregators import AllReduce, Compressed
from distopt.aggregators.codecs import ErrorFeedback
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.testing import Fault, world
from distopt.variables import Arena, Variable

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


@pytest.mark.parametrize("name", ["aggregator", "codec", "communicator"])
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


def powers_of_two():
    return extending_page.program("codec")["PowersOfTwo"]()


def test_the_codec_keeps_signs_zeros_and_powers_of_two_and_is_off_by_a_third_at_most():
    codec = powers_of_two()
    exact = np.concatenate([[0.0], 2.0 ** np.arange(-89, 37), -(2.0 ** np.arange(-89, 37))]).astype("f4")
    np.testing.assert_array_equal(codec.decode(codec.encode(exact), exact.size), exact)
    values = np.random.default_rng(0).standard_normal(10_001).astype("f4") ** 3
    payload = codec.encode(values)
    assert (payload.dtype, payload.shape, codec.wire_bytes(10_001)) == (np.uint8, (10_001,), 10_001)
    found = codec.decode(payload, values.size)
    assert found.dtype == np.float32
    assert (np.abs(found - values) <= np.abs(values) / 3).all()
    assert np.abs(found - values).max() > 0.1
    assert codec.decode(codec.encode(values[:0]), 0).shape == (0,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_codec_hides_nothing_that_is_not_finite(bad):
    codec = powers_of_two()
    found = codec.decode(codec.encode(np.array([1.0, bad, -2.0], "f4")), 3)
    np.testing.assert_array_equal(np.isfinite(found), [True, False, True])
    assert codec.decode(codec.encode(np.float32([3e38, -3e38])), 2).tolist() == [2.0**36, -(2.0**36)]


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_codec_trains_with_error_feedback(ranks, arena):
    target = np.random.default_rng(1).standard_normal(40).astype("f4")

    def rank(communicator):
        w = Variable(np.zeros(40, "f4"), name="w")
        if arena:
            Arena([w])
        codec = ErrorFeedback(powers_of_two())
        optimizer = SGD(0.1, gradient_aggregator=Compressed(communicator, codec, min_elements=1))
        examples = [5, 0, 2][communicator.rank]
        for _ in range(200):
            optimizer.minimize(
                lambda: ops.reduce_sum((w - target) ** 2) * np.float32(examples), [w], examples=examples
            )
        return w.numpy()

    for values in world(ranks, rank):
        np.testing.assert_allclose(values, target, atol=1e-4)


@pytest.mark.parametrize(
    "test", [name for name in extending_page.program("faults") if name.startswith("test_")]
)
def test_the_tests_with_faults_pass(test):
    extending_page.program("faults")[test]()
