"""CIFAR-10: 50,000 training and 10,000 test images, found, checked, or downloaded.

`load` looks in a folder for the official binary files, the official Python files, or either
official archive, in that order, and downloads the binary archive where there is none of them. Run

    python -m distopt.data.cifar10 --data-dir D

to see what a folder holds, and with `--download` to fill it, for instance on a cluster's login
node.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from distopt.backend import Array
from distopt.data.cifar10_files import (
    CLASS_NAMES,
    OFFICIAL,
    KnownFile,
    Release,
    decode_binary,
    decode_pickle,
    file_digest,
    read_archive,
    verify,
)
from distopt.data.dataset import Dataset, Split
from distopt.data.download import download as download_file
from distopt.errors import DataError

__all__ = ["Ranks", "Source", "default_data_dir", "fetch", "find", "load", "main"]

T = TypeVar("T")

_SPLITS: tuple[Split, Split] = ("train", "test")


class Ranks(Protocol):
    """What `load` needs of a communicator."""

    @property
    def rank(self) -> int:
        """Number of this rank."""
        ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def local_rank(self) -> int:
        """Number of this rank on its host."""
        ...

    @property
    def host(self) -> str:
        """Name of this rank's host."""
        ...

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Give every rank the objects of all ranks, in their order."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a split was found: its form, the files to read, and the archive they are in, if any."""

    form: Literal["binary", "python"]
    folder: Path
    files: tuple[KnownFile, ...]
    archive: KnownFile | None = None

    def __str__(self) -> str:
        if self.archive is not None:
            return str(self.folder / self.archive.name)
        return f"{self.folder} ({self.form} files)"


def default_data_dir() -> Path:
    """Return the folder that is used where none is named.

    The environment variable DISTOPT_DATA; else `distopt` in XDG_CACHE_HOME or in `~/.cache`.
    """
    if named := os.environ.get("DISTOPT_DATA"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "distopt"


def load(
    split: Split,
    data_dir: str | Path | None = None,
    communicator: Ranks | None = None,
    download: bool = True,
    progress: bool = True,
    check: bool = True,
) -> Dataset:
    """Load a split of CIFAR-10 in the official order.

    Collective where a communicator is given: rank 0 looks first and downloads if need be, then one
    rank of each other host where the files are not visible there, then every rank reads. After each
    of these all ranks compare notes, so either all return or all raise, and none waits for one that
    failed.

    Args:
        split: "train" or "test".
        data_dir: folder with the official files or archives, or their usual subfolders; None takes
            `default_data_dir()`.
        communicator: the job's, or None for this process alone.
        download: fetch the official archive where nothing is found.
        progress: rank 0 shows a bar while downloading.
        check: compare sizes and checksums. Without it, only the structure is checked.

    Returns:
        Images uint8 [50000 or 10000, 32, 32, 3], labels int32 and the ten class names.

    Raises:
        ValueError: `split` is neither of the two.
        DataError: on every rank: a file is missing, short or altered, or can't be downloaded.
    """
    if split not in _SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    rank = communicator.rank if communicator else 0
    local_rank = communicator.local_rank if communicator else 0

    def provide() -> None:
        if find(split, root) is None:
            if not download:
                raise DataError(f"CIFAR-10 was not found in {root}. {_what_to_put_where(root)}")
            fetch(root, progress and rank == 0)

    def read() -> Dataset:
        source = find(split, root)
        if source is None:
            raise DataError(
                f"CIFAR-10 was not found in {root}, though another process of this host has just "
                f"seen it there; is it another file system? {_what_to_put_where(root)}"
            )
        return _read(source, split, check)

    # Rank 0 alone first: on a file system that all hosts share, the others then find its files.
    _agree(communicator, provide if rank == 0 else None)
    _agree(communicator, provide if local_rank == 0 and rank != 0 else None)
    return _agree(communicator, read)


def _agree(communicator: Ranks | None, action: Callable[[], T] | None) -> T:
    """Run an action on the ranks that have one; where any of them fails, raise on all."""
    result: Any = None
    failure: Exception | None = None
    try:
        if action is not None:
            result = action()
    except Exception as error:  # the other ranks must hear of it, whatever it is
        if communicator is None or communicator.size == 1:
            raise
        failure = error
    if communicator is not None:
        report = None
        if failure is not None:
            kind = "" if isinstance(failure, DataError) else f"{type(failure).__name__}: "
            report = f"rank {communicator.rank} on host {communicator.host}: {kind}{failure}"
        reports = communicator.all_gather_object(report)
        first = next((report for report in reports if report is not None), None)
        if first is not None:
            raise DataError(first) from failure
    return result  # type: ignore[no-any-return]


def find(split: Split, data_dir: Path) -> Source | None:
    """Look for a split in a folder, by the names of files; their content is not read.

    Returns:
        The first complete source, in the order binary files, Python files, archives; None where
        there is no official file at all.

    Raises:
        DataError: there are some of the files of a form, but not all that the split needs.
    """
    release = OFFICIAL
    forms: tuple[tuple[Literal["binary", "python"], Any, str, KnownFile], ...] = (
        ("binary", release.binary, release.binary_folder, release.binary_archive),
        ("python", release.python, release.python_folder, release.python_archive),
    )
    incomplete: str | None = None
    for form, files, subfolder, _ in forms:
        for folder in (data_dir, data_dir / subfolder):
            missing = [file for file in files[split] if not (folder / file.name).is_file()]
            if not missing:
                return Source(form, folder, files[split])
            if any((folder / file.name).is_file() for part in _SPLITS for file in files[part]):
                incomplete = incomplete or (
                    f"{folder / missing[0].name} is missing: expected {missing[0].what} "
                    f"({len(missing)} of the {len(files[split])} {form} files of the {split} "
                    "split are missing). Complete the folder, or empty it to download them."
                )
    for form, files, _, archive in forms:
        if (data_dir / archive.name).is_file():
            return Source(form, data_dir, files[split], archive)
    if incomplete is not None:
        raise DataError(incomplete)
    return None


def _read(source: Source, split: Split, check: bool) -> Dataset:
    """Read, check and decode the files of a source."""
    release = OFFICIAL
    examples = release.examples_per_file
    decode = decode_binary if source.form == "binary" else decode_pickle
    content: dict[str, bytes] = {}
    place = source.folder
    if source.archive is not None:
        place = source.folder / source.archive.name
        inside = release.binary_folder if source.form == "binary" else release.python_folder
        content = read_archive(place, source.archive, inside, source.files)
    count = examples * len(source.files)
    images = np.empty((count, 32, 32, 3), np.uint8)
    labels = np.empty(count, np.int32)
    for number, known in enumerate(source.files):
        where = str(place / known.name)
        data = content.pop(known.name) if source.archive else _read_file(place / known.name)
        if check:
            verify(data, known, where)
        file_images, file_labels = decode(data, examples, where)
        part = slice(number * examples, (number + 1) * examples)
        _to_channels_last(file_images, images[part])
        labels[part] = file_labels
    return Dataset(images, labels, CLASS_NAMES, f"CIFAR-10 {split}")


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from error


def _to_channels_last(images: Array, out: Array) -> None:
    """Copy [n, c, h, w] to [n, h, w, c]."""
    for channel in range(images.shape[1]):
        out[..., channel] = images[:, channel]


def fetch(data_dir: Path, progress: bool = True) -> None:
    """Download the official archive, check it, and unpack its binary files into a folder.

    The subfolder appears all at once, complete and checked: it is unpacked beside and then renamed.
    Where another job was faster, its files are kept and these are thrown away.

    Raises:
        DataError: no network, no space, no permission, or a wrong checksum; it says which files to
            put where instead.
    """
    release = OFFICIAL
    files = release.binary["train"] + release.binary["test"]
    target = data_dir / release.binary_folder
    temporary: Path | None = None
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".cifar-10-", dir=data_dir))
        archive = temporary / release.binary_archive.name
        download_file(release.url, archive, release.binary_archive, progress)
        content = read_archive(archive, release.binary_archive, release.binary_folder, files)
        unpacked = temporary / release.binary_folder
        unpacked.mkdir()
        for known in files:
            verify(content[known.name], known, f"{known.name} of {release.url}")
            with (unpacked / known.name).open("wb") as file:
                file.write(content[known.name])
                file.flush()
                os.fsync(file.fileno())
        try:
            unpacked.rename(target)
        except OSError:
            # Another job's folder is there already, or renaming failed for good.
            if any(not (target / known.name).is_file() for known in files):
                raise
    except (DataError, OSError) as error:
        what = str(error).rstrip(".")
        raise DataError(
            f"CIFAR-10 is not in {data_dir} and could not be put there: {what}. "
            f"{_what_to_put_where(data_dir)}"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _what_to_put_where(data_dir: Path) -> str:
    release = OFFICIAL
    return (
        f"Put {release.binary_archive.name} (from {release.url}; {release.binary_archive.what}), "
        f"or {release.python_archive.name}, or the files of either, into {data_dir}; "
        "or name the folder that has them with --data-dir or the environment variable DISTOPT_DATA."
    )


def _inspect(data_dir: Path) -> list[tuple[Path, str]]:
    """Return every official file that a folder holds and its state, "ok" or what is wrong."""
    release = OFFICIAL
    places: list[tuple[Path, KnownFile]] = []
    for files, subfolder in (
        (release.binary, release.binary_folder),
        (release.python, release.python_folder),
    ):
        for folder in (data_dir, data_dir / subfolder):
            places += [(folder / known.name, known) for split in _SPLITS for known in files[split]]
    places += [(data_dir / known.name, known) for known in _archives(release)]
    result: list[tuple[Path, str]] = []
    for path, known in places:
        if path.is_file():
            size = path.stat().st_size
            if size != known.size:
                state = f"found {size:,} bytes, expected {known.size:,}"
            elif (found := file_digest(path, known.algorithm)) != known.digest:
                state = f"found {known.algorithm} {found}, expected {known.digest}"
            else:
                state = "ok"
            result.append((path, state))
    return result


def _archives(release: Release) -> tuple[KnownFile, KnownFile]:
    return release.binary_archive, release.python_archive


def main(arguments: Sequence[str] | None = None) -> int:
    """Check a folder and print what it holds; return 0 where both splits can be loaded."""
    parser = argparse.ArgumentParser(
        prog="python -m distopt.data.cifar10", description="Check the files of CIFAR-10."
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"folder to look in (now, where it is not given: {default_data_dir()})",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the official archive if nothing is found"
    )
    options = parser.parse_args(arguments)
    root: Path = (options.data_dir or default_data_dir()).expanduser()
    for path, state in _inspect(root):
        print(f"{path}: {state}")
    code = 0
    for split in _SPLITS:
        try:
            dataset = load(split, root, download=options.download)
            per_class = np.bincount(dataset.labels, minlength=len(CLASS_NAMES))
            print(
                f"{split}: {len(dataset):,} examples, {per_class.min():,} to {per_class.max():,} "
                f"per class, from {find(split, root)}"
            )
        except DataError as error:
            print(f"{split}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
