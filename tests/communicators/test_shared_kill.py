"""A rank that is killed while others wait for it in shared memory: the job ends, and leaves nothing there."""

import sys
import time

import pytest
from launching import needs_mpirun, run_python

from distopt.communicators.shared_memory import FOLDER

PROGRAM = """
import os, signal, sys, time
import numpy as np
from distopt.communicators import connect
communicator = connect("mpi", algorithm="shared")
memory = communicator.allocate(5_000_000, np.float32)
for step in range(1000):
    if communicator.rank == 1 and step == 3:
        print("killed at", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.all_reduce(memory).wait()
print("not killed")
"""


@needs_mpirun
@pytest.mark.skipif(sys.platform != "linux", reason="no /dev/shm here")
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_killed_rank_ends_the_job_and_leaves_nothing_in_shared_memory(ranks):
    before = set(FOLDER.iterdir())
    done = run_python(ranks, ["-c", PROGRAM], 60)
    ended = time.time()
    assert done.returncode != 0
    assert "not killed" not in done.stdout
    assert ended - float(done.stdout.split("killed at")[1].split()[0]) < 20
    # The region has 40 MB or more; what is small is another program's.
    assert not [path for path in set(FOLDER.iterdir()) - before if path.stat().st_size > 39_000_000]


@needs_mpirun
def test_a_rank_that_stops_is_named_by_those_that_wait_for_it_in_shared_memory():
    program = PROGRAM.replace("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(100)")
    done = run_python(2, ["-c", program], 60, DISTOPT_TIMEOUT="1.5")
    assert done.returncode == 75
    assert "rank 0 of 2" in done.stderr
    assert "all_reduce, collective number 5 of world, lasts longer than 1.5 s" in done.stderr
    assert "It waits for rank 1 (host" in done.stderr
