"""A CIFAR-10 of a few made-up images in every official form, with its own checksums."""

import hashlib
import io
import tarfile

import numpy as np

from distopt.data import cifar10_files

PER_FILE = 20
NAMES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def records(name):
    """The images [n, 3, 32, 32] and labels of one small made-up file."""
    rng = np.random.default_rng(list(name.encode()))
    images = rng.integers(0, 256, (PER_FILE, 3, 32, 32), dtype=np.uint8)
    return images, rng.integers(0, 10, PER_FILE, dtype=np.uint8)


def binary_file(name):
    images, labels = records(name)
    return np.concatenate([labels[:, None], images.reshape(PER_FILE, -1)], axis=1).tobytes()


def text(value):
    """A `str` as Python 2 pickles it."""
    return b"U" + bytes([len(value)]) + value


def python2_array(pixels, cut=0, code=b"u1", fortran=b"\x89"):
    raw = pixels.tobytes()[: pixels.size - cut]
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b")
    dtype = b"cnumpy\ndtype\n(" + text(code) + b"K\x00K\x01tR"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"".join(b"J" + length.to_bytes(4, "little") for length in pixels.shape)
    state = b"(K\x01(" + shape + b"t" + dtype + fortran + b"T" + len(raw).to_bytes(4, "little") + raw
    return reconstruct + b"tR" + state + b"tb"


def python_file(name, array=python2_array, extra=b""):
    """A batch as Python 2 pickled it in 2009, opcode by opcode (protocol 2)."""
    images, labels = records(name)
    pixels = array(images.reshape(PER_FILE, -1))
    numbers = b"(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    items = text(b"batch_label") + text(name.encode())
    items += text(b"labels") + b"]" + numbers + text(b"data") + pixels
    return b"\x80\x02}(" + items + extra + b"u."


def archive(folder, files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def known(name, content, algorithm="sha256"):
    digest = hashlib.new(algorithm, content).hexdigest()
    return cifar10_files.KnownFile(name, len(content), algorithm, digest)


ALL_NAMES = NAMES["train"] + NAMES["test"]
BINARY = {f"{name}.bin": binary_file(name) for name in ALL_NAMES}
PYTHON = {name: python_file(name) for name in ALL_NAMES}
BINARY_ARCHIVE = archive("cifar-10-batches-bin", {"batches.meta.txt": b"airplane\n", **BINARY})
PYTHON_ARCHIVE = archive("cifar-10-batches-py", PYTHON)
UNREACHABLE = "http://127.0.0.1:9/cifar-10-binary.tar.gz"  # port 9: nobody listens

SMALL = cifar10_files.Release(
    url=UNREACHABLE,
    binary_archive=known("cifar-10-binary.tar.gz", BINARY_ARCHIVE),
    python_archive=known("cifar-10-python.tar.gz", PYTHON_ARCHIVE),
    binary={
        split: tuple(known(f"{name}.bin", BINARY[f"{name}.bin"]) for name in names)
        for split, names in NAMES.items()
    },
    python={
        split: tuple(known(name, PYTHON[name], "md5") for name in names) for split, names in NAMES.items()
    },
    examples_per_file=PER_FILE,
)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def expect_split(dataset, split):
    images, labels = zip(*map(records, NAMES[split]), strict=True)
    np.testing.assert_array_equal(dataset.images, np.concatenate(images).transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(dataset.labels, np.concatenate(labels))
    assert dataset.class_names[3] == "cat"
