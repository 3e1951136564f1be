"""Metrics over ranks, and what rank 0 shows and writes down: a bar or plain lines, a file of JSON lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from distopt.backend import Array, asnumpy
from distopt.communicators import Communicator
from distopt.variables import value_of

__all__ = ["Accuracy", "Mean", "MetricsFile", "PhaseClock", "Progress"]


class _Average:
    """A sum of values and their count; how they come in is the subclasses' part.

    Attributes:
        total: sum of this rank's values times their weights.
        count: sum of their weights.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0.0

    def _add(self, values: Array, sample_weight: Any) -> None:
        weights = asnumpy(value_of(1.0 if sample_weight is None else sample_weight))
        try:
            weights = np.broadcast_to(weights.astype(np.float64), values.shape)
        except ValueError as error:
            raise ValueError(
                f"sample_weight of shape {weights.shape} is no weight for each of values {values.shape}"
            ) from error
        self.total += float((values.astype(np.float64) * weights).sum())
        self.count += float(weights.sum())

    def result(self, communicator: Communicator | None = None) -> float:
        """Return the mean; NaN where there are no values.

        Args:
            communicator: over whose ranks, and collective then; None: over this rank's values alone.
        """
        sums = np.array([self.total, self.count])
        if communicator is not None:
            communicator.all_reduce(sums).wait()
        return float(sums[0] / sums[1]) if sums[1] else math.nan

    def reset_state(self) -> None:
        """Begin anew."""
        self.total = self.count = 0.0


class Mean(_Average):
    """A mean over the examples of all ranks, kept as (sum, count).

    The mean of the ranks' means is another number wherever ranks have different numbers of examples; sums and
    counts are summed apart, and divided once.

        accuracy = Mean()
        for batch in own_batches:                    # any number of them on each rank, also none
            accuracy.update_state(is_right(batch))
        print(accuracy.result(communicator))         # the same on every rank
    """

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        """Add values.

        Args:
            values: array, Tensor or number, one value for each example; every element counts.
            sample_weight: of each value, broadcast to their shape; 1 when None.

        Raises:
            ValueError: the weights don't broadcast to the values.
        """
        self._add(asnumpy(value_of(values)), sample_weight)


class Accuracy(_Average):
    """The share of examples whose largest logit is that of their label, kept as (sum, count)."""

    def update_state(self, labels: Any, logits: Any, sample_weight: Any = None) -> None:
        """Add examples.

        Args:
            labels: integers [n].
            logits: or probabilities, [n, classes].
            sample_weight: of each example; 1 when None.

        Raises:
            ValueError: shapes that don't fit.
        """
        right, scores = asnumpy(value_of(labels)), asnumpy(value_of(logits))
        if scores.ndim != 2 or right.shape != scores.shape[:1]:
            raise ValueError(
                f"labels must be [examples] and logits [examples, classes], got {right.shape} "
                f"and {scores.shape}"
            )
        self._add(scores.argmax(axis=1) == right if len(right) else right, sample_weight)


class PhaseClock:
    """Adds up the time that the phases of a step take, in seconds, on this process's clock.

    A phase lasts until the next `start`. Asynchronous devices are waited for by what ends a phase, so on
    a GPU the split between phases is by when the host gets on, not by kernels.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._began = 0.0

    def start(self, phase: str | None) -> None:
        """End the current phase and begin another; None begins none."""
        now = time.perf_counter()
        if self._phase is not None:
            self.add(self._phase, now - self._began)
        self._phase, self._began = phase, now

    def add(self, phase: str, seconds: float) -> None:
        """Count time for a phase; negative to move it to another one."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the sums so far and begin anew."""
        taken, self.seconds = self.seconds, {}
        return taken


class MetricsFile:
    """A file to which every record is added as one line of JSON, at once.

    Args:
        path: the file; None writes nothing.
        resumed_step: go on with an existing file (a resumed run), whose records of later steps are
            dropped: those steps are done again. None starts anew.
    """

    def __init__(self, path: Path | None, resumed_step: int | None = None) -> None:
        self._file: TextIO | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = "" if resumed_step is None or not path.exists() else _until(path, resumed_step)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        beside.write_text(kept, encoding="utf-8")
        beside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Add a record."""
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Progress:
    """Shows how training goes: a bar on a terminal, plain lines elsewhere, nothing when not shown.

    Args:
        total: number of the last step.
        done: number of steps done already.
        shown: whether this rank shows anything (rank 0 does).
        style: "bar", "lines", or "auto" for a bar where a person is watching.
        stream: where to; standard output when not given.

    Raises:
        ValueError: unknown style.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        shown: bool = True,
        style: str = "auto",
        stream: TextIO | None = None,
    ) -> None:
        if style not in ("auto", "bar", "lines"):
            raise ValueError(f"progress must be 'auto', 'bar' or 'lines', got {style!r}")
        self._stream = stream or sys.stdout
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None
        if shown and (style == "bar" or (style == "auto" and _is_watched(self._stream))):
            from rich import console, progress  # here, for it takes 50 ms to import

            self._bar = progress.Progress(
                progress.TextColumn("step"),
                progress.MofNCompleteColumn(),
                progress.BarColumn(),
                progress.TextColumn("{task.description}"),
                progress.TimeRemainingColumn(),
                console=console.Console(file=self._stream, force_terminal=True),
            )
            self._task = self._bar.add_task("", total=total, completed=done)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, number: int) -> None:
        """Note that a step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=number)

    def log(
        self,
        step: int,
        loss: float,
        learning_rate: float,
        examples_per_second: float,
        step_ms: float,
        exposed_ms: float,
    ) -> None:
        """Show the state at a logging step.

        Args:
            step: its number.
            loss: of the global batch.
            learning_rate: of the step.
            examples_per_second: over all ranks, since the last time.
            step_ms: a step's time since then, in milliseconds.
            exposed_ms: how much of it this rank spent in communication while it computed nothing.
        """
        text = (
            f"loss {loss:.4f}  lr {learning_rate:.5g}  {examples_per_second:,.0f} examples/s  "
            f"{step_ms:.1f} ms/step ({exposed_ms:.1f} exposed)"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.say(f"step {step}  {text}")

    def say(self, text: str) -> None:
        """Show a line."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def _until(path: Path, step: int) -> str:
    """Return the records up to a step; a last line that was cut off in writing goes too."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if line.endswith("\n") and record["step"] <= step:
            kept.append(line)
    return "".join(kept)


def _is_watched(stream: TextIO) -> bool:
    """Tell whether the stream ends on a terminal.

    Open MPI gives each rank a terminal of its own, wherever the launcher's output goes; so under a
    launcher it is the launcher's output that counts.
    """
    if not stream.isatty():
        return False
    if not any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")):
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))  # noqa: PTH115
    except OSError:  # not Linux, or the launcher is another user's: lines are never wrong
        return False
