import dataclasses

import numpy as np
import pytest

from distopt.data import Dataset, require_finite
from distopt.errors import DataError


def images(count=3):
    return np.arange(count * 12, dtype=np.uint8).reshape(count, 2, 2, 3)


def test_a_data_set_holds_read_only_images_int32_labels_and_its_length():
    dataset = Dataset(images(), np.array([1, 0, 1], np.int64), ("no", "yes"), "toy")
    assert len(dataset) == 3
    assert dataset.image_shape == (2, 2, 3)
    assert dataset.labels.dtype == np.int32
    np.testing.assert_array_equal(dataset.labels, [1, 0, 1])
    with pytest.raises(ValueError, match="read-only"):
        dataset.images[0] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "other"


def test_a_data_set_leaves_the_given_arrays_writeable():
    given = images()
    Dataset(given, np.zeros(3, int), ("a",), "toy")
    given[0] = 7


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ((images().astype(np.int16), [0, 0, 0]), TypeError, "must be uint8.*got int16"),
        ((images().astype(np.float32), [0, 0, 0]), TypeError, "must be uint8.*got float32"),
        ((images()[0], [0, 0]), ValueError, r"\[examples, height, width, channels\].*\(2, 2, 3\)"),
        ((images(0), []), DataError, "no examples"),
        ((images()[:, :0], [0, 0, 0]), ValueError, "no pixel"),
        ((images(), [0, 1]), ValueError, r"shape \(3,\), got \(2,\)"),
        ((images(), [0.0, 1.0, 0.0]), TypeError, "labels of toy must be integers.*float64"),
        ((images(), [0, 2, 2]), DataError, r"example 1 of toy has label 2.*0 to 1 \(2 such"),
        ((images(), [0, 0, -1]), DataError, r"example 2 of toy has label -1.*\(1 such example\)"),
    ],
)
def test_unusable_arrays_are_refused_with_what_was_found(arrays, error, message):
    with pytest.raises(error, match=message):
        Dataset(arrays[0], np.array(arrays[1]), ("a", "b"), "toy")


def test_a_data_set_without_classes_is_refused():
    with pytest.raises(ValueError, match="at least one class"):
        Dataset(images(), np.zeros(3, int), (), "toy")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_images_are_refused_by_the_number_of_the_example(bad):
    values = images().astype(np.float32)
    values[1, 0, 1, 2] = bad
    with pytest.raises(DataError, match=rf"example 1 holds {bad}.*1 of 3 examples"):
        Dataset(values, np.zeros(3, int), ("a",), "toy")


def test_infinities_of_both_signs_and_huge_finite_values_are_told_apart():
    values = np.zeros((2, 2))
    values[1] = np.inf, -np.inf
    with pytest.raises(DataError, match="example 1 holds inf"):
        require_finite(values, "inputs")
    require_finite(np.full((4, 2), 1.7e308), "inputs")
    require_finite(np.empty((0, 3), np.float32), "inputs")
