"""Rows of a table gathered, beside the whole table summed, and which of them is chosen. Runs on all ranks."""

from __future__ import annotations

from typing import Any

import numpy as np

from distopt.aggregators import AllReduce
from distopt.backend import Device
from distopt.bench.report import environment, interleave, summarize, write_json
from distopt.bench.tables import text_table
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Variable

__all__ = ["main", "measure"]


def measure(
    communicator: Communicator, device: Device, rows: int, width: int, parts: list[float], rounds: int
) -> list[dict[str, Any]]:
    """Time the exchange of a part of a table's rows in each way, in turns. Collective.

    Args:
        communicator: the ranks.
        device: of this rank.
        rows: of the table.
        width: float32 numbers in a row.
        parts: which part of the rows each rank has a gradient of, drawn at random by rank.
        rounds: one exchange in each way in each.

    Returns:
        For each part: "rows", "dense" and "auto" (summaries of seconds on this rank, local and global
        deduplication included), and "chosen" by "auto".
    """
    found: list[dict[str, Any]] = []
    table = Variable(np.zeros((rows, width), np.float32), name="table", device=device)
    ways = {mode: AllReduce(communicator, "sum", sparse=mode) for mode in ("rows", "dense", "auto")}
    for part in parts:
        random = np.random.default_rng(communicator.rank)
        count = max(1, int(part * rows))
        values = device.asarray(random.standard_normal((count, width)).astype(np.float32))
        slices = IndexedSlices(values, device.asarray(random.integers(0, rows, count)), table.shape)

        def exchange(mode: str, slices: IndexedSlices = slices) -> None:
            ways[mode].reduce([(slices, table)])
            device.synchronize()

        seconds = interleave({mode: lambda mode=mode: exchange(mode) for mode in ways}, rounds)
        found.append(
            {
                "part": part,
                **{mode: summarize(values) for mode, values in seconds.items()},
                "chosen": ways["auto"].sparse.chosen["table"],
            }
        )
    return found


def main(
    communicator: Communicator, device: Device, rows: int, width: int, rounds: int, path: str | None
) -> None:
    """Measure on all ranks; rank 0 prints a table and writes the results to a JSON file."""
    parts = [0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0]
    found = measure(communicator, device, rows, width, parts, rounds)
    if communicator.rank:
        return
    lines = [
        [
            f"{100 * one['part']:g} %",
            *(f"{1000 * one[mode]['least']:.3f}" for mode in ("rows", "dense", "auto")),
            one["chosen"],
        ]
        for one in found
    ]
    print(f"{communicator.size} rank(s), a table of {rows} x {width} float32, least ms on rank 0")
    print(text_table(["rows of each rank", "rows", "dense", "auto", "chosen"], lines))
    write_json({"environment": environment(), "rows": rows, "width": width, "sparse": found}, path)
