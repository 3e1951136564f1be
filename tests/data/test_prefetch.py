import gc
import subprocess
import sys
import threading
import time
import traceback
import weakref

import pytest

from distopt.data import Prefetcher


class UnusualError(Exception):
    pass


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@pytest.mark.parametrize("depth", [0, 1, 2, 7])
def test_batches_come_in_order_from_the_first_step_on(depth):
    with Prefetcher(lambda step: step * step, first_step=3, depth=depth) as batches:
        assert [batches.get(step) for step in range(3, 20)] == [s * s for s in range(3, 20)]


def test_the_thread_makes_depth_batches_ahead_and_no_more():
    made = []
    with Prefetcher(made.append, first_step=0, depth=3) as batches:
        wait_until(lambda: made == [0, 1, 2])
        time.sleep(0.05)
        assert made == [0, 1, 2]
        batches.get(0)
        wait_until(lambda: made == [0, 1, 2, 3])


def test_depth_zero_makes_each_batch_inside_get_in_the_callers_thread():
    threads = []
    before = threading.active_count()
    with Prefetcher(lambda _: threads.append(threading.current_thread()), depth=0) as batches:
        assert threading.active_count() == before
        batches.get(0)
        assert threads == [threading.current_thread()]


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_is_raised_by_the_get_of_its_step_with_the_original_traceback(depth):
    def make_the_fatal_batch(step):
        if step == 2:
            raise UnusualError("step 2 is bad")
        return step

    with Prefetcher(make_the_fatal_batch, depth=depth) as batches:
        assert batches.get(0) == 0
        assert batches.get(1) == 1
        for _ in range(2):
            with pytest.raises(UnusualError, match="step 2 is bad") as caught:
                batches.get(2)
        assert "make_the_fatal_batch" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_steps_out_of_order_are_refused():
    with Prefetcher(lambda step: step, first_step=5) as batches:
        with pytest.raises(ValueError, match="step 6 was asked for, but 5 comes next"):
            batches.get(6)
        assert batches.get(5) == 5
        with pytest.raises(ValueError, match="step 5 was asked for, but 6 comes next"):
            batches.get(5)


@pytest.mark.parametrize("depth", [0, 2])
def test_no_batch_is_made_from_the_end_step_on(depth):
    made = []
    with Prefetcher(made.append, first_step=1, depth=depth, end_step=3) as batches:
        batches.get(1)
        batches.get(2)
        with pytest.raises(IndexError, match="step 3 was asked for, but the steps end before 3"):
            batches.get(3)
    assert made == [1, 2]


def test_waiting_is_measured_where_the_batch_is_late_and_not_where_it_is_ready():
    def slow(step):
        time.sleep(0.05)
        return step

    with Prefetcher(slow, depth=1) as batches:
        batches.get(0)
        assert batches.waited_seconds > 0.03
        time.sleep(0.15)
        before = batches.waited_seconds
        batches.get(1)
        assert batches.waited_seconds - before < 0.03
        wait_until(lambda: batches.making_seconds >= 0.1)


def test_without_a_thread_all_making_is_waiting():
    with Prefetcher(lambda _: time.sleep(0.02), depth=0) as batches:
        batches.get(0)
        assert batches.waited_seconds >= batches.making_seconds >= 0.02


def test_closing_ends_the_thread_drops_its_batches_and_may_be_repeated():
    class Batch:
        pass

    made = weakref.WeakSet()

    def make(_):
        batch = Batch()
        made.add(batch)
        return batch

    batches = Prefetcher(make, depth=2)
    wait_until(lambda: len(made) == 2)
    names = {thread.name for thread in threading.enumerate()}
    assert "distopt-prefetch" in names
    batches.close()
    batches.close()
    gc.collect()
    assert len(made) == 0
    assert "distopt-prefetch" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="closed; step 0"):
        batches.get(0)


def test_closing_wakes_a_get_that_waits():
    release = threading.Event()
    batches = Prefetcher(lambda _: release.wait(5), depth=1)
    raised = []

    def ask():
        try:
            batches.get(0)
        except RuntimeError as error:
            raised.append(str(error))

    waiting = threading.Thread(target=ask)
    waiting.start()
    time.sleep(0.05)
    with pytest.warns(RuntimeWarning, match="still making step 0"):
        batches.close(timeout_seconds=0.01)
    waiting.join(5)
    assert raised == ["the prefetcher was closed while step 0 was waited for"]
    release.set()


def test_a_dropped_prefetcher_ends_its_thread():
    batches = Prefetcher(lambda step: step, depth=2)
    thread = next(t for t in threading.enumerate() if t.name == "distopt-prefetch")
    del batches
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_batch_that_was_handed_over_is_kept_by_the_caller_alone():
    class Batch:
        pass

    making, release = threading.Event(), threading.Event()

    def make(step):
        if step == 1:
            making.set()
            release.wait(5)
        return Batch()

    with Prefetcher(make, depth=1) as batches:
        batch = batches.get(0)
        gone = weakref.ref(batch)
        assert making.wait(5)  # the thread is busy with the next one
        del batch
        assert gone() is None
        release.set()


def test_a_process_ends_while_its_thread_is_stuck_in_a_batch():
    code = (
        "import time; from distopt.data import Prefetcher\n"
        "batches = Prefetcher(lambda step: time.sleep(1000), depth=2)\n"
        "time.sleep(0.1); print('over')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "over\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"depth": -1}, "depth must be 0"), ({"first_step": 5, "end_step": 4}, "end_step 4 lies")],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Prefetcher(lambda step: step, **fields)
