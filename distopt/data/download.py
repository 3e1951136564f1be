"""Fetch one known file over HTTP, with a progress bar, checking it on the way."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from distopt.data.cifar10_files import KnownFile
from distopt.errors import DataError

__all__ = ["download"]

_STALL_SECONDS = 30.0
_PIECE = 1 << 18


def download(url: str, target: Path, known: KnownFile, progress: bool) -> None:
    """Download `url` to the file `target` and check its size and digest.

    Args:
        url: where it is. Proxies are taken from the environment, as urllib does.
        target: file to write; what is left of it after an error is the caller's to remove.
        known: the size and digest that it must have.
        progress: show a bar on the standard error.

    Raises:
        DataError: it can't be reached or written, stalls for 30 s, or is not what was expected.
    """
    # Both cost tens of milliseconds to import and are needed once in a data set's life.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as SpeedColumn

    digest = hashlib.new(known.algorithm, usedforsecurity=False)
    received = 0
    console = Console(stderr=True, quiet=not progress)
    if not console.is_terminal:
        console.print(f"downloading {url} ({known.size:,} bytes)", soft_wrap=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), SpeedColumn())
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    try:
        with (
            urllib.request.urlopen(url, timeout=_STALL_SECONDS) as response,
            target.open("wb") as file,
            bar,
        ):
            task = bar.add_task(known.name, total=known.size)
            while received <= known.size and (piece := response.read(_PIECE)):
                file.write(piece)
                digest.update(piece)
                received += len(piece)
                bar.update(task, completed=received)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise DataError(
            f"downloading {url} failed after {received:,} of {known.size:,} bytes: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if received != known.size or digest.hexdigest() != known.digest:
        size = f"{received:,}" if received <= known.size else f"more than {known.size:,}"
        raise DataError(
            f"what {url} sent is not {known.name}: found {size} bytes, {known.algorithm} "
            f"{digest.hexdigest()}; expected {known.what}"
        )
