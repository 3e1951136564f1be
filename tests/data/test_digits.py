import gzip
from importlib import resources

import numpy as np
import pytest

from distopt.data import digits
from distopt.errors import DataError


def test_the_splits_have_the_promised_sizes_and_forms():
    train, test = digits.load("train"), digits.load("test")
    assert (train.images.shape, test.images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert train.class_names == tuple("0123456789")
    assert (train.images.min(), train.images.max()) == (0, 16)


def test_the_first_examples_are_those_of_the_file():
    # The first line of the file is a 0; by class, it is the first of all: a test example.
    test = digits.load("test")
    assert test.labels[0] == 0
    np.testing.assert_array_equal(test.images[0, 0, :, 0], [0, 0, 5, 13, 9, 1, 0, 0])
    train = digits.load("train")
    assert train.labels[0] == 1
    np.testing.assert_array_equal(train.images[0, 0, :, 0], [0, 0, 0, 12, 13, 5, 0, 0][:8])


def test_both_splits_together_are_the_whole_file():
    packed = (resources.files("distopt.data") / "digits.csv.gz").read_bytes()
    lines = sorted(gzip.decompress(packed).decode().split())
    found = []
    for split in ("train", "test"):
        dataset = digits.load(split)
        flat = dataset.images.reshape(len(dataset), 64)
        found += [
            ",".join(map(str, [*row, label]))
            for row, label in zip(flat.tolist(), dataset.labels.tolist(), strict=True)
        ]
    assert sorted(found) == lines


def test_a_fifth_of_every_class_is_for_the_test():
    train, test = (np.bincount(digits.load(split).labels) for split in ("train", "test"))
    assert (np.abs(test - (train + test) / 5) < 1).all()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        digits.load("valid")


def test_a_damaged_file_is_named(monkeypatch):
    monkeypatch.setattr(digits, "_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits.csv.gz is damaged: found 57,523 bytes"):
        digits.load("train")


def test_a_missing_file_is_named(monkeypatch):
    monkeypatch.setattr(digits, "_FILE", "nothing.csv.gz")
    with pytest.raises(DataError, match=r"nothing.csv.gz can't be read: No such file"):
        digits.load("train")


def test_source_and_licence_stand_beside_the_file():
    text = (resources.files("distopt.data") / "digits.md").read_text()
    for fact in ("E. Alpaydin", "C. Kaynak", "10.24432/C50P49", "CC BY 4.0", digits._SHA256):
        assert fact in text
