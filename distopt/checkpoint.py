"""Checkpoints: plain arrays in one safetensors file, written atomically, checked when read.

A file holds named arrays and a small JSON manifest with a SHA-256 of the arrays' bytes. It is written
beside its place, forced to the disk and renamed, so what has a checkpoint's name is complete. Nothing in
it depends on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from distopt.backend import Array
from distopt.errors import CheckpointError

__all__ = ["checkpoint_path", "digest_of", "latest", "load", "paths", "prune", "save"]

_FORMAT = "distopt-1"
_PREFIX = "checkpoint-"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint after `step` steps."""
    return folder / f"{_PREFIX}{step:08d}.safetensors"


def save(path: Path, arrays: Mapping[str, Array], manifest: Mapping[str, Any]) -> None:
    """Write arrays and a JSON-able manifest to `path`, completely or not at all.

    Raises:
        CheckpointError: the file can't be written.
    """
    # Not ascontiguousarray, which gives scalars an axis.
    ready = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    metadata = {
        "format": _FORMAT,
        "sha256": digest_of(ready),
        "manifest": json.dumps(dict(manifest), sort_keys=True),
    }
    data = to_safetensors(ready, metadata)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the rename may be lost with the power
        finally:
            os.close(folder)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(
            f"can't write {path}: {error}. Free space or choose another folder with --output."
        ) from error


def load(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays and the manifest of a file that `save` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or not one of distopt's.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; give the folder or file that training wrote")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or altered: {error}. Use an older checkpoint.") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has format {metadata.get('format')!r}, expected {_FORMAT!r}: another program wrote it"
        )
    found = digest_of(arrays)
    if found != metadata.get("sha256"):
        raise CheckpointError(
            f"{path} is altered: its arrays have SHA-256 {found}, the file says {metadata.get('sha256')}. "
            "Use an older checkpoint."
        )
    return arrays, json.loads(metadata["manifest"])


def latest(folder: Path) -> tuple[Path, dict[str, Array], dict[str, Any], list[str]] | None:
    """Return the newest checkpoint in a folder that can be read, or None where there is none.

    Returns:
        The file, its arrays and manifest, and why each newer file was passed over.

    Raises:
        CheckpointError: there are checkpoints, but none can be read; the message tells why for each.
    """
    problems: list[str] = []
    for path in reversed(paths(folder)):
        try:
            return (path, *load(path), problems)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("no checkpoint can be read:\n" + "\n".join(problems))
    return None


def paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; none where there is no such folder."""
    return sorted(folder.glob(f"{_PREFIX}*.safetensors"))


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a folder."""
    for path in paths(folder)[:-keep]:
        path.unlink(missing_ok=True)


def digest_of(arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256 of arrays, of their names, dtypes and shapes; NumPy arrays in any order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
