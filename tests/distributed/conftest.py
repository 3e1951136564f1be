"""Runs under mpirun only; tests/test_distributed.py starts it on 1, 2, 3 and 4 ranks.

By hand: mpirun -n 3 python -m pytest --capture=sys -p no:cacheprovider tests/distributed

Tests take the fixture `communicator` and run on all ranks alike. The first failure ends the whole
job: the other ranks may be waiting in a collective of the same test.
"""

import atexit
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from distopt.communicators import Communicator, connect
from distopt.communicators.connect import announced_ranks

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "communicators"))  # for communicator_contract

SECONDS_PER_TEST = 100
under_launcher = announced_ranks() is not None
collect_ignore_glob = [] if under_launcher else ["test_*.py"]
_ranks: list[Communicator] = []


@pytest.hookimpl(tryfirst=True)  # before the plugin that reads basetemp
def pytest_configure(config: pytest.Config) -> None:
    if not under_launcher:
        return
    # Ranks would clean up one another's numbered folders in the one that pytest has for a user.
    folder = tempfile.mkdtemp(prefix="distopt-rank-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config.option.basetemp = Path(folder) / "tests"
    _ranks.append(connect("mpi"))
    if config.getoption("capture") == "fd":
        raise pytest.UsageError("pass --capture=sys: fd hides the message with which a rank ends the job")
    if _ranks[0].rank > 0:
        # One report is enough; what fails on another rank is written to stderr below.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def pytest_report_header() -> list[str]:
    return [f"MPI: {ranks.description}; {ranks.where}" for ranks in _ranks]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("timeout") is None:
            # Only the thread method gets through while the main thread is inside MPI.
            item.add_marker(pytest.mark.timeout(SECONDS_PER_TEST, method="thread"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and _ranks and _ranks[0].size > 1:
        time.sleep(0.6 * min(_ranks[0].rank, 1))  # where all fail alike, rank 0 speaks
        sys.__stderr__.write(f"\n{report.longreprtext}\n")
        _ranks[0].abort(1, f"{report.when} of {report.nodeid} failed")


@pytest.fixture(scope="session")
def communicator() -> Communicator:
    """The communicator of all ranks of the test run."""
    return _ranks[0]


@pytest.fixture(autouse=True)
def _all_ranks_run_the_same_test(communicator: Communicator, request: pytest.FixtureRequest):
    names = communicator.all_gather_object(request.node.nodeid)
    assert len(set(names)) == 1, f"the ranks run different tests: {names}"
