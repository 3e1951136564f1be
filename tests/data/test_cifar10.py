import contextlib
import dataclasses
import hashlib
import http.server
import io
import pickle
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

from distopt.data import cifar10, cifar10_files
from distopt.errors import DataError

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
    state = (
        b"(K\x01(" + shape + b"t" + dtype + fortran + b"T" + len(raw).to_bytes(4, "little") + raw
    )
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
        split: tuple(known(name, PYTHON[name], "md5") for name in names)
        for split, names in NAMES.items()
    },
    examples_per_file=PER_FILE,
)


@pytest.fixture(autouse=True)
def small_release(monkeypatch):
    monkeypatch.setattr(cifar10, "OFFICIAL", SMALL)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def official(monkeypatch):
    monkeypatch.setattr(cifar10, "OFFICIAL", cifar10_files.OFFICIAL)


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
    assert f"{tmp_path / name} is short: found {size - 1:,} bytes, expected {size:,}" in str(
        caught.value
    )


@pytest.mark.parametrize("files", [BINARY, PYTHON])
def test_an_altered_file_is_named_with_both_checksums(tmp_path, files):
    name = sorted(files)[3]
    content = bytearray(files[name])
    content[-1000] ^= 1
    write(tmp_path, {**files, name: bytes(content)})
    with pytest.raises(DataError) as caught:
        cifar10.load("train", tmp_path)
    algorithm = "sha256" if name.endswith(".bin") else "md5"
    found, expected = (
        hashlib.new(algorithm, data).hexdigest() for data in (bytes(content), files[name])
    )
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


class _Server(http.server.ThreadingHTTPServer):
    content = BINARY_ARCHIVE
    repeat = 1
    requests = 0
    sent = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content) * self.server.repeat))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the other side may have had enough
            for _ in range(self.server.repeat):
                self.wfile.write(self.server.content)
                self.server.sent += len(self.server.content)

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def server(monkeypatch):
    with _Server(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}/cifar-10-binary.tar.gz"
        monkeypatch.setattr(cifar10, "OFFICIAL", dataclasses.replace(SMALL, url=url))
        yield running
        running.shutdown()
        thread.join()


def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


UNPACKED = sorted(f"cifar-10-batches-bin/{name}" for name in BINARY)


def test_what_is_not_found_is_downloaded_once_and_unpacked(tmp_path, server, capsys):
    root = tmp_path / "new" / "folder"
    expect_split(cifar10.load("train", root), "train")
    expect_split(cifar10.load("test", root), "test")
    assert server.requests == 1
    assert contents(root) == UNPACKED
    assert capsys.readouterr().err.count(f"downloading {cifar10.OFFICIAL.url}") == 1


def test_without_progress_a_download_is_silent(tmp_path, server, capsys):
    cifar10.load("test", tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_download_with_another_content_is_refused_and_leaves_nothing(tmp_path, server):
    server.content = BINARY_ARCHIVE[:-1] + b"x"
    with pytest.raises(DataError, match=r"is not cifar-10-binary.tar.gz: found .*sha256"):
        cifar10.load("test", tmp_path)
    assert contents(tmp_path) == []


@pytest.mark.parametrize("content", [BINARY_ARCHIVE[:1000], BINARY_ARCHIVE + b"x" * 1_000_000])
def test_a_download_of_another_length_is_refused_and_leaves_nothing(tmp_path, server, content):
    server.content = content
    with pytest.raises(DataError, match=r"could not be put there: what http"):
        cifar10.load("test", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_does_not_end_is_given_up(tmp_path, server):
    server.content, server.repeat = bytes(1 << 20), 200
    with pytest.raises(DataError, match=r"found more than [\d,]+ bytes"):
        cifar10.load("test", tmp_path)
    assert server.sent < 50 << 20


def test_members_of_a_downloaded_archive_are_checked_too(tmp_path, server, monkeypatch):
    packed = archive("cifar-10-batches-bin", {**BINARY, "data_batch_3.bin": b"other"})
    server.content = packed
    release = dataclasses.replace(
        cifar10.OFFICIAL, binary_archive=known("cifar-10-binary.tar.gz", packed)
    )
    monkeypatch.setattr(cifar10, "OFFICIAL", release)
    with pytest.raises(DataError, match=r"data_batch_3.bin of http.* is short: found 5 bytes"):
        cifar10.load("test", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_vanished_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with pytest.raises(DataError, match=r"binary.tar.gz can't be read.*nothing readable"):
        cifar10_files.read_archive(
            path, SMALL.binary_archive, SMALL.binary_folder, SMALL.binary["test"]
        )


def test_without_a_network_the_error_says_which_files_to_put_where(tmp_path):
    with pytest.raises(DataError) as caught:
        cifar10.load("test", tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), UNREACHABLE, "refused", "cifar-10-binary.tar.gz", "DISTOPT_DATA"):
        assert part in message
    assert SMALL.binary_archive.what in message
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_downloaded_where_that_is_not_wanted(tmp_path, server):
    with pytest.raises(DataError, match=r"was not found in .*Put cifar-10-binary.tar.gz"):
        cifar10.load("test", tmp_path, download=False)
    assert server.requests == 0


def test_a_folder_that_can_not_be_made_is_an_error_with_the_reason(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be put there: .*file"):
        cifar10.load("test", tmp_path / "file" / "data")


def test_two_jobs_that_download_at_once_both_succeed(tmp_path, server):
    gate = threading.Barrier(2, timeout=20)
    original = cifar10.download_file
    results, errors = [], []

    def both_first(*arguments):
        original(*arguments)
        gate.wait()

    def job():
        try:
            cifar10.fetch(tmp_path, progress=False)
            results.append(cifar10.load("train", tmp_path, download=False))
        except Exception as error:
            errors.append(error)

    cifar10.download_file = both_first
    try:
        threads = [threading.Thread(target=job) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    finally:
        cifar10.download_file = original
    assert errors == []
    assert len(results) == 2
    expect_split(results[1], "train")
    assert contents(tmp_path) == UNPACKED


class Ranks:
    """Threads that are the ranks of a job; a gather that not all join breaks in the end."""

    def __init__(self, size, per_host):
        self.size = size
        self.per_host = per_host
        self.barrier = threading.Barrier(size, timeout=20)
        self.board = [None] * size

    def run(self, job):
        outcomes = [None] * self.size

        def rank(number):
            try:
                outcomes[number] = job(OneRank(self, number))
            except Exception as error:
                outcomes[number] = error

        threads = [threading.Thread(target=rank, args=(n,)) for n in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return outcomes


class OneRank:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.size = ranks, rank, ranks.size
        self.local_rank = rank % ranks.per_host
        self.host = f"node{rank // ranks.per_host}"

    def all_gather_object(self, obj):
        self.ranks.board[self.rank] = obj
        self.ranks.barrier.wait()
        result = list(self.ranks.board)
        self.ranks.barrier.wait()
        return result


def test_ranks_that_share_a_folder_download_it_once(tmp_path, server):
    outcomes = Ranks(4, per_host=2).run(lambda c: cifar10.load("train", tmp_path, c))
    for outcome in outcomes:
        expect_split(outcome, "train")
    assert server.requests == 1


def test_hosts_with_folders_of_their_own_download_once_each(tmp_path, server):
    outcomes = Ranks(6, per_host=2).run(lambda c: cifar10.load("train", tmp_path / c.host, c))
    for outcome in outcomes:
        expect_split(outcome, "train")
    assert server.requests == 3


def test_a_failed_download_is_the_same_error_on_every_rank(tmp_path):
    outcomes = Ranks(3, per_host=2).run(lambda c: cifar10.load("train", tmp_path, c))
    assert all(type(outcome) is DataError for outcome in outcomes)
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert str(outcomes[2]).startswith("rank 0 on host node0: CIFAR-10 is not in")


def test_a_file_that_is_altered_on_one_host_stops_every_rank_and_the_host_is_named(tmp_path):
    write(tmp_path / "node0", BINARY)
    write(tmp_path / "node1", {**BINARY, "data_batch_4.bin": BINARY["data_batch_5.bin"]})
    outcomes = Ranks(3, per_host=2).run(lambda c: cifar10.load("train", tmp_path / c.host, c))
    for outcome in outcomes:
        assert type(outcome) is DataError
        assert str(outcome).startswith("rank 2 on host node1: ")
        assert "data_batch_4.bin is altered" in str(outcome)


def test_a_job_of_one_rank_raises_without_a_rank_in_the_message(tmp_path):
    (outcome,) = Ranks(1, per_host=1).run(lambda c: cifar10.load("train", tmp_path, c))
    assert str(outcome).startswith("CIFAR-10 is not in")


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


def test_the_command_lists_the_files_and_fails_where_a_split_is_unusable(tmp_path, capsys):
    write(tmp_path, {**BINARY, "data_batch_2.bin": b"short"})
    assert cifar10.main(["--data-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'data_batch_1.bin'}: ok" in out
    assert f"{tmp_path / 'data_batch_2.bin'}: found 5 bytes, expected 61,460" in out
    assert f"test: {PER_FILE} examples" in out
    assert "train: " in err


def test_the_command_downloads_where_asked_and_then_succeeds(tmp_path, server, capsys):
    assert cifar10.main(["--data-dir", str(tmp_path)]) == 1
    assert server.requests == 0
    assert cifar10.main(["--data-dir", str(tmp_path), "--download"]) == 0
    assert "train: 100 examples" in capsys.readouterr().out


def test_the_command_can_be_started_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "distopt.data.cifar10", "--data-dir", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"CIFAR-10 was not found in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


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
