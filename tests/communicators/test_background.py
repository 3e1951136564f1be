"""The thread that moves messages on: it does so without the main thread, sleeps, and tells of errors."""

import time
from contextlib import nullcontext

import numpy as np
import pytest
from fake_links import FakeLinks, FakeNetwork

from distopt.communicators.background import BackgroundProgress
from distopt.communicators.flows import Flows
from distopt.communicators.ring import Ring
from distopt.testing import world


def _waiting(operation, number):
    return nullcontext()


def _until(is_true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return is_true()


def test_reductions_end_while_the_ranks_do_something_else():
    network = FakeNetwork(3)

    def run(communicator):
        ring = Ring(network.links(communicator.rank), _waiting, segment_bytes=256, background=True)
        for turn in range(3):
            values = np.full(1000, turn + communicator.rank, "f8")
            pending = ring.start(values, "sum", turn)
            assert _until(lambda: not ring.flows.busy)  # nobody calls progress, test or wait
            assert (values == 3 * turn + 3).all()
            assert pending.test()
        ring.close()

    world(3, run)


def test_it_sleeps_while_another_rank_is_late_and_when_nothing_is_in_flight():
    ring = Ring(FakeNetwork(2).links(0), _waiting, background=True)
    began = time.process_time()
    time.sleep(0.3)
    ring.start(np.ones(1000), "sum", 1)  # the other rank never comes
    time.sleep(0.7)
    assert time.process_time() - began < 0.4


def test_what_goes_wrong_in_the_thread_is_raised_in_the_main_thread():
    class Broken(FakeLinks):
        broken = False

        def test_some(self, requests):
            if self.broken:
                raise OSError("the card is gone")
            return []

    links = Broken(FakeNetwork(2), 0)
    ring = Ring(links, _waiting, background=True)
    pending = ring.start(np.zeros(9), "sum", 1)
    links.broken = True
    time.sleep(0.1)
    with pytest.raises(OSError, match="the card is gone"):
        pending.wait()


def test_the_thread_ends_when_it_is_closed():
    background = BackgroundProgress(Flows(FakeNetwork(1).links(0), 1))
    background.wake()
    background.close()
    assert not background._thread.is_alive()
