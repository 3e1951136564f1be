import dataclasses

import numpy as np
import pytest

from distopt.counter_random import stream, uniform
from distopt.data import DIGITS, TUTORIAL, Augmentation
from distopt.data.augment import _moments
from distopt.errors import DataError

SEED = 7
PLAIN = Augmentation(crop=None, flip=False, max_brightness=0.0, contrast_range=None, standardise=False)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (43, 32, 32, 3), dtype=np.uint8)


def positions(count):
    return np.arange(count) % 3, 1000 + np.arange(count)


def reference(setting, image, draws):
    """One image, step by step in float64, in the words of the tutorial."""
    values = np.pad(image.astype(np.float64), ((setting.pad,) * 2, (setting.pad,) * 2, (0, 0)))
    size = setting.crop or len(image)
    row, column = (int(u * (len(values) - size + 1)) for u in draws[:2])
    values = values[row : row + size, column : column + size]
    if setting.flip and draws[2] < 0.5:
        values = values[:, ::-1]
    values = values + setting.max_brightness * (2 * draws[3] - 1)
    if setting.contrast_range:
        low, high = setting.contrast_range
        mean = values.mean(axis=(0, 1))
        values = (values - mean) * (low + draws[4] * (high - low)) + mean
    if setting.standardise:
        values = (values - values.mean()) / max(values.std(), 1 / np.sqrt(values.size))
    return values


@pytest.mark.parametrize(
    "setting",
    [
        TUTORIAL,
        dataclasses.replace(TUTORIAL, standardise=False),
        dataclasses.replace(TUTORIAL, contrast_range=None, standardise=False),
        dataclasses.replace(TUTORIAL, contrast_range=None),
        dataclasses.replace(TUTORIAL, contrast_range=(0.0, 0.0), max_brightness=5.0),
        dataclasses.replace(TUTORIAL, crop=32, pad=4),
        dataclasses.replace(TUTORIAL, crop=1, standardise=False),
        DIGITS,
        PLAIN,
    ],
)
def test_training_images_equal_the_tutorials_steps_one_after_the_other(images, setting):
    epochs, indices = positions(len(images))
    draws = uniform(SEED, stream("distopt.augment"), epochs, indices, 5).astype(np.float64)
    result = setting.train(images, epochs, indices, SEED)
    assert result.dtype == np.float32
    assert result.shape[1:] == setting.output_shape((32, 32, 3))
    for i, image in enumerate(images):
        np.testing.assert_allclose(result[i], reference(setting, image, draws[i]), rtol=2e-6, atol=2e-5)


def test_evaluation_images_are_the_standardised_centre(images):
    result = TUTORIAL.evaluate(images)
    centre = images[:, 4:28, 4:28].astype(np.float64)
    axes = (1, 2, 3)
    expected = (centre - centre.mean(axes, keepdims=True)) / centre.std(axes, keepdims=True)
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 43, 128])
@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (9, 30, 4)])
@pytest.mark.parametrize("standardise", [True, False])
def test_a_shard_of_any_size_has_the_bits_of_the_whole_batch(size, shape, standardise):
    batch = np.random.default_rng(1).integers(0, 256, (300, *shape), dtype=np.uint8)
    setting = Augmentation(crop=7, pad=2, standardise=standardise)
    epochs, indices = positions(len(batch))
    whole = setting.train(batch, epochs, indices, SEED)
    whole_centre = setting.evaluate(batch)
    for begin in range(0, len(batch), size):
        part = slice(begin, begin + size)
        piece = setting.train(batch[part], epochs[part], indices[part], SEED)
        assert piece.tobytes() == whole[part].tobytes()
        assert setting.evaluate(batch[part]).tobytes() == whole_centre[part].tobytes()


def test_uneven_and_empty_shards_of_a_shuffled_batch_have_the_same_bits(images):
    epochs, indices = positions(len(images))
    whole = TUTORIAL.train(images, epochs, indices, SEED)
    order = np.random.default_rng(2).permutation(len(images))
    for part in np.split(order, [0, 1, 20, 20, 42]):
        piece = TUTORIAL.train(images[part], epochs[part], indices[part], SEED)
        np.testing.assert_array_equal(piece, whole[part])


@pytest.mark.parametrize("height", [1, 24, 1024, 1025, 3001])
def test_moments_are_exact_for_the_brightest_images_of_any_height(height):
    pixels = np.random.default_rng(3).integers(-128, -120, (2, height, 5, 3))
    mean, variance = _moments(pixels.reshape(2, height, 15).astype(np.float32), 3)
    n = height * 5
    sums, squares = pixels.sum((1, 2)), (pixels**2).sum((1, 2))
    np.testing.assert_array_equal(mean, sums / n)
    np.testing.assert_array_equal(variance, (squares * n - sums**2) / n**2)


def test_an_image_differs_from_epoch_to_epoch_and_from_seed_to_seed(images):
    epochs, indices = positions(len(images))
    base = TUTORIAL.train(images, epochs, indices, SEED)
    assert not np.array_equal(base, TUTORIAL.train(images, epochs + 1, indices, SEED))
    assert not np.array_equal(base, TUTORIAL.train(images, epochs, indices, SEED + 1))


def test_crops_and_flips_are_uniform():
    corner = np.zeros((9000, 32, 32, 1), np.uint8)
    corner[:, 31, 31] = 255
    crop = dataclasses.replace(PLAIN, crop=24)
    count = np.arange(len(corner))
    result = crop.train(corner, np.zeros_like(count), count, SEED)
    # One of 9 x 9 offsets shows the corner: 9000 / 81 = 111, give or take 5 deviations.
    assert abs((result.max((1, 2, 3)) > 0).sum() - 111) < 53
    assert (result[:, :-1].max(), result[:, :, :-1].max()) == (0, 0)
    flip = dataclasses.replace(PLAIN, flip=True)
    result = flip.train(corner, np.zeros_like(count), count, SEED)
    mirrored = result[:, 31, 0, 0] > 0
    np.testing.assert_array_equal(mirrored, result[:, 31, 31, 0] == 0)
    assert abs(mirrored.sum() - 4500) < 5 * np.sqrt(9000) / 2


def test_a_constant_image_becomes_nearly_zero_not_nan():
    constant = np.full((2, 32, 32, 3), 200, np.uint8)
    # One float32 rounding of 72 / (1 / sqrt(1728)) = 2993; a step of one grey level would be 41.6.
    assert np.abs(TUTORIAL.evaluate(constant)).max() < 3e-4
    assert np.abs(TUTORIAL.train(constant, *positions(2), SEED)).max() < 3e-4


def test_one_setting_does_not_change_the_random_numbers_of_the_others(images):
    epochs, indices = positions(len(images))
    with_flip = dataclasses.replace(PLAIN, crop=24, flip=True).train(images, epochs, indices, 0)
    without = dataclasses.replace(PLAIN, crop=24).train(images, epochs, indices, 0)
    flipped = (with_flip != without).any((1, 2, 3))
    assert 5 < flipped.sum() < 38
    np.testing.assert_array_equal(with_flip[flipped], without[flipped][:, :, ::-1])


def test_results_are_written_to_out_and_the_images_are_left_alone(images):
    before = images.copy()
    out = np.empty((43, 24, 24, 3), np.float32)
    assert TUTORIAL.train(images, *positions(43), SEED, out=out) is out
    np.testing.assert_array_equal(out, TUTORIAL.train(images, *positions(43), SEED))
    assert TUTORIAL.evaluate(images, out=out) is out
    np.testing.assert_array_equal(out, TUTORIAL.evaluate(images))
    np.testing.assert_array_equal(images, before)


def test_images_that_are_not_contiguous_give_the_same_bits(images):
    strided = np.repeat(images, 2, axis=2)[:, :, ::2]
    assert not strided.flags.c_contiguous
    result = TUTORIAL.train(strided, *positions(43), SEED)
    np.testing.assert_array_equal(result, TUTORIAL.train(images, *positions(43), SEED))


def test_an_empty_batch_gives_an_empty_result():
    nothing = np.empty((0, 32, 32, 3), np.uint8)
    assert TUTORIAL.train(nothing, *positions(0), SEED).shape == (0, 24, 24, 3)
    assert TUTORIAL.evaluate(nothing).shape == (0, 24, 24, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": 0}, "crop must be at least 1"),
        ({"pad": -1}, "pad must not be negative, got -1"),
        ({"max_brightness": -1.0}, "max_brightness must be finite and not negative"),
        ({"max_brightness": np.nan}, "max_brightness must be finite and not negative"),
        ({"contrast_range": (1.0, 0.5)}, r"contrast_range must be .*got \(1.0, 0.5\)"),
        ({"contrast_range": (-0.1, 0.5)}, "contrast_range must be"),
        ({"contrast_range": (0.1, np.inf)}, "contrast_range must be"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)


def test_unusable_images_and_outputs_are_refused(images):
    epochs, indices = positions(43)
    with pytest.raises(TypeError, match=r"must be uint8.*float32"):
        TUTORIAL.train(images.astype(np.float32), epochs, indices, SEED)
    with pytest.raises(DataError, match="example 0 holds nan"):
        TUTORIAL.evaluate(np.full((1, 32, 32, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="crop of 24x24 does not fit in images of 8x8"):
        TUTORIAL.evaluate(np.zeros((1, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"epochs and indices of shape \(43,\), got \(42,\)"):
        TUTORIAL.train(images, epochs[1:], indices, SEED)
    with pytest.raises(TypeError, match="out must be float32, got float64"):
        TUTORIAL.evaluate(images, out=np.empty((43, 24, 24, 3)))
    with pytest.raises(ValueError, match=r"shape \(43, 24, 24, 3\), got shape \(42,"):
        TUTORIAL.evaluate(images, out=np.empty((42, 24, 24, 3), np.float32))
    with pytest.raises(ValueError, match="not contiguous"):
        TUTORIAL.evaluate(images, out=np.empty((43, 24, 3, 24), np.float32).swapaxes(2, 3))
