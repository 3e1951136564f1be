"""Text tables that look the same on a terminal, in a log and in a README."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["text_table"]


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines with columns as wide as their longest cell; the first is flush left, others right.

    Raises:
        ValueError: a row has more or fewer cells than there are headers.
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"a row needs {len(headers)} cells, got {len(row)}: {list(row)}")
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (headers, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(lines)
