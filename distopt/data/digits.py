"""1,797 handwritten digits of 8x8 pixels, shipped inside the package: a real data set in no time.

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0; `digits.md` beside the file
tells more.
"""

from __future__ import annotations

import gzip
import hashlib
from importlib import resources

import numpy as np

from distopt.data.dataset import Dataset, Split
from distopt.errors import DataError

__all__ = ["load"]

_FILE = "digits.csv.gz"
_SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
_TEST_EVERY = 5


def load(split: Split) -> Dataset:
    """Load a split of the digits.

    The split is fixed and even over the classes: with the examples in the order of their class (and
    of the file within it), every fifth one, from the first on, is a test example. Both splits keep
    the order of the file. It is no split by writer: the same 13 people wrote both parts, so
    accuracies are higher than on the 3,823 images by others that UCI offers for training.

    Args:
        split: "train" (1,437 examples) or "test" (360).

    Returns:
        Images uint8 [N, 8, 8, 1] with values from 0 to 16, labels int32 and the ten class names.

    Raises:
        ValueError: `split` is neither of the two.
        DataError: the installed file is missing or damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    file = resources.files("distopt.data") / _FILE
    repair = "Install distopt again."
    try:
        packed = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror or error}. {repair}") from error
    found = hashlib.sha256(packed).hexdigest()
    if found != _SHA256:
        raise DataError(
            f"{file} is damaged: found {len(packed):,} bytes, sha256 {found}, expected sha256 "
            f"{_SHA256}. {repair}"
        )
    lines = gzip.decompress(packed).decode("ascii").splitlines()
    table = np.loadtxt(lines, dtype=np.uint8, delimiter=",")
    by_class = np.argsort(table[:, 64], kind="stable")
    is_test = np.zeros(len(table), bool)
    is_test[by_class[::_TEST_EVERY]] = True
    chosen = table[is_test if split == "test" else ~is_test]
    images = chosen[:, :64].reshape(-1, 8, 8, 1)
    names = tuple(str(digit) for digit in range(10))
    return Dataset(images, chosen[:, 64], names, f"digits {split}")
