"""Compressed exchange under real MPI, on any number of ranks."""

import numpy as np
import pytest

from distopt.aggregators import Compressed, Ticket
from distopt.aggregators.codecs.error_feedback import split_again
from distopt.variables import Arena, Variable

NAMES = [
    "fp16",
    "bf16",
    "int8:stochastic",
    "ef-int8:100",
    "ef-sign:100",
    "ef-topk:0.05:fp16",
    "ef-powersgd:2",
]


def _model(in_arena=True):
    variables = [
        Variable(np.zeros(shape, "f4"), name=name) for name, shape in {"w": (61, 37), "b": (7,)}.items()
    ]
    if in_arena:
        Arena(variables)
    return variables


def _gradient(variable, rank, step):
    return np.random.default_rng([rank, step, variable.size]).standard_normal(variable.shape).astype("f4")


def _step(aggregator, variables, step):
    """Rank r has r examples: the first one none, and no gradients unless it is alone."""
    rank, size = aggregator.communicator.rank, aggregator.communicator.size
    empty = rank == 0 and size > 1
    pairs = [(None if empty else _gradient(v, rank, step), v) for v in variables]
    reduced = aggregator.reduce(pairs, Ticket(examples=max(rank, size == 1)))
    return [np.array(g) for g, _ in reduced]


def _exact(variables, size, step):
    ranks = range(1, size) if size > 1 else range(1)
    return [
        sum(_gradient(v, rank, step).astype(float) for rank in ranks) / max(1, sum(ranks)) for v in variables
    ]


@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_get_the_same_bits_and_what_is_left_out_arrives(communicator, name, in_arena):
    variables = _model(in_arena)
    aggregator = Compressed(communicator, name, bucket_bytes=5000, min_elements=20)
    arrived = [np.zeros(v.shape) for v in variables]
    sent = [np.zeros(v.shape) for v in variables]
    largest = 0.0
    for step in range(4):
        found = _step(aggregator, variables, step)
        everyone = communicator.all_gather_object([g.tobytes() for g in found])
        assert all(other == everyone[0] for other in everyone)
        for place, exact in enumerate(_exact(variables, communicator.size, step)):
            arrived[place] += found[place]
            sent[place] += exact
            largest = max(largest, float(np.abs(exact).max()))
    np.testing.assert_allclose(arrived[1], sent[1], atol=1e-5)  # too small to be encoded
    if name.startswith("ef-"):
        state = aggregator.state()
        examples = max(1, sum(range(communicator.size)))
        left = state["first:w"].astype(float).sum(axis=0) / examples
        if "second:w" in state:
            left = left + state["second:w"]
        np.testing.assert_allclose(arrived[0] + left.reshape(61, 37), sent[0], atol=5e-5)
        assert np.abs(left).max() > 1e-3
    else:
        # Four steps of two stages, each off by a whole step of 8 bits at most; stage one of all ranks.
        assert 0 < np.abs(arrived[0] - sent[0]).max() < 4 * 4 * largest * communicator.size / 127
    if communicator.size == 1:
        assert aggregator.wire_bytes == 0
    else:
        assert 0 < aggregator.wire_bytes < 2 * 4 * (61 * 37 + 7)


@pytest.mark.parametrize("name", [*NAMES, "powersgd:1"])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(communicator, name):
    variables, again = _model(), _model()
    aggregator = Compressed(communicator, name, min_elements=20)
    for step in range(2):
        _step(aggregator, variables, step)
    state = aggregator.state()
    assert len({str(sorted(s.items())) for s in communicator.all_gather_object(_bytes(state))}) == 1
    resumed = Compressed(communicator, name, min_elements=20)
    resumed.load_state(state, again)
    for step in (2, 3):
        for a, b in zip(_step(aggregator, variables, step), _step(resumed, again, step), strict=True):
            assert a.tobytes() == b.tobytes()


def _bytes(state):
    return {key: array.tobytes() for key, array in state.items()}


@pytest.mark.parametrize("ranks_before", [1, 2, 5])
def test_residuals_of_another_number_of_ranks_are_divided_anew(communicator, ranks_before):
    variables = _model()
    random = np.random.default_rng(0)
    saved = {
        "first:w": random.standard_normal((ranks_before, 61 * 37)).astype("f4"),
        "second:w": random.standard_normal(61 * 37).astype("f4"),
    }
    aggregator = Compressed(communicator, "ef-int8", min_elements=20)
    aggregator.load_state(saved, variables)
    # Gradients of zeros: what arrives, and what is left now, is what was left before.
    pairs = [(np.zeros(v.shape, "f4"), v) for v in variables]
    ((arrived, _), _) = aggregator.reduce(pairs, Ticket(examples=1))
    state = aggregator.state()
    assert state["first:w"].shape == (communicator.size, 61 * 37)
    total = saved["first:w"].astype(float).sum(axis=0) / communicator.size + saved["second:w"]
    left = state["first:w"].astype(float).sum(axis=0) / communicator.size + state["second:w"]
    np.testing.assert_allclose(arrived.reshape(-1) + left, total, atol=2e-5)
    assert split_again(saved["first:w"], communicator.size).shape == state["first:w"].shape


def test_nan_on_the_last_rank_reaches_all(communicator):
    for name in NAMES:
        variables = _model()
        gradients = [_gradient(v, communicator.rank, 0) for v in variables]
        if communicator.rank == communicator.size - 1:
            gradients[0][60, 36] = np.nan
        reduced = Compressed(communicator, name, min_elements=20).reduce(
            zip(gradients, variables, strict=True), Ticket(examples=1)
        )
        assert not np.isfinite(reduced[0][0]).all()
        assert np.isfinite(reduced[1][0]).all()


def test_all_reduce_of_bfloat16_sums_in_float32(communicator):
    import ml_dtypes

    # In bfloat16 256 + 1 is 256, so that ones would be lost one by one.
    values = np.array([256.0 if communicator.rank == 0 else 1.0, -1.0], ml_dtypes.bfloat16)
    communicator.all_reduce(values).wait()
    exact = np.array([256.0 + communicator.size - 1, -communicator.size], np.float32)
    np.testing.assert_array_equal(values, exact.astype(ml_dtypes.bfloat16))
