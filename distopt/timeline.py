"""A timeline of what the ranks did when, for Perfetto, chrome://tracing, or a picture.

Example:
    >>> timeline = Timeline(communicator)
    >>> aggregator.recorder = timeline.add
    >>> ...                                   # some steps
    >>> spans = timeline.gather()             # on all ranks
    >>> if communicator.rank == 0:
    ...     write_trace(spans, "timeline.json")
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distopt.communicators import Communicator
from distopt.errors import BackendError

__all__ = ["Span", "Timeline", "draw", "text_picture", "write_trace"]

_LOOKS = 9


@dataclass(frozen=True)
class Span:
    """Something that lasted.

    Attributes:
        rank: where.
        lane: kind of thing; the lanes of a rank stand below each other.
        name: what.
        start: in seconds, on rank 0's clock, and
        stop: when it ended.
    """

    rank: int
    lane: str
    name: str
    start: float
    stop: float


class Timeline:
    """Notes spans on one rank. Made by all ranks together.

    The clocks of hosts differ: ranks leave barriers at about the same time, and the median over several of
    them tells by how much (to some 0.1 ms; more where ranks share cores).

    Args:
        communicator: of the ranks.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._events: list[tuple[str, str, float, float]] = []
        looks: list[float] = []
        for _ in range(_LOOKS):
            communicator.barrier()
            looks.append(time.perf_counter())
        first = communicator.broadcast_object(looks)
        # To be added to this rank's times.
        self._shift = statistics.median(a - b for a, b in zip(first, looks, strict=True))

    def add(self, lane: str, name: str, start: float, stop: float) -> None:
        """Note a span, with times of `time.perf_counter`; what `AllReduce.recorder` wants."""
        self._events.append((lane, name, start, stop))

    @contextmanager
    def span(self, lane: str, name: str) -> Generator[None]:
        """Note how long the block lasts."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(lane, name, began, time.perf_counter())

    def gather(self) -> list[Span]:
        """Return the spans of all ranks, and begin anew. Collective."""
        own = [(lane, name, a + self._shift, b + self._shift) for lane, name, a, b in self._events]
        self._events = []
        return [
            Span(rank, *event)
            for rank, events in enumerate(self._communicator.all_gather_object(own))
            for event in events
        ]


def write_trace(spans: Sequence[Span], path: str | Path) -> None:
    """Write spans in Chrome's trace format: a process per rank, a thread per lane.

    The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
    """
    begin = min((span.start for span in spans), default=0.0)
    lanes = list(dict.fromkeys(span.lane for span in spans))
    events: list[dict[str, Any]] = []
    for rank in sorted({span.rank for span in spans}):
        events.append(
            {"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
        )
        events += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": lane}}
            for number, lane in enumerate(lanes)
        ]
    for span in spans:
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "pid": span.rank,
                "tid": lanes.index(span.lane),
                "ts": 1e6 * (span.start - begin),  # microseconds
                "dur": 1e6 * (span.stop - span.start),
            }
        )
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def text_picture(spans: Sequence[Span], width: int = 100) -> str:
    """Return a picture in characters: a line for each lane of each rank, # where something went on."""
    if not spans:
        return "nothing was recorded"
    begin, end = min(span.start for span in spans), max(span.stop for span in spans)
    scale = width / max(end - begin, 1e-9)
    rows = sorted({(span.rank, span.lane) for span in spans})
    lanes = list(dict.fromkeys(span.lane for span in spans))
    rows.sort(key=lambda row: (row[0], lanes.index(row[1])))
    lines = [f"{'':22}0 ms{f'{1e3 * (end - begin):.1f} ms':>{width - 4}}"]
    for rank, lane in rows:
        cells = [" "] * width
        for span in spans:
            if (span.rank, span.lane) == (rank, lane):
                first = min(width - 1, int((span.start - begin) * scale))
                for cell in range(first, max(first + 1, min(width, round((span.stop - begin) * scale)))):
                    cells[cell] = "#"
        lines.append(f"{f'rank {rank} {lane}':<22}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def draw(spans: Sequence[Span], path: str | Path) -> None:
    """Draw spans into a file, PNG or SVG by its name.

    Raises:
        BackendError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError(
            "a picture needs matplotlib; pip install 'distopt[plot]', or write a trace instead"
        )
    # The figure by itself, without pyplot: no window system, no state that others see.
    figure_class: Any = importlib.import_module("matplotlib.figure").Figure
    rows = sorted({(span.rank, span.lane) for span in spans})
    begin = min((span.start for span in spans), default=0.0)
    figure = figure_class(figsize=(10, 1.2 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colors = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"]
    lanes = list(dict.fromkeys(span.lane for span in spans))
    for place, (rank, lane) in enumerate(rows):
        bars = [
            (1e3 * (span.start - begin), 1e3 * (span.stop - span.start))
            for span in spans
            if (span.rank, span.lane) == (rank, lane)
        ]
        color = colors[lanes.index(lane) % len(colors)]
        axes.broken_barh(bars, (place - 0.4, 0.8), facecolor=color, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(rows)), [f"rank {rank} {lane}" for rank, lane in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    figure.savefig(path, dpi=130)
