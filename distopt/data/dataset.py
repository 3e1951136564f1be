"""A data set in memory: images, labels, and the names of the classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from distopt.backend import Array
from distopt.errors import DataError

__all__ = ["Dataset", "Split", "check_images", "require_finite"]

Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, checked when the object is made; the arrays become read-only views.

    Attributes:
        images: uint8 [N, height, width, channels].
        labels: int32 [N], each in [0, number of classes); any integer dtype is converted.
        class_names: one name per class.
        name: what messages call the data set, for instance "cifar10 train".

    Raises:
        TypeError: images are not uint8, or labels are not integers.
        ValueError: shapes don't fit, or a class list is empty.
        DataError: there is no example, a label is out of range, or an image is not finite.
    """

    images: Array
    labels: Array
    class_names: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        check_images(self.images, f"the images of {self.name}")
        count = len(self.images)
        if count == 0:
            raise DataError(f"{self.name} has no examples; at least one is needed")
        if self.images.size == 0:
            raise ValueError(f"the images of {self.name} have shape {self.images.shape}: no pixel at all")
        labels = np.asarray(self.labels)
        if labels.dtype.kind not in "iu":
            raise TypeError(f"the labels of {self.name} must be integers (class numbers), got {labels.dtype}")
        if labels.shape != (count,):
            raise ValueError(
                f"{self.name} has {count} images, so its labels must have shape ({count},), "
                f"got {labels.shape}"
            )
        if not self.class_names:
            raise ValueError(f"{self.name} needs the name of at least one class")
        classes = len(self.class_names)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if wrong.size:
            raise DataError(
                f"example {wrong[0]} of {self.name} has label {labels[wrong[0]]}, but its "
                f"{classes} classes are numbered 0 to {classes - 1} "
                f"({wrong.size} such example{'s' if wrong.size > 1 else ''})"
            )
        for field, array in (("images", self.images), ("labels", labels.astype(np.int32))):
            view = array.view()
            view.flags.writeable = False
            object.__setattr__(self, field, view)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        _, height, width, channels = self.images.shape
        return height, width, channels


def check_images(images: Array, what: str) -> None:
    """Raise unless `images` is a uint8 array [N, height, width, channels].

    Args:
        images: what to check.
        what: how the message calls them.

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions.
        DataError: float images that are not even finite.
    """
    if images.dtype != np.uint8:
        if images.dtype.kind == "f":
            require_finite(images, what)
        raise TypeError(
            f"{what} must be uint8 (0 to 255), got {images.dtype}; "
            "round and convert them with .astype(np.uint8)"
        )
    if images.ndim != 4:
        raise ValueError(f"{what} must have shape [examples, height, width, channels], got {images.shape}")


def require_finite(values: Array, what: str) -> None:
    """Raise unless all of `values` are finite.

    Args:
        values: float array whose first axis counts examples.
        what: how the message calls them.

    Raises:
        DataError: names the first example with a NaN or an infinity, and how many there are.
    """
    # The sum is finite only if every value is (it may overflow: then the slow look tells).
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum(dtype=np.float64)):
            return
    finite = np.isfinite(values)
    if finite.all():
        return
    rows = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
    first = values[rows[0]]
    raise DataError(
        f"{what}: example {rows[0]} holds {first[~finite[rows[0]]].flat[0]}; all values must be "
        f"finite ({rows.size} of {len(values)} examples are not). Remove or repair them."
    )
