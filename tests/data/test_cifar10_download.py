import dataclasses
import subprocess
import sys
import threading

import pytest
from cifar10_fakes import (
    BINARY,
    BINARY_ARCHIVE,
    PER_FILE,
    SMALL,
    UNREACHABLE,
    archive,
    expect_split,
    known,
    write,
)

from distopt.data import cifar10, cifar10_files
from distopt.errors import DataError

pytestmark = pytest.mark.usefixtures("small_release")


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
    release = dataclasses.replace(cifar10.OFFICIAL, binary_archive=known("cifar-10-binary.tar.gz", packed))
    monkeypatch.setattr(cifar10, "OFFICIAL", release)
    with pytest.raises(DataError, match=r"data_batch_3.bin of http.* is short: found 5 bytes"):
        cifar10.load("test", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_that_vanished_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with pytest.raises(DataError, match=r"binary.tar.gz can't be read.*nothing readable"):
        cifar10_files.read_archive(path, SMALL.binary_archive, SMALL.binary_folder, SMALL.binary["test"])


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
