"""Real jobs that go wrong on one rank: each must end soon, with a code, and name the rank last."""

import re
import subprocess
import time

import pytest
from launching import needs_mpirun, run_python

pytestmark = needs_mpirun

LIMIT_SECONDS = 15

BEGIN = """
import os, signal, sys, threading, time
import numpy as np
from distopt.communicators import connect, guard

communicator = connect()
communicator.barrier()
rank, size = communicator.rank, communicator.size
last = rank == size - 1
"""
OTHERS_WAIT = """
communicator.all_reduce(np.ones(100)).wait()
"""


def run_job(tmp_path, ranks, body, **environment):
    script = tmp_path / "job.py"
    script.write_text(BEGIN + body + OTHERS_WAIT)
    begin = time.monotonic()
    try:
        result = run_python(ranks, [str(script)], 60, **environment)
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"the job hangs:\n{error.stdout}\n{error.stderr}")
    assert time.monotonic() - begin < LIMIT_SECONDS, result.stderr
    return result


def last_line_of_distopt(stderr):
    """The last line of the job itself; mpirun adds notes of its own below."""
    lines = stderr.splitlines()
    numbers = [number for number, line in enumerate(lines) if line.startswith("distopt: rank")]
    assert numbers, stderr
    after = "\n".join(lines[numbers[-1] + 1 :])
    assert not re.search(r'Traceback|File "|\w+Error\b', after), after
    return lines[numbers[-1]]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("guarded", [False, True])
def test_an_exception_on_one_rank_ends_the_job_with_its_traceback(tmp_path, ranks, guarded):
    body = "if last: raise ValueError('bad weather')\n"
    if guarded:
        body = f"with guard(communicator):\n    {body}"
    result = run_job(tmp_path, ranks, body)
    assert result.returncode == 1
    line = last_line_of_distopt(result.stderr)
    assert f"rank {ranks - 1} of {ranks} on host " in line
    assert line.endswith(" ended the job: ValueError: bad weather")
    assert "job.py" in result.stderr
    assert "Traceback" in result.stderr


def test_an_exception_inside_with_connect_ends_the_job(tmp_path):
    body = "with communicator:\n    if last: raise OSError('disk full')\n    communicator.barrier()"
    result = run_job(tmp_path, 2, body)
    assert result.returncode == 1
    assert last_line_of_distopt(result.stderr).endswith("ended the job: OSError: disk full")


def test_an_exception_in_a_thread_ends_the_job(tmp_path):
    body = """
def work():
    raise ValueError('thread of rank %d' % rank)
if last:
    threading.Thread(target=work, name='prefetch').start()
"""
    result = run_job(tmp_path, 2, body + "time.sleep(20)")
    assert result.returncode == 1
    line = last_line_of_distopt(result.stderr)
    assert "rank 1 of 2" in line
    assert line.endswith("ValueError: thread of rank 1 (in thread prefetch)")


def test_all_ranks_that_raise_at_once_give_one_report_in_which_rank_0_speaks(tmp_path):
    result = run_job(tmp_path, 3, "communicator.broadcast(np.ones(3), root=7)")
    assert result.returncode == 1
    assert "rank 0 of 3" in last_line_of_distopt(result.stderr)
    assert result.stderr.count("root must be a rank, 0 to 2, got 7") <= 2  # traceback and last line


def test_a_guarded_exit_code_is_the_code_of_the_job(tmp_path):
    body = "with guard(communicator):\n    if last: sys.exit(3)\n"
    result = run_job(tmp_path, 2, body)
    assert result.returncode == 3
    assert last_line_of_distopt(result.stderr).endswith("ended the job: SystemExit: 3")


@pytest.mark.parametrize("leave", ["sys.exit(0)", "sys.exit(3)"])
def test_a_rank_that_leaves_while_others_wait_for_it_is_named(tmp_path, leave):
    result = run_job(tmp_path, 3, f"if last: {leave}\n")
    assert result.returncode == 75
    line = last_line_of_distopt(result.stderr)
    assert "all_reduce, collective number 2 of world" in line
    assert re.search(r"rank 2 \(host \S+\) already left", line)


def test_control_c_on_one_rank_ends_the_job(tmp_path):
    body = "if last: os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
    result = run_job(tmp_path, 2, body)
    assert result.returncode == 130
    assert "rank 1 of 2" in last_line_of_distopt(result.stderr)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_is_stuck_is_named_with_what_it_does(tmp_path, ranks):
    body = "if last: time.sleep(100)  # where it is stuck\n"
    result = run_job(tmp_path, ranks, body, DISTOPT_TIMEOUT="2")
    assert result.returncode == 75
    line = last_line_of_distopt(result.stderr)
    assert "all_reduce, collective number 2 of world, lasts longer than 2 s (DISTOPT_TIMEOUT)" in line
    assert re.search(rf"rank {ranks - 1} \(host \S+\), which is outside of collectives", line)
    assert re.search(r'job\.py", line \d+, in <module>', result.stderr)


def test_a_rank_that_is_stopped_is_named_by_its_silence(tmp_path):
    body = "if last: os.kill(os.getpid(), signal.SIGSTOP)\n"
    result = run_job(tmp_path, 3, body, DISTOPT_TIMEOUT="2")
    assert result.returncode == 75
    # Another rank may still be printing its stacks when this one has said it all.
    assert "It waits for rank 2, which gives no answer" in result.stderr


def test_a_rank_that_waits_in_another_collective_is_named(tmp_path):
    body = """
half = communicator.split(0)
if last:
    half.barrier()
"""
    result = run_job(tmp_path, 2, body, DISTOPT_TIMEOUT="2")
    assert result.returncode == 75
    line = last_line_of_distopt(result.stderr)
    assert "It waits for rank" in line
    assert "which is in " in line


def test_a_killed_rank_ends_the_job(tmp_path):
    result = run_job(tmp_path, 3, "if last: os.kill(os.getpid(), signal.SIGKILL)\n")
    assert result.returncode != 0


@pytest.mark.parametrize("end", ["", "sys.exit(0)"])
def test_ranks_may_end_at_different_times(tmp_path, end):
    body = f"""
communicator.all_reduce(np.ones(3)).wait()
if last: time.sleep(1.0)
print('done', flush=True)
{end}
"""
    script = tmp_path / "job.py"
    script.write_text(BEGIN + body)
    result = run_python(3, [str(script)], 60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done") == 3
    assert result.stderr.strip() == ""


def test_a_forked_worker_that_fails_does_not_end_the_job(tmp_path):
    body = """
import multiprocessing
def fail():
    raise RuntimeError('only the worker')
def work():
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    fail()
if last:
    worker = multiprocessing.get_context('fork').Process(target=work)
    worker.start()
    worker.join()
print('fine', flush=True)
"""
    result = run_job(tmp_path, 2, body)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("fine") == 2
    assert result.stderr.count("RuntimeError: only the worker") == 2
