import json

import numpy as np
import pytest

from distopt.aggregators import AllReduce, Compressed, Ticket
from distopt.aggregators.codecs import Codec
from distopt.bench import codecs
from distopt.bench.codec_training import ErrorProbe
from distopt.communicators import LocalCommunicator, launcher
from distopt.testing import world
from distopt.variables import Arena, Variable


class NineTenths(Codec):
    """Every number times 0.9 each time it is encoded: an error that is known."""

    name = "nine tenths"

    def encode(self, values):
        return (values * np.float32(0.9)).view(np.uint8)

    def decode(self, payload, n):
        return payload.view(np.float32)[:n].copy()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_probe_measures_error_and_bytes(ranks):
    def run(communicator):
        variable = Variable(np.zeros(300, "f4"), name="w")
        Arena([variable])
        probe = ErrorProbe(Compressed(communicator, NineTenths(), min_elements=0), communicator, 2)
        for step in range(5):
            gradient = np.random.default_rng([communicator.rank, step]).standard_normal(300).astype("f4")
            probe.reduce([(gradient, variable)], Ticket(examples=communicator.rank + 1))
        return probe.errors, probe.wire

    for errors, wire in world(ranks, run):
        assert errors == pytest.approx([1 - 0.9**2] * 3, rel=1e-5)  # steps 0, 2 and 4; encoded twice
        assert wire == [2 * 1200 * (ranks - 1) // ranks] * 5


def test_the_probe_of_an_exact_aggregator_finds_no_error_but_float32():
    def run(communicator):
        variable = Variable(np.zeros(300, "f4"), name="w")
        probe = ErrorProbe(AllReduce(communicator), communicator, 1)
        gradient = np.random.default_rng(communicator.rank).standard_normal(300).astype("f4")
        probe.reduce([(gradient, variable)], Ticket(examples=1))
        with pytest.raises(ValueError, match="dense gradients; 'w' has None"):
            probe.reduce([(None, variable)], Ticket(examples=1))
        return probe.errors[0], probe.wire[0]

    for error, wire in world(2, run):
        assert 0 <= error < 1e-6
        assert wire == 1200


def test_the_probe_passes_the_rest_on():
    with LocalCommunicator() as communicator:
        variable = Variable(np.zeros(300, "f4"), name="w")
        inner = Compressed(communicator, "ef-sign", min_elements=0)
        probe = ErrorProbe(inner, communicator, 1)
        probe.reduce([(np.arange(300, dtype="f4"), variable)], Ticket(examples=1))
        assert probe.ticket.examples == 1
        state = probe.state()
        assert state.keys() == {"first:w", "second:w"}
        probe.load_state({}, [variable])
        assert inner.state() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codecs": ()}, "numbers of at least 1"),
        ({"steps": 0}, "numbers of at least 1"),
        ({"codecs": ("none", "fp9")}, "codec 'fp9'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        codecs.Options(**options)


@pytest.mark.parametrize("name", ["fp16", "topk:0.1", "powersgd:1"])
def test_speed_is_numbers_over_time(name):
    found = codecs.speed(name, 4096, 2)
    assert found.keys() == {"encode", "decode", "both"}
    # Time of both is the sum of the times.
    assert 1 / found["both"] == pytest.approx(1 / found["encode"] + 1 / found["decode"])


def test_speed_with_error_feedback_is_not_measured():
    with pytest.raises(ValueError, match="is that of the codec in it"):
        codecs.speed("ef-int8", 10, 1)


def test_trainings_are_compared(tmp_path, capsys):
    if launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    options = codecs.Options(
        ("none", "ef-topk:0.1"), 12, 2, 50, task="digits", error_every=4, numbers=1000, rounds=1
    )
    codecs.main(options, str(tmp_path / "c.json"))
    result = json.loads((tmp_path / "c.json").read_text())
    plain, sparse = (result["trainings"][name][0] for name in ("none", "ef-topk:0.1"))
    assert len(plain["losses"]) == len(sparse["losses"]) == 12
    assert len(plain["relative_errors"]) == 3
    assert max(plain["relative_errors"]) < 1e-6 < min(sparse["relative_errors"])
    assert sparse["wire_bytes_per_step"] < plain["wire_bytes_per_step"] / 3
    assert result["speed"].keys() == {"topk:0.1"}
    shown = capsys.readouterr().out
    assert "ef-topk:0.1" in shown
    assert "gradient off by" in shown
