"""Which aggregator the settings of a training give."""

import pytest

from distopt.aggregators import Adasum, AllReduce, Delayed, LocalSGD
from distopt.communicators import connect
from distopt.exchange import make_aggregator
from distopt.settings import Settings


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, AllReduce),
        ({"local_steps": 1}, AllReduce),
        ({"local_steps": 5, "local_start": 7}, LocalSGD),
        ({"delayed": True}, Delayed),
        ({"adasum": True}, Adasum),
    ],
)
def test_each_setting_gives_its_aggregator(settings, kind):
    with connect("local") as communicator:
        size = None if kind is Adasum else 12
        made = make_aggregator(Settings(global_batch=8, steps=1, bucket_bytes=size, **settings), communicator)
    assert type(made) is kind
    if kind is not Adasum:
        inner = made if kind is AllReduce else made.inner
        assert (inner.reduction, inner.bucket_bytes) == ("mean", 12)
    if kind is LocalSGD:
        assert (made.every, made.start) == (5, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "fp16", "local_steps": 4}, r"codec='fp16' would never be used: with local_steps=4"),
        ({"adasum": True, "bucket_bytes": 4096}, "bucket_bytes=4096 has no use with adasum"),
        ({"local_steps": 0}, "local_steps must be at least 1, got 0"),
        ({"local_steps": 2, "local_start": -1}, "local_start must be at least 0, got -1"),
        ({"local_start": 3}, "local_start=3 .* give local_steps too"),
        ({"local_steps": 2, "delayed": True}, "choose one: local_steps=2, delayed=True$"),
        ({"delayed": True, "adasum": True}, "choose one"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(global_batch=8, steps=1, **settings)
