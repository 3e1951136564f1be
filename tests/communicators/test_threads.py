import time

import numpy as np
import pytest

from distopt.errors import CommunicatorError
from distopt.testing import Fault, world


def sum_three_times(communicator):
    totals = []
    for _ in range(3):
        totals.append(float(communicator.all_reduce(np.ones(4, np.float32)).wait()[0]))
    return totals


def test_results_come_back_by_rank():
    assert world(3, lambda communicator: communicator.rank * 10) == [0, 10, 20]


def test_sums_are_formed_in_rank_order_whoever_comes_last():
    terms = [1e8, 1.0, -1e8, 1.0]  # in float32 this order gives 1, others give 0 or 2

    def late(last):
        def run(communicator):
            if communicator.rank == last:
                time.sleep(0.02)
            values = np.array([terms[communicator.rank]], np.float32)
            return float(communicator.all_reduce(values).wait()[0])

        return run

    for last in range(4):
        assert world(4, late(last)) == [1.0] * 4


def test_the_first_original_error_comes_out_with_its_rank_and_stops_the_others_at_once():
    seen = []

    def run(communicator):
        communicator.barrier()
        if communicator.rank == 2:
            raise KeyError("lost")
        try:
            communicator.all_reduce(np.ones(1)).wait()
        except CommunicatorError as error:
            seen.append(str(error))
            raise

    begin = time.monotonic()
    with pytest.raises(KeyError, match="lost") as caught:
        world(4, run)
    assert time.monotonic() - begin < 5
    assert caught.value.__notes__ == ["raised on rank 2 of 4"]
    assert len(seen) == 3
    assert all("rank 2 raised KeyError: 'lost'" in text for text in seen)


def test_a_rank_that_returns_early_is_named():
    def run(communicator):
        if communicator.rank == 1:
            return
        communicator.barrier()

    with pytest.raises(CommunicatorError, match="rank 1 has returned"):
        world(3, run)


def test_a_killed_rank_is_named_by_all_others():
    with pytest.raises(CommunicatorError, match="rank 1 was killed"):
        world(3, sum_three_times, faults=[Fault("kill", rank=1, call_number=2)])


def test_a_rank_that_is_killed_alone_is_noticed_too():
    with pytest.raises(CommunicatorError, match=r"rank\(s\) \[0\] of 1 were killed"):
        world(1, sum_three_times, faults=[Fault("kill", rank=0, call_number=1)])


def test_a_delay_changes_nothing_but_the_time():
    begin = time.monotonic()
    fault = Fault("delay", rank=0, call_number=2, seconds=0.3)
    assert world(2, sum_three_times, faults=[fault]) == [[2.0] * 3] * 2
    assert time.monotonic() - begin >= 0.3


def test_a_nan_fault_reaches_all_ranks_in_that_call_only():
    results = world(3, sum_three_times, faults=[Fault("nan", rank=2, call_number=2)])
    for first, second, third in results:
        assert (first, third) == (3.0, 3.0)
        assert np.isnan(second)


def test_a_mismatch_fault_names_both_ranks():
    with pytest.raises(CommunicatorError) as caught:
        world(3, sum_three_times, faults=[Fault("mismatch", rank=2, call_number=3)])
    text = str(caught.value)
    assert "rank 0 called all_reduce(float32[4], sum)" in text
    assert "rank 2 called all_reduce(float32[4, 1], sum)" in text
    assert "number 3" in text


def test_faults_count_the_calls_of_split_communicators_too():
    def run(communicator):
        with communicator.split(0) as group:  # call 1
            group.barrier()  # call 2

    with pytest.raises(CommunicatorError, match="rank 1 was killed"):
        world(2, run, faults=[Fault("kill", rank=1, call_number=2)])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: c.all_reduce(np.ones(3 + c.rank)), "float64[4], sum"),
        (lambda c: c.all_reduce(np.ones(3, [np.float32, np.float64][c.rank])), "float64[3]"),
        (lambda c: c.all_reduce(np.ones(3), ["sum", "max"][c.rank]), "max"),
        (lambda c: c.broadcast(np.ones(3), c.rank), "root=1"),
        (lambda c: c.barrier() if c.rank else c.all_reduce(np.ones(3)).wait(), "barrier()"),
    ],
)
def test_ranks_that_call_different_things_all_raise_naming_both(call, said):
    texts = []

    def run(communicator):
        try:
            pending = call(communicator)
            if pending is not None and not isinstance(pending, np.ndarray):
                pending.wait()
        except CommunicatorError as error:
            texts.append(str(error))
            raise

    with pytest.raises(CommunicatorError):
        world(2, run)
    assert len(texts) == 2
    assert all("rank 0 called" in text and "rank 1 called" in text for text in texts)
    assert all(said in text for text in texts)


def test_a_rank_that_does_not_come_is_named_after_the_timeout():
    def run(communicator):
        if communicator.rank == 1:
            time.sleep(1.0)
        else:
            communicator.barrier()

    with pytest.raises(CommunicatorError, match=r"waited 0\.3 s in barrier.* rank\(s\) \[1\]"):
        world(3, run, timeout_seconds=0.3)


def test_a_rank_that_is_stuck_outside_of_collectives_is_named():
    def run(communicator):
        if communicator.rank == 1:
            time.sleep(4)

    with pytest.raises(CommunicatorError, match=r"rank\(s\) \[1\] of 2 did not end within 0\.1 s"):
        world(2, run, timeout_seconds=0.1)


def test_abort_stops_all_ranks_with_its_message():
    def run(communicator):
        if communicator.rank == 0:
            communicator.abort(3, "disk full")
        communicator.barrier()

    with pytest.raises(CommunicatorError, match=r"rank 0 of 2 .* with code 3: disk full"):
        world(2, run)


def test_pretended_hosts_give_local_ranks():
    def run(communicator):
        return communicator.host, communicator.local_rank, communicator.local_size

    results = world(4, run, hosts=["a", "b", "a", "a"])
    assert results == [("a", 0, 3), ("b", 0, 1), ("a", 1, 3), ("a", 2, 3)]


def test_results_that_everyone_took_are_not_kept():
    def run(communicator):
        for _ in range(5):
            communicator.all_reduce(np.ones(3)).wait()
        communicator.barrier()
        return len(communicator._world.meetings)

    assert min(world(3, run)) == 0


@pytest.mark.parametrize(
    "arguments",
    [("burn", 0, 1), ("kill", -1, 1), ("kill", 0, 0), ("delay", 0, 1, -0.5)],
)
def test_impossible_faults_are_refused(arguments):
    with pytest.raises(ValueError, match=str(arguments[0])):
        Fault(*arguments)


def test_a_fault_that_never_happened_is_an_error():
    with pytest.raises(ValueError, match=r"never reached.*call_number=9"):
        world(2, sum_three_times, faults=[Fault("kill", rank=0, call_number=9)])


def test_a_fault_of_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="a world of 2 does not have"):
        world(2, sum_three_times, faults=[Fault("kill", rank=2, call_number=1)])


def test_worlds_need_ranks_and_a_host_for_each():
    with pytest.raises(ValueError, match="at least 1 rank, got 0"):
        world(0, sum_three_times)
    with pytest.raises(ValueError, match="one host for each of 2"):
        world(2, sum_three_times, hosts=["a"])
