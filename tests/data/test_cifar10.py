import hashlib
import pickle

import numpy as np
import pytest
from cifar10_fakes import (
    BINARY,
    BINARY_ARCHIVE,
    PER_FILE,
    PYTHON,
    PYTHON_ARCHIVE,
    SMALL,
    archive,
    expect_split,
    python2_array,
    python_file,
    records,
    text,
    write,
)

from distopt.data import cifar10, cifar10_files
from distopt.errors import DataError

pytestmark = pytest.mark.usefixtures("small_release")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("subfolder", "files"),
    [
        (".", BINARY),
        ("cifar-10-batches-bin", BINARY),
        (".", PYTHON),
        ("cifar-10-batches-py", PYTHON),
        (".", {"cifar-10-binary.tar.gz": BINARY_ARCHIVE}),
        (".", {"cifar-10-python.tar.gz": PYTHON_ARCHIVE}),
    ],
)
def test_every_official_form_gives_the_same_images(tmp_path, split, subfolder, files):
    write(tmp_path / subfolder, files)
    expect_split(cifar10.load(split, tmp_path), split)
    expect_split(cifar10.load(split, str(tmp_path), check=False), split)


def test_a_split_needs_its_own_files_only(tmp_path):
    write(tmp_path, {"test_batch.bin": BINARY["test_batch.bin"]})
    expect_split(cifar10.load("test", tmp_path), "test")


@pytest.mark.parametrize(
    ("form", "files"),
    [("cifar-10-batches-bin", BINARY), ("cifar-10-batches-py", PYTHON)],
)
def test_a_missing_file_is_named_and_nothing_is_downloaded(tmp_path, form, files):
    folder = write(tmp_path / form, files)
    name = sorted(files)[2]
    (folder / name).unlink()
    with pytest.raises(DataError) as caught:
        cifar10.load("train", tmp_path)
    message = str(caught.value)
    assert f"{folder / name} is missing" in message
    assert "1 of the 5" in message
    assert f"{len(files[name]):,} bytes" in message


def test_a_complete_form_is_taken_where_another_one_is_incomplete(tmp_path):
    write(tmp_path, {"data_batch_1.bin": BINARY["data_batch_1.bin"]})
    write(tmp_path, {"cifar-10-python.tar.gz": PYTHON_ARCHIVE})
    expect_split(cifar10.load("train", tmp_path), "train")


@pytest.mark.parametrize("files", [BINARY, PYTHON])
def test_a_short_file_is_named_with_both_sizes(tmp_path, files):
    name = sorted(files)[3]
    write(tmp_path, {**files, name: files[name][:-1]})
    with pytest.raises(DataError) as caught:
        cifar10.load("train", tmp_path)
    size = len(files[name])
    assert f"{tmp_path / name} is short: found {size - 1:,} bytes, expected {size:,}" in str(caught.value)


@pytest.mark.parametrize("files", [BINARY, PYTHON])
def test_an_altered_file_is_named_with_both_checksums(tmp_path, files):
    name = sorted(files)[3]
    content = bytearray(files[name])
    content[-1000] ^= 1
    write(tmp_path, {**files, name: bytes(content)})
    with pytest.raises(DataError) as caught:
        cifar10.load("train", tmp_path)
    algorithm = "sha256" if name.endswith(".bin") else "md5"
    found, expected = (hashlib.new(algorithm, data).hexdigest() for data in (bytes(content), files[name]))
    assert f"{tmp_path / name} is altered: found {algorithm} {found}, expected {expected}" in str(
        caught.value
    )


def test_without_checks_an_altered_pixel_passes_and_a_short_file_does_not(tmp_path):
    content = bytearray(BINARY["test_batch.bin"])
    content[5] ^= 1
    write(tmp_path, {"test_batch.bin": bytes(content)})
    assert len(cifar10.load("test", tmp_path, check=False)) == PER_FILE
    write(tmp_path, {"test_batch.bin": bytes(content[:-3073])})
    with pytest.raises(DataError, match=r"has 58,387 bytes, expected 61,460: 20 records of 3,073"):
        cifar10.load("test", tmp_path, check=False)


def test_a_label_that_is_no_class_is_found_without_checksums_too(tmp_path):
    content = bytearray(BINARY["test_batch.bin"])
    content[3073 * 7] = 10
    write(tmp_path, {"test_batch.bin": bytes(content)})
    with pytest.raises(DataError, match="example 7 of CIFAR-10 test has label 10"):
        cifar10.load("test", tmp_path, check=False)


@pytest.mark.parametrize("keep", [0, 10, 5000, len(BINARY_ARCHIVE) - 30_000])
def test_a_short_archive_is_named_with_size_and_checksum(tmp_path, keep):
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(BINARY_ARCHIVE[:keep])
    with pytest.raises(DataError) as caught:
        cifar10.load("test", tmp_path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert f"Found {keep:,} bytes, sha256" in message
    assert f"expected {SMALL.binary_archive.what}" in message


def test_an_altered_archive_is_an_error_that_names_it(tmp_path):
    content = bytearray(BINARY_ARCHIVE)
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz"):
        cifar10.load("train", tmp_path)


def test_an_archive_with_an_altered_member_is_refused(tmp_path):
    wrong = {**BINARY, "test_batch.bin": BINARY["data_batch_1.bin"]}
    packed = archive("cifar-10-batches-bin", wrong)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"binary.tar.gz.test_batch.bin is altered"):
        cifar10.load("test", tmp_path)


def test_an_archive_without_the_wanted_files_says_which(tmp_path):
    packed = archive("somewhere", BINARY)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"has no cifar-10-batches-bin/data_batch_1.bin \(5 of 5"):
        cifar10.load("train", tmp_path)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', got 'valid'"):
        cifar10.load("valid", tmp_path)


EVIL = b"cos\nsystem\n(" + text(b"touch evil") + b"tR"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python_file("test_batch", extra=text(b"x") + EVIL), "os.system, which no official file"),
        (python_file("test_batch", array=lambda _: EVIL), "os.system"),
        (
            python_file("test_batch", array=lambda _: b"cbuiltins\neval\n(U\x011tR"),
            "builtins.eval",
        ),
        (
            python_file("test_batch", array=lambda _: b"cnumpy\nload\n(U\x011tR"),
            "numpy.load, which no official file",
        ),
        (python_file("test_batch", array=lambda p: python2_array(p[:-1])), r"found \(\(19, 3072\)"),
        (
            python_file("test_batch", array=lambda p: python2_array(p, cut=1)),
            "a complete C-ordered",
        ),
        (python_file("test_batch", array=lambda p: python2_array(p, code=b"O8")), "b'O8', False"),
        (
            python_file("test_batch", array=lambda p: python2_array(p, fortran=b"\x88")),
            "b'u1', True",
        ),
        (python_file("test_batch", array=lambda _: b"K\x05"), "found <class 'int'>"),
        (
            python_file("test_batch", extra=text(b"labels") + b"]"),
            "'labels' must be a list of 20 integers",
        ),
        (
            python_file("test_batch", extra=text(b"labels") + b"](" + 20 * b"K\x0a" + b"e"),
            "'labels' must be a list of 20 integers",
        ),
        (pickle.dumps([1, 2]), "expected a dict .*found <class 'list'>"),
        (pickle.dumps({"data": 1}, protocol=2), "expected a dict"),
        (PYTHON["test_batch"][:-2], "reading the pickle failed"),
        (b"", "reading the pickle failed with EOFError"),
    ],
)
def test_a_pickle_that_is_not_official_is_refused_and_nothing_of_it_runs(
    tmp_path, monkeypatch, content, message
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"test_batch": content})
    with pytest.raises(DataError, match=message):
        cifar10.load("test", tmp_path, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["test_batch"]


def test_the_made_up_pickle_is_read_by_the_standard_unpickler_as_a_batch():
    batch = pickle.loads(PYTHON["data_batch_1"], encoding="bytes")
    images, labels = records("data_batch_1")
    np.testing.assert_array_equal(batch[b"data"], images.reshape(PER_FILE, -1))
    assert batch[b"labels"] == labels.tolist()


def test_the_folder_is_taken_from_the_environment_then_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTOPT_DATA", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cifar10.default_data_dir() == tmp_path / "named"
    write(tmp_path / "named", BINARY)
    expect_split(cifar10.load("test"), "test")
    monkeypatch.delenv("DISTOPT_DATA")
    assert cifar10.default_data_dir() == tmp_path / "cache" / "distopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cifar10.default_data_dir() == tmp_path / ".cache" / "distopt"


def test_the_known_checksums_are_those_of_the_official_home_page():
    release = cifar10_files.OFFICIAL
    files = [*release.binary["train"], *release.binary["test"]]
    assert [file.name for file in files] == sorted(BINARY)
    assert {file.size for file in files} == {30_730_000}
    lengths = {"md5": 32, "sha256": 64}
    every = [*files, *release.python["train"], *release.python["test"]]
    every += [release.binary_archive, release.python_archive]
    assert all(len(file.digest) == lengths[file.algorithm] for file in every)
    assert len({file.digest for file in every}) == 14


def test_the_real_files_are_loaded_as_they_are_known_to_be(official, real_cifar10):
    train, test = (cifar10.load(split, real_cifar10) for split in ("train", "test"))
    assert (len(train), len(test)) == (50_000, 10_000)
    np.testing.assert_array_equal(np.bincount(train.labels), np.full(10, 5000))
    np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 1000))
    # The first is a frog; the channel means are quoted everywhere as 125.3, 123.0, 113.9.
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    means = train.images.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(means, [125.307, 122.950, 113.865], atol=1e-3)
