import io
import json
import os
import pty
import select

import pytest

from distopt import metrics
from distopt.metrics import MetricsFile, PhaseClock, Progress


def test_phases_add_up_and_begin_anew(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(times))
    clock = PhaseClock()
    clock.start("a")
    clock.start("b")
    clock.start(None)
    clock.start("a")
    clock.start(None)
    clock.add("b", -0.5)
    assert clock.take() == {"a": 5.0, "b": 1.5}
    assert clock.take() == {}


def test_metrics_are_lines_of_json_written_at_once_and_appended_on_resuming(tmp_path):
    path = tmp_path / "new" / "m.jsonl"
    first = MetricsFile(path)
    first.write(step=1, loss=2.5)
    assert json.loads(path.read_text()) == {"step": 1, "loss": 2.5}
    first.close()
    second = MetricsFile(path, resumed_step=1)
    second.write(step=2)
    second.write(step=3)
    second.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # killed while writing
    third = MetricsFile(path, resumed_step=2)
    third.write(step=3, again=True)
    third.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert "again" in path.read_text()
    MetricsFile(path).close()
    assert path.read_text() == ""


def test_plain_lines_where_nobody_watches():
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.step(5)
        progress.log(5, 1.25, 0.1, 1234.5, 20.0, 2.5)
        progress.say("done")
    assert (
        stream.getvalue()
        == "step 5  loss 1.2500  lr 0.1  1,234 examples/s  20.0 ms/step (2.5 exposed)\ndone\n"
    )


def test_other_ranks_show_nothing():
    stream = io.StringIO()
    with Progress(10, shown=False, stream=stream) as progress:
        progress.log(5, 1.0, 0.1, 1.0, 1.0, 0.0)
        progress.say("done")
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal_and_on_request(monkeypatch):
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    for style, expected in (("auto", True), ("bar", True), ("lines", False)):
        ours, theirs = pty.openpty()
        with os.fdopen(theirs, "w") as stream:
            with Progress(10, style=style, stream=stream) as progress:
                progress.log(5, 1.0, 0.1, 1.0, 1.0, 0.0)
            stream.flush()
            assert select.select([ours], [], [], 10)[0], "nothing was written to the stream"
            shown = os.read(ours, 65536).decode()
        os.close(ours)
        assert ("\x1b[" in shown) is expected, style
    with pytest.raises(ValueError, match="'auto', 'bar' or 'lines', got 'none'"):
        Progress(1, style="none")
