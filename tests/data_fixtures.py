"""Where the tests find the real CIFAR-10, which is not part of the repository."""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_PACKS = Path(__file__).resolve().parents[2] / "shared" / "data"


def find_real_cifar10() -> Path | str:
    """Return the folder with the official binary files, or the reason why there is none.

    First the folder that DISTOPT_DATA names; then the packs in `../shared/data` beside the
    repository, unpacked once into the system's temporary folder (2 s, needs Pillow with WebP).
    """
    if named := os.environ.get("DISTOPT_DATA"):
        for folder in (Path(named), Path(named) / "cifar-10-batches-bin"):
            if (folder / "test_batch.bin").is_file() and (folder / "data_batch_1.bin").is_file():
                return folder
    unpack = _PACKS / "c10unpack.py"
    if not unpack.is_file():
        return f"no real CIFAR-10: not in $DISTOPT_DATA ({named or 'not set'}), no {unpack}"
    if importlib.util.find_spec("PIL") is None:
        return f"the real CIFAR-10 in {_PACKS} needs Pillow to unpack"
    user = os.getuid() if hasattr(os, "getuid") else 0
    target = Path(tempfile.gettempdir()) / f"distopt-tests-cifar10-{user}"
    if not target.is_dir():
        # Renamed into place: test processes that run at once can't see half of it.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            unpacked = Path(scratch) / "cifar10"
            done = subprocess.run(
                [sys.executable, str(unpack), str(_PACKS / "cifar10"), str(unpacked)],
                capture_output=True,
                text=True,
            )
            if done.returncode != 0:
                return f"unpacking the real CIFAR-10 failed: {done.stderr.strip()[-300:]}"
            try:
                unpacked.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    return target


@pytest.fixture(scope="session")
def real_cifar10() -> Path:
    """The folder with the official binary files; skips where there is none."""
    found = find_real_cifar10()
    if isinstance(found, str):
        pytest.skip(found)
    return found
