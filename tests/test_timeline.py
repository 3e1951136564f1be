import json

import pytest

from distopt import timeline
from distopt.testing import world
from distopt.timeline import Span, Timeline, draw, text_picture, write_trace

SPANS = [
    Span(0, "backward", "w", 5.0, 5.006),
    Span(0, "buckets", "768 bytes", 5.006, 5.010),
    Span(1, "backward", "w", 5.001, 5.008),
]


def test_a_trace_has_a_process_per_rank_and_microseconds(tmp_path):
    write_trace(SPANS, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"rank 0", "rank 1"}
    found = [
        (e["pid"], names[e["pid"], e["tid"]], e["name"], round(e["ts"]), round(e["dur"]))
        for e in events
        if e["ph"] == "X"
    ]
    assert found == [
        (0, "backward", "w", 0, 6000),
        (0, "buckets", "768 bytes", 6000, 4000),
        (1, "backward", "w", 1000, 7000),
    ]


def test_the_picture_in_characters_shows_where_and_how_long():
    lines = text_picture(SPANS, width=20).splitlines()
    assert lines[0].split() == ["0", "ms", "10.0", "ms"]
    assert [line[22:] for line in lines[1:]] == ["#" * 12, " " * 12 + "#" * 8, "  " + "#" * 14]
    assert lines[2].startswith("rank 0 buckets")
    assert text_picture([]) == "nothing was recorded"


def test_a_picture_is_drawn_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip("matplotlib")
    draw(SPANS, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_ranks_clocks_are_brought_together():
    # Rank r's clock is 100 r seconds ahead.
    real = timeline.time.perf_counter

    def run(communicator):
        ahead = 100.0 * communicator.rank
        own = Timeline(communicator)
        own._shift -= ahead  # as the constructor would find with such a clock
        communicator.barrier()
        now = real() + ahead
        own.add("lane", "name", now, now + 1.0)
        with own.span("lane", "block"):
            pass
        spans = own.gather()
        assert own.gather() == []
        return spans

    for spans in world(3, run):
        named = [span for span in spans if span.name == "name"]
        assert [span.rank for span in named] == [0, 1, 2]
        assert max(s.start for s in named) - min(s.start for s in named) < 0.5
        assert all(span.stop - span.start == pytest.approx(1.0) for span in named)
