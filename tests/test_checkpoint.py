import numpy as np
import pytest

from distopt import checkpoint
from distopt.errors import CheckpointError

_ARRAYS = {"b/w": np.arange(6, dtype="f4").reshape(2, 3), "a": np.array(3, np.int64), "e": np.zeros((0, 2))}


def test_arrays_and_manifest_round_trip_with_shapes_and_dtypes(tmp_path):
    path = checkpoint.checkpoint_path(tmp_path / "new" / "folder", 12)
    checkpoint.save(path, _ARRAYS, {"step": 12, "task": "x"})
    arrays, manifest = checkpoint.load(path)
    assert manifest == {"step": 12, "task": "x"}
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {
        n: (a.shape, a.dtype) for n, a in _ARRAYS.items()
    }
    assert all(np.array_equal(arrays[name], array) for name, array in _ARRAYS.items())


def test_views_are_saved_as_what_they_show(tmp_path):
    table = np.arange(12.0).reshape(3, 4)
    checkpoint.save(tmp_path / "x", {"t": table.T, "s": table[:, 1]}, {})
    arrays, _ = checkpoint.load(tmp_path / "x")
    assert np.array_equal(arrays["t"], table.T)
    assert arrays["s"].tolist() == [1.0, 5.0, 9.0]


def test_every_altered_byte_of_the_arrays_is_found(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, {"w": np.zeros(50, "f4")}, {})
    good = path.read_bytes()
    for place in range(len(good) - 200, len(good), 7):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="is altered: its arrays have SHA-256"):
            checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, length):
    path = tmp_path / "x"
    checkpoint.save(path, _ARRAYS, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="truncated or altered"):
        checkpoint.load(path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "nothing")
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(2)}, tmp_path / "foreign", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has format 'pt', expected 'distopt-1'"):
        checkpoint.load(tmp_path / "foreign")


def test_the_newest_readable_checkpoint_is_found(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 200):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, step), _ARRAYS, {"step": step})
    checkpoint.checkpoint_path(tmp_path, 200).write_bytes(b"killed while writing")
    path, _, manifest, passed_over = checkpoint.latest(tmp_path)
    assert (path.name, manifest["step"]) == ("checkpoint-00000010.safetensors", 10)
    assert len(passed_over) == 1
    assert "checkpoint-00000200.safetensors is truncated" in passed_over[0]


def test_when_none_is_readable_the_message_tells_why_for_each(tmp_path):
    for step in (5, 10):
        checkpoint.checkpoint_path(tmp_path, step).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"(?s)00000010.*00000005"):
        checkpoint.latest(tmp_path)


def test_pruning_keeps_the_newest(tmp_path):
    for step in (5, 10, 200):
        checkpoint.save(checkpoint.checkpoint_path(tmp_path, step), {"a": np.zeros(1)}, {})
    (tmp_path / "other.safetensors").write_bytes(b"not ours")
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-00000010.safetensors",
        "checkpoint-00000200.safetensors",
        "other.safetensors",
    ]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "x"
    checkpoint.save(path, {"a": np.zeros(1)}, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(path, {"a": np.ones(1)}, {"step": 2})
    assert checkpoint.load(path)[1] == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
