"""What a checkpoint says of the training that wrote it, and whether another one may go on with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distopt.errors import CheckpointError

__all__ = ["WAYS", "check_manifest"]

_SAME = ("task", "global_batch", "seed", "data", "optimizer", "canonical")

WAYS = ("codec", "adasum", "delayed", "local_steps")
"""Settings that change what a training computes, and that nothing else of a checkpoint would tell."""


def check_manifest(path: Path, manifest: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Compare a checkpoint's manifest with that of the training that is to go on with it.

    Args:
        path: of the checkpoint, for messages.
        manifest: the checkpoint's.
        own: the training's.

    Raises:
        CheckpointError: it is of another task, batch, seed, model or way to combine ranks.
    """
    for key in _SAME:
        if manifest.get(key) != own[key]:
            raise CheckpointError(
                f"{path} was trained with {key} {manifest.get(key)!r}, this run has {own[key]!r}. "
                "Use the same, or another --output."
            )
    for key in WAYS:
        if manifest.get(key, own[key]) != own[key]:  # older checkpoints don't tell
            raise CheckpointError(
                f"{path} was written with {_as_option(key, manifest[key])}, this run has "
                f"{_as_option(key, own[key])}: it would go on as another training. Use the same, or "
                "another --output."
            )


def _as_option(name: str, value: Any) -> str:
    """Return how the command line says a setting, as in `--codec int8`, `--adasum` or `no --adasum`."""
    option = "--" + name.replace("_", "-")
    if value is None or value is False:
        return f"no {option}"
    return option if value is True else f"{option} {value}"
