"""The input of the CIFAR-10 tutorial: crop, flip, brightness, contrast, standardisation.

Brightness x + b, contrast f (x - m) + m about the mean m of each channel, and standardisation
(x - M) / max(S, 1 / sqrt(n)) are all affine in the pixel, so an image needs its channels' moments
once and then one multiplication and one addition per value. The moments are sums of integers
(pixels minus 128), exact in whichever order they are added: with elementwise arithmetic after them,
an image is the same bits in a batch of any size. All random numbers come from (seed, epoch, example
index), so it is also the same bits on any number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from distopt.backend import Array, memory_pool
from distopt.counter_random import stream, uniform
from distopt.data.dataset import check_images

__all__ = ["DIGITS", "TUTORIAL", "Augmentation"]

_STREAM = stream("distopt.augment")
_DRAWS = 5  # row, column, flip, brightness, contrast: always all, so settings don't shift each other
_PIECE_BYTES = 512 * 1024  # of float32 results at a time: they stay in a core's L2 cache
_CENTRE = 128
_EXACT_ROWS = 1024  # up to here a column's sum of squares, at most 2**14 each, is exact in float32


@dataclass(frozen=True)
class Augmentation:
    """How images become the input of a model, in training and in evaluation.

    The order is TensorFlow's: pad, crop, flip, brightness, contrast, standardise. Values are not
    clipped to [0, 255] in between, as TensorFlow doesn't clip float images. Note that
    standardisation takes brightness out again: it matters only where `standardise` is off (the
    tutorial has both).

    Attributes:
        crop: height and width of the result; None keeps the image's.
        pad: zeros added on each side before the crop, in training only: with `crop=None` the image
            is shifted by up to `pad` pixels.
        flip: mirror left-right with probability one half.
        max_brightness: b is uniform in [-max_brightness, max_brightness).
        contrast_range: f is uniform in [low, high); None leaves contrast alone.
        standardise: mean 0 and variance 1 over each image. The population's deviation is taken, and
            at least 1 / sqrt(number of values), as in `tf.image.per_image_standardization`.

    Raises:
        ValueError: a field is out of its range.
    """

    crop: int | None = 24
    pad: int = 0
    flip: bool = True
    max_brightness: float = 63.0
    contrast_range: tuple[float, float] | None = (0.2, 1.8)
    standardise: bool = True

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"crop must be at least 1 pixel, or None, got {self.crop}")
        if self.pad < 0:
            raise ValueError(f"pad must not be negative, got {self.pad}")
        if not 0 <= self.max_brightness < math.inf:
            raise ValueError(f"max_brightness must be finite and not negative, got {self.max_brightness}")
        if self.contrast_range is not None:
            low, high = self.contrast_range
            if not 0 <= low <= high < math.inf:
                raise ValueError(
                    f"contrast_range must be (low, high) with 0 <= low <= high, got {self.contrast_range}"
                )

    def output_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return height, width and channels of the results for images of this shape.

        Raises:
            ValueError: the image is smaller than the crop.
        """
        height, width, channels = image_shape
        if self.crop is None:
            return height, width, channels
        if min(height, width) < self.crop:
            raise ValueError(
                f"a crop of {self.crop}x{self.crop} does not fit in images of {height}x{width}; "
                "choose a smaller one"
            )
        return self.crop, self.crop, channels

    def train(
        self, images: Array, epochs: Array, indices: Array, seed: int, out: Array | None = None
    ) -> Array:
        """Augment a batch for training.

        Args:
            images: uint8 [B, height, width, channels]; B may be 0. Not modified.
            epochs: integers [B], each example's epoch (see `Sampler.batch`).
            indices: integers [B], each example's index in the data set.
            seed: of the run, in [0, 2**64).
            out: where to write, float32 [B, *output_shape], C-contiguous; None takes it from the
                pool.

        Returns:
            float32 [B, *output_shape].

        Raises:
            TypeError: images are not uint8, or out is not float32.
            ValueError: shapes don't fit.
        """
        out = self._prepare(images, out)
        count, height, width, _ = images.shape
        if np.shape(epochs) != (count,) or np.shape(indices) != (count,):
            raise ValueError(
                f"{count} images need epochs and indices of shape ({count},), "
                f"got {np.shape(epochs)} and {np.shape(indices)}"
            )
        draws = uniform(seed, _STREAM, epochs, indices, _DRAWS).astype(np.float64)
        rows = (draws[:, 0] * (height + 2 * self.pad - out.shape[1] + 1)).astype(np.intp)
        columns = (draws[:, 1] * (width + 2 * self.pad - out.shape[2] + 1)).astype(np.intp)
        flipped = draws[:, 2] < 0.5 if self.flip else None
        brightness = (2.0 * draws[:, 3] - 1.0) * self.max_brightness
        contrast = None
        if self.contrast_range is not None:
            low, high = self.contrast_range
            contrast = low + draws[:, 4] * (high - low)
        for piece in _pieces(out):
            pixels = _windows(images[piece], self.pad, rows[piece], columns[piece], out.shape)
            if flipped is not None:
                _mirror(pixels, np.flatnonzero(flipped[piece]), out.shape[3])
            self._affine(
                pixels,
                out[piece],
                brightness[piece],
                None if contrast is None else contrast[piece],
            )
        return out

    def evaluate(self, images: Array, out: Array | None = None) -> Array:
        """Prepare a batch for evaluation: the central crop, standardised; nothing random.

        Args, result and errors are those of `train`.
        """
        out = self._prepare(images, out)
        count, height, width, _ = images.shape
        rows = np.full(count, (height - out.shape[1]) // 2)
        columns = np.full(count, (width - out.shape[2]) // 2)
        unchanged = np.zeros(count)
        for piece in _pieces(out):
            pixels = _windows(images[piece], 0, rows[piece], columns[piece], out.shape)
            self._affine(pixels, out[piece], unchanged[piece], None)
        return out

    def _prepare(self, images: Array, out: Array | None) -> Array:
        """Check the batch and return the array for its results."""
        check_images(images, "images to augment")
        _, height, width, channels = images.shape
        shape = (len(images), *self.output_shape((height, width, channels)))
        if out is None:
            return memory_pool.empty(shape, np.float32)
        if out.dtype != np.float32:
            raise TypeError(f"out must be float32, got {out.dtype}")
        if out.shape != shape or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous with shape {shape}, got shape {out.shape}"
                f"{'' if out.flags.c_contiguous else ', not contiguous'}"
            )
        return out

    def _affine(self, pixels: Array, out: Array, brightness: Array, contrast: Array | None) -> None:
        """Write scale * pixel + shift: uint8 [b, h, w * c] to float32 [b, h, w, c].

        All float64 arithmetic here is elementwise or in an order that is written out.
        """
        values = out.reshape(pixels.shape)
        if contrast is None and not self.standardise:
            np.add(pixels, brightness.astype(np.float32)[:, None, None], out=values)
            return
        np.subtract(pixels, np.float32(_CENTRE), out=values)
        channels = out.shape[3]
        count = out.shape[1] * out.shape[2]
        mean, variance = _moments(values, channels)
        factor = np.ones(len(out)) if contrast is None else contrast
        shift = (1.0 - factor)[:, None] * mean
        scale = factor
        if self.standardise:
            overall = _channel_mean(mean)
            within = _channel_mean(variance)
            between = _channel_mean((mean - overall[:, None]) ** 2)
            deviation = np.sqrt(factor * factor * within + between)
            deviation = np.maximum(deviation, 1.0 / math.sqrt(count * channels))
            scale = factor / deviation
            shift = (shift - overall[:, None]) / deviation[:, None]
        else:
            shift = shift + (brightness + _CENTRE)[:, None]
        values *= scale.astype(np.float32)[:, None, None]
        values += np.tile(shift.astype(np.float32), (1, out.shape[2]))[:, None, :]


TUTORIAL = Augmentation()
"""The CIFAR-10 tutorial's: 24x24 crop, flip, brightness, contrast, standardised."""

DIGITS = Augmentation(crop=None, pad=1, flip=False, max_brightness=0.0, contrast_range=None)
"""For the 8x8 digits: shifted by up to one pixel, standardised."""


def _pieces(out: Array) -> list[slice]:
    """Cut a batch into slices whose results stay in the cache."""
    length = max(1, _PIECE_BYTES // max(1, out[:1].nbytes))
    return [slice(begin, begin + length) for begin in range(0, len(out), length)]


def _windows(images: Array, pad: int, rows: Array, columns: Array, shape: tuple[int, ...]) -> Array:
    """Copy one window of each image, from its (row, column) on: uint8 [b, h, w * c]."""
    count, height, width, channels = images.shape
    if pad:
        padded = np.zeros((count, height + 2 * pad, width + 2 * pad, channels), np.uint8)
        padded[:, pad:-pad, pad:-pad] = images
        images = padded
    images = np.ascontiguousarray(images)
    per_image, per_row, per_pixel, per_value = images.strides
    _, window_height, window_width, _ = shape
    # Every window of every image, as a view; the index arrays pick one each in a single copy.
    every = np.lib.stride_tricks.as_strided(
        images,
        shape=(
            count,
            images.shape[1] - window_height + 1,
            images.shape[2] - window_width + 1,
            window_height,
            window_width * channels,
        ),
        strides=(per_image, per_row, per_pixel, per_row, per_value),
        writeable=False,
    )
    return every[np.arange(count), rows, columns]  # type: ignore[no-any-return]


def _mirror(pixels: Array, chosen: Array, channels: int) -> None:
    """Reverse the columns of the chosen images in place; pixels is uint8 [b, h, w * c]."""
    columns = np.arange(pixels.shape[2]).reshape(-1, channels)[::-1].reshape(-1)
    pixels[chosen] = np.take(pixels[chosen], columns, axis=2)


def _moments(values: Array, channels: int) -> tuple[Array, Array]:
    """Return mean and population variance of each channel, float64 [b, c].

    `values` are integers in [-128, 127], float32 [b, h, w * c]. The sums below are exact, so their
    order, which NumPy chooses by the shape of the batch, does not matter.
    """
    count, height, width = len(values), values.shape[1], values.shape[2] // channels
    exact = np.float32 if height <= _EXACT_ROWS else np.float64
    columns = np.add.reduce(values, axis=1, dtype=exact)
    squares = np.einsum("bhk,bhk->bk", values, values, dtype=exact)
    by_channel = (count, width, channels)
    sums = columns.reshape(by_channel).sum(axis=1, dtype=np.float64)
    sums_of_squares = squares.reshape(by_channel).sum(axis=1, dtype=np.float64)
    pixels = float(height * width)
    variance = (sums_of_squares * pixels - sums * sums) / (pixels * pixels)
    return sums / pixels, variance


def _channel_mean(values: Array) -> Array:
    """Return the mean over channels, [b, c] -> [b], added from the first channel to the last."""
    total = values[:, 0].copy()
    for channel in range(1, values.shape[1]):
        total += values[:, channel]
    return total / values.shape[1]
