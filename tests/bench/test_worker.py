"""The processes that benchmarks start."""

import pytest

from distopt.bench import worker
from distopt.communicators import launcher
from distopt.errors import LaunchError


def test_warmup_is_not_among_the_timed_steps(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 13.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(times))

    class Clock:
        def take(self):
            return {"forward": next(phases)}

    class Trainer:
        clock = Clock()

    phases = iter([7.0, 0.5, 1.5])
    steps = worker._StepTimes(Trainer(), warmup=2)
    times.__next__()
    for number in range(1, 5):
        steps.step(number)
    assert steps.ends == [10.0, 11.0, 13.0]
    assert steps.phases == {"forward": 2.0}


def test_a_process_without_mpirun_gives_one_record():
    job = worker.Job("distopt", global_batch=3, steps=2, warmup=1, normalize=False, device="cpu")
    (record,) = worker.run_ranks(job, None)
    assert (record.rank, record.device, len(record.step_seconds)) == (0, "cpu:0", 2)
    assert sum(record.phases_seconds.values()) == pytest.approx(sum(record.step_seconds), rel=0.2)


def test_the_output_of_failed_ranks_is_in_the_error():
    if launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    with pytest.raises(LaunchError, match=r"distopt on 2 rank\(s\) ended with code [^0](.|\n)*can't be cut"):
        worker.run_ranks(worker.Job("distopt", global_batch=1, device="cpu"), 2)
