"""The official files of CIFAR-10: their names, sizes and checksums, and how they are decoded.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The binary files hold
per image one label byte and 3,072 bytes, channel by channel; the Python files hold the same in a
pickle of Python 2. Nothing of a file is used before its size and checksum were compared, and
pickles are read without building any object that they name.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distopt.backend import Array
from distopt.data.dataset import Split
from distopt.errors import DataError

__all__ = [
    "CLASS_NAMES",
    "OFFICIAL",
    "KnownFile",
    "Release",
    "decode_binary",
    "decode_pickle",
    "file_digest",
    "read_archive",
    "verify",
]

CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_PIXELS = 3 * 32 * 32
_RECORD = 1 + _PIXELS


@dataclass(frozen=True)
class KnownFile:
    """A file whose content is known: its name, size in bytes, and digest."""

    name: str
    size: int
    algorithm: Literal["md5", "sha256"]
    digest: str

    @property
    def what(self) -> str:
        """Size and digest as a message shows them."""
        return f"{self.size:,} bytes, {self.algorithm} {self.digest}"


@dataclass(frozen=True)
class Release:
    """All that is known about a release of the data set in its two official forms."""

    url: str
    binary_archive: KnownFile
    python_archive: KnownFile
    binary: Mapping[Split, tuple[KnownFile, ...]]
    python: Mapping[Split, tuple[KnownFile, ...]]
    examples_per_file: int
    binary_folder: str = "cifar-10-batches-bin"
    python_folder: str = "cifar-10-batches-py"


def _binary(name: str, digest: str) -> KnownFile:
    return KnownFile(f"{name}.bin", 10_000 * _RECORD, "sha256", digest)


OFFICIAL = Release(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    binary_archive=KnownFile(
        "cifar-10-binary.tar.gz",
        170_052_171,
        "sha256",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    python_archive=KnownFile(
        "cifar-10-python.tar.gz",
        170_498_071,
        "sha256",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    binary={
        "train": (
            _binary("data_batch_1", "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
            _binary("data_batch_2", "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
            _binary("data_batch_3", "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
            _binary("data_batch_4", "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
            _binary("data_batch_5", "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
        ),
        "test": (_binary("test_batch", "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),),
    },
    python={
        "train": (
            KnownFile("data_batch_1", 31_035_704, "md5", "c99cafc152244af753f735de768cd75f"),
            KnownFile("data_batch_2", 31_035_320, "md5", "d4bba439e000b95fd0a9bffe97cbabec"),
            KnownFile("data_batch_3", 31_035_999, "md5", "54ebc095f3ab1f0389bbae665268c751"),
            KnownFile("data_batch_4", 31_035_696, "md5", "634d18415352ddfa80567beed471001a"),
            KnownFile("data_batch_5", 31_035_623, "md5", "482c414d41f54cd18b22e5b47cb7c3cb"),
        ),
        "test": (KnownFile("test_batch", 31_035_526, "md5", "40351d587109b95175f43aff81a1287e"),),
    },
    examples_per_file=10_000,
)
"""The release of 2009, as its home page at the University of Toronto offers it."""


def verify(data: bytes, known: KnownFile, where: str) -> None:
    """Compare a file's content with what is known about it.

    Args:
        data: the whole content.
        known: its size and digest.
        where: how messages call the file.

    Raises:
        DataError: it is short, long, or altered.
    """
    if len(data) != known.size:
        how = "short" if len(data) < known.size else "too long"
        raise DataError(
            f"{where} is {how}: found {len(data):,} bytes, expected {known.size:,} "
            f"({known.algorithm} {known.digest}). Delete it and fetch it again."
        )
    found = hashlib.new(known.algorithm, data, usedforsecurity=False).hexdigest()
    if found != known.digest:
        raise DataError(
            f"{where} is altered: found {known.algorithm} {found}, expected {known.digest} "
            f"(the size, {known.size:,} bytes, is right). Delete it and fetch it again."
        )


def file_digest(path: Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file, read in pieces."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def decode_binary(data: bytes, examples: int, where: str) -> tuple[Array, Array]:
    """Decode a binary file.

    Returns:
        Images, uint8 [examples, 3, 32, 32] as a view of `data`, and labels, uint8 [examples].

    Raises:
        DataError: the size does not fit.
    """
    if len(data) != examples * _RECORD:
        raise DataError(
            f"{where} has {len(data):,} bytes, expected {examples * _RECORD:,}: "
            f"{examples:,} records of {_RECORD:,} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(examples, _RECORD)
    return records[:, 1:].reshape(examples, 3, 32, 32), records[:, 0]


def decode_pickle(data: bytes, examples: int, where: str) -> tuple[Array, Array]:
    """Decode a Python file, a pickled dict, without running or building anything that it names.

    Returns:
        Images, uint8 [examples, 3, 32, 32], and labels, int64 [examples].

    Raises:
        DataError: it is no such pickle, or it names anything but a NumPy array.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            f"{where} is no CIFAR-10 batch: reading the pickle failed with {type(error).__name__}: {error}"
        ) from error
    if not isinstance(content, dict) or not {b"data", b"labels"} <= content.keys():
        raise DataError(
            f"{where} is no CIFAR-10 batch: expected a dict with b'data' and b'labels', "
            f"found {sorted(map(repr, content)) if isinstance(content, dict) else type(content)}"
        )
    pixels: Any = content[b"data"]
    labels: Any = content[b"labels"]
    if (
        not isinstance(pixels, _PickledArray)
        or pixels.description() != ((examples, _PIXELS), b"u1", False)
        or not isinstance(pixels.raw, bytes)
        or len(pixels.raw) != examples * _PIXELS
    ):
        found = pixels.description() if isinstance(pixels, _PickledArray) else type(pixels)
        raise DataError(
            f"{where}: b'data' must be a complete C-ordered uint8 array of shape "
            f"({examples}, {_PIXELS}), found {found}"
        )
    if (
        not isinstance(labels, list)
        or len(labels) != examples
        or not all(type(label) is int and 0 <= label < len(CLASS_NAMES) for label in labels)
    ):
        raise DataError(f"{where}: b'labels' must be a list of {examples} integers from 0 to 9")
    images = np.frombuffer(pixels.raw, np.uint8).reshape(examples, 3, 32, 32)
    return images, np.array(labels, np.int64)


class _PickledDtype:
    """Stands for `numpy.dtype` in a pickle; keeps the code only."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PickledArray:
    """Stands for `numpy.ndarray` in a pickle: what the file says, before anything is believed."""

    def __init__(self) -> None:
        self.shape: object = None
        self.dtype: object = None
        self.fortran: object = None
        self.raw: object = None

    def __setstate__(self, state: tuple[object, ...]) -> None:
        _, self.shape, self.dtype, self.fortran, self.raw = state

    def description(self) -> tuple[object, object, bool]:
        """Shape, dtype code, and whether it is in Fortran's order."""
        code = self.dtype.code if isinstance(self.dtype, _PickledDtype) else self.dtype
        return self.shape, code, bool(self.fortran)


def _reconstruct(kind: object, shape: object, code: object) -> _PickledArray:
    if kind is not _PickledArray:
        raise pickle.UnpicklingError(f"_reconstruct of {kind!r}, {shape!r}, {code!r}")
    return _PickledArray()


class _Unpickler(pickle.Unpickler):
    """Knows the three names that the official files hold; every other name is refused."""

    _known: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._known[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module_name}.{global_name}, which no official file does; nothing of it was run"
            ) from None


def read_archive(
    path: Path, archive: KnownFile, folder: str, members: Collection[KnownFile]
) -> dict[str, bytes]:
    """Read members of an official archive into memory; nothing is written, no path in it is used.

    Args:
        path: the `.tar.gz`.
        archive: what is known about it, for messages.
        folder: the folder in the archive that holds the members.
        members: the wanted files.

    Returns:
        Content by name, unchecked.

    Raises:
        DataError: the archive can't be read to its end, or lacks a member.
    """
    wanted = {f"{folder}/{member.name}": member for member in members}
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as tar:
            for entry in tar:
                member = wanted.get(entry.name.removeprefix("./"))
                file = tar.extractfile(entry) if member is not None and entry.isfile() else None
                if member is not None and file is not None:
                    content[member.name] = file.read(member.size + 1)
                if len(content) == len(wanted):
                    break
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path} can't be read ({type(error).__name__}: {error}). {_compare(path, archive)}"
        ) from error
    missing = [member.name for member in members if member.name not in content]
    if missing:
        raise DataError(
            f"{path} has no {folder}/{missing[0]} ({len(missing)} of {len(wanted)} files missing). "
            f"{_compare(path, archive)}"
        )
    return content


def _compare(path: Path, archive: KnownFile) -> str:
    """Say what an archive is and what it should be."""
    try:
        found = f"{path.stat().st_size:,} bytes, {archive.algorithm} " + file_digest(path, archive.algorithm)
    except OSError as error:
        found = f"nothing readable ({error})"
    return f"Found {found}; expected {archive.what}. Delete it and fetch it again."
