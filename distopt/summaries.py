"""Summaries, and writers for them: JSON lines, and TensorBoard where `tensorboardX` is installed.

    with JsonLinesWriter("run/summaries.jsonl") as writer:
        for number, batch in enumerate(batches, 1):
            train_op(batch)  # `optimize_loss` keeps summaries
            summaries.scalar("batch_size", len(batch))
            if number % 100 == 0:
                writer.add_summary(merge_all(), number)

Every rank holds the same global values, so only one needs to write.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np

from distopt.backend import Array
from distopt.scopes.summaries import Summary, histogram, merge_all, scalar

__all__ = [
    "JsonLinesWriter",
    "Summary",
    "SummaryWriter",
    "TensorBoardWriter",
    "histogram",
    "merge_all",
    "scalar",
]

_BINS = 30


class SummaryWriter(ABC):
    """What writers have in common; a context manager that closes them."""

    def add_summary(self, summary: Summary | Iterable[Summary], global_step: Any = None) -> None:
        """Write summaries (waits for the GPU).

        Args:
            summary: what `merge_all`, `scalar` or `histogram` returned.
            global_step: number or Variable: the step that they belong to.
        """
        summaries = [summary] if isinstance(summary, Summary) else list(summary)
        self._write(summaries, None if global_step is None else int(float(global_step)))

    @abstractmethod
    def _write(self, summaries: list[Summary], step: int | None) -> None: ...

    @abstractmethod
    def flush(self) -> None:
        """Hand everything written so far to the operating system."""

    @abstractmethod
    def close(self) -> None:
        """Write what is left, and close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class JsonLinesWriter(SummaryWriter):
    """Adds one line of JSON for each call: step, wall_time (seconds since 1970), and a value per tag.

    A scalar is a number. A histogram is a record: count, not_finite (how many of them are NaN or infinite),
    and of the finite ones min, max, mean, std, and counts between edges. Numbers that JSON has not are the
    strings "nan", "inf" and "-inf".

    Args:
        path: the file, whose folder is made; an existing file is continued.
    """

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)

    def _write(self, summaries: list[Summary], step: int | None) -> None:
        record: dict[str, Any] = {"step": step, "wall_time": time.time()}
        for summary in summaries:
            value = summary.numpy()
            record[summary.tag] = _number(value) if summary.kind == "scalar" else _described(value)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """See `SummaryWriter.flush`."""
        self._file.flush()

    def close(self) -> None:
        """See `SummaryWriter.close`."""
        self._file.close()


class TensorBoardWriter(SummaryWriter):
    """Writes TensorBoard's event files by the package `tensorboardX`, the extra "tensorboard".

    Args:
        folder: where the files go, TensorBoard's --logdir.

    Raises:
        ImportError: `tensorboardX` is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from tensorboardX import SummaryWriter as Events
        except ImportError as error:
            raise ImportError(
                "TensorBoardWriter needs the package tensorboardX, which is not installed. Install it with "
                "pip install 'distopt[tensorboard]', or use JsonLinesWriter, which needs nothing."
            ) from error
        self._events: Any = Events(str(folder))

    def _write(self, summaries: list[Summary], step: int | None) -> None:
        for summary in summaries:
            value = summary.numpy().astype(np.float64)
            if summary.kind == "scalar":
                self._events.add_scalar(summary.tag, float(value), step)
            elif (finite := value[np.isfinite(value)]).size:
                self._events.add_histogram(summary.tag, finite, step)

    def flush(self) -> None:
        """See `SummaryWriter.flush`."""
        self._events.flush()

    def close(self) -> None:
        """See `SummaryWriter.close`."""
        self._events.close()


def _number(value: Any) -> float | int | str:
    number: float | int = value.item() if value.dtype.kind in "iub" else float(value)
    return number if math.isfinite(number) else str(number)


def _described(values: Array) -> dict[str, Any]:
    wide = values.astype(np.float64).reshape(-1)
    finite = wide[np.isfinite(wide)]
    record: dict[str, Any] = {"count": wide.size, "not_finite": wide.size - finite.size}
    if finite.size:
        counts, edges = np.histogram(finite, _BINS)
        record |= {
            "min": float(finite.min()),
            "max": float(finite.max()),
            "mean": float(finite.mean()),
            "std": float(finite.std()),
            "counts": counts.tolist(),
            "edges": edges.tolist(),
        }
    return record
