"""Summaries by tag, and what the writers write."""

import json
import sys

import numpy as np
import pytest

from distopt import summaries
from distopt.scopes import Graph, GraphKeys, get_collection, name_scope
from distopt.summaries import JsonLinesWriter, TensorBoardWriter, histogram, merge_all, scalar
from distopt.tape import Tensor
from distopt.variables import IndexedSlices, Variable


@pytest.fixture(autouse=True)
def graph():
    with Graph().as_default() as graph:
        yield graph


def test_tags_have_the_name_scope_before_them():
    with name_scope("train"), name_scope("head"):
        assert scalar("loss", 1.0).tag == "train/head/loss"
    assert scalar("loss", 1.0).tag == "loss"
    assert [summary.tag for summary in merge_all()] == ["train/head/loss", "loss"]
    assert [summary.tag for summary in merge_all(scope="train/")] == ["train/head/loss"]


def test_a_tag_has_the_latest_value_only():
    for step in range(3):
        scalar("loss", float(step))
        histogram("weights", [step])
    assert [(s.tag, s.kind, s.numpy().tolist()) for s in merge_all()] == [
        ("loss", "scalar", 2.0),
        ("weights", "histogram", [2]),
    ]


def test_within_steps_what_this_step_did_not_keep_is_gone(graph):
    scalar("before", 1.0)
    for step in range(2):
        with graph.step():
            scalar(f"step {step}".replace(" ", "_"), 1.0)
    assert [summary.tag for summary in merge_all()] == ["before", "step_1"]


@pytest.mark.parametrize(
    "given", [2.5, np.float32(2.5), np.array([2.5]), Tensor(np.float64(2.5)), Variable(2.5)]
)
def test_a_scalar_is_any_single_number(given):
    found = scalar("x", given)
    assert found.value.shape == ()
    assert float(found.numpy()) == 2.5


def test_a_value_is_kept_as_it_was():
    variable = Variable(np.array([1.0, 2.0], "f4"))
    found = histogram("w", variable)
    variable.assign([5.0, 5.0])
    assert found.numpy().tolist() == [1.0, 2.0]
    rows = IndexedSlices(np.array([[3.0]], "f4"), np.array([0]), (2, 1))
    assert histogram("rows", rows).numpy().tolist() == [[3.0]]


def test_collections_of_ones_own():
    scalar("x", 1.0, collections=["validation", "validation"])
    assert merge_all() == []
    assert [summary.tag for summary in merge_all("validation")] == ["x"]
    assert get_collection(GraphKeys.SUMMARIES) == []


def test_errors():
    with pytest.raises(ValueError, match=r"scalar summary 'x' has shape \(2,\)"):
        scalar("x", [1.0, 2.0])
    with pytest.raises(ValueError, match="not a valid name"):
        histogram("two words", [1.0])


def test_json_lines(tmp_path):
    path = tmp_path / "made" / "summaries.jsonl"
    with JsonLinesWriter(path) as writer:
        scalar("loss", np.float32(0.5))
        scalar("count", 3)
        scalar("bad", np.nan)
        histogram("h", np.array([0.0, 1.0, 1.0, np.inf], "f4"))
        writer.add_summary(merge_all(), Variable(np.int64(7)))
        writer.add_summary(scalar("loss", 0.25), 8)
    with JsonLinesWriter(path) as writer:
        writer.add_summary(scalar("loss", -np.inf))
        writer.flush()
        first, second, third = [json.loads(line) for line in path.read_text().splitlines()]
    assert (first["step"], first["loss"], first["count"], first["bad"]) == (7, 0.5, 3, "nan")
    shown = first["h"]
    assert (shown["count"], shown["not_finite"], shown["min"], shown["max"]) == (4, 1, 0.0, 1.0)
    assert shown["mean"] == pytest.approx(2 / 3)
    assert shown["std"] == pytest.approx((2 / 9) ** 0.5)
    assert sum(shown["counts"]) == 3
    assert (shown["counts"][0], shown["counts"][-1]) == (1, 2)
    assert len(shown["edges"]) == len(shown["counts"]) + 1
    assert (second["step"], second["loss"]) == (8, 0.25)
    assert (third["step"], third["loss"]) == (None, "-inf")
    assert first["wall_time"] <= second["wall_time"] <= third["wall_time"]


def test_a_histogram_of_nothing_finite_says_so(tmp_path):
    with JsonLinesWriter(tmp_path / "s.jsonl") as writer:
        writer.add_summary(histogram("h", [np.nan]), 1)
    assert json.loads((tmp_path / "s.jsonl").read_text())["h"] == {"count": 1, "not_finite": 1}


def test_without_tensorboardx_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'distopt\[tensorboard\]'"):
        TensorBoardWriter(tmp_path)


def test_tensorboard_files_hold_the_summaries(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with TensorBoardWriter(tmp_path) as writer:
        scalar("loss", 0.5)
        histogram("h", np.array([0.0, 1.0, 3.0, np.nan], "f4"))
        histogram("nothing", [np.nan])
        writer.add_summary(merge_all(), 7)
        writer.flush()
    (path,) = tmp_path.iterdir()
    data, found, start = path.read_bytes(), {}, 0
    while start < len(data):  # TFRecord: length (8), checksum (4), record, checksum (4)
        length = int.from_bytes(data[start : start + 8], "little")
        event = Event.FromString(data[start + 12 : start + 12 + length])
        found |= {value.tag: (event.step, value) for value in event.summary.value}
        start += 16 + length
    assert set(found) == {"loss", "h"}
    step, value = found["loss"]
    assert (step, value.simple_value) == (7, 0.5)
    assert (found["h"][1].histo.num, found["h"][1].histo.sum) == (3.0, 4.0)


def test_the_module_shows_what_it_exports():
    assert set(summaries.__all__) <= set(dir(summaries))
