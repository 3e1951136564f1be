"""Compressed over ranks as threads; the same claims under mpirun are in tests/distributed."""

import numpy as np
import pytest
from codec_cases import FEEDBACK, NAMES, RANKS, bits, gradients_of, model, one_step

from distopt.aggregators import AllReduce, Compressed, Ticket, codecs
from distopt.aggregators.codecs import Codec, Half, Int8
from distopt.communicators import LocalCommunicator
from distopt.errors import CommunicatorError
from distopt.testing import world
from distopt.variables import IndexedSlices


@pytest.mark.parametrize("name", NAMES + FEEDBACK)
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_get_the_same_bits_whatever_the_codec(name, in_arena, ranks):
    def run(communicator):
        variables = model(in_arena)
        aggregator = Compressed(communicator, name, bucket_bytes=300, min_elements=4)
        return [bits(one_step(aggregator, variables, step)) for step in range(3)]

    first, *others = world(ranks, run)
    assert all(other == first for other in others)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize(("name", "error"), [("fp16:64", 2.0**-11), ("bf16", 2.0**-8), ("int8:64", 1 / 254)])
def test_the_mean_over_unequal_ranks_is_off_by_the_codecs_error_twice(ranks, in_arena, name, error):
    def run(communicator):
        variables = model(in_arena)
        return one_step(Compressed(communicator, name, bucket_bytes=300, min_elements=0), variables, 0)

    examples = ranks * (ranks + 1) / 2
    every = [gradients_of(model(False), rank, 0) for rank in range(ranks)]
    for found in world(ranks, run):
        for number, gradient in enumerate(found):
            exact = sum(g[number].astype(float) for g in every) / examples
            # Each rank's numbers are off by at most error * its largest number of all; their sum, divided,
            # is off by the sum of that, and once more by error * its own largest.
            largest = sum(max(np.abs(g).max() for g in gradients) for gradients in every) / examples
            assert np.abs(gradient - exact).max() <= 2.01 * error * largest


@pytest.mark.parametrize("ranks", RANKS)
def test_numbers_that_a_codec_holds_exactly_are_summed_exactly(ranks):
    # Integers below 2048 are halves; so is the sum of four of these below 512, divided by 2.
    def run(communicator):
        variables = model()
        aggregator = Compressed(communicator, "fp16", bucket_bytes=256, min_elements=0)
        rank = communicator.rank
        pairs = [(np.full(v.shape, (rank + 1) * 100 + i, "f4"), v) for i, v in enumerate(variables)]
        reduced = aggregator.reduce(pairs, Ticket(examples=2.0 if rank == ranks - 1 else 0.0))
        return [set(g.reshape(-1).tolist()) for g, _ in reduced]

    expected = [{(100 * ranks * (ranks + 1) / 2 + ranks * i) / 2} for i in range(4)]
    assert world(ranks, run) == [expected] * ranks


@pytest.mark.parametrize("codec", ["fp16", "topk:0.5:fp16"])
def test_four_ranks_of_30000_do_not_overflow_half_precision(codec):
    # Summed in half precision, 4 * 30000 is infinite, and dividing comes too late.
    def run(communicator):
        (variable,) = model(shapes={"w": (64,)})
        pairs = [(np.full(64, 30000.0, "f4"), variable)]
        ((gradient, _),) = Compressed(communicator, codec, min_elements=0).reduce(pairs, Ticket(examples=1))
        return float(gradient.max())

    assert world(4, run) == [30000.0] * 4


def test_halves_are_summed_in_float32():
    # In half precision 2048 + 1 is 2048, so that three ranks' ones would be lost.
    def run(communicator):
        (variable,) = model(shapes={"w": (64,)})
        value = 2048.0 if communicator.rank == 0 else 1.0
        pairs = [(np.full(64, value, "f4"), variable)]
        aggregator = Compressed(communicator, "fp16", "sum", min_elements=0)
        return float(aggregator.reduce(pairs)[0][0][0])

    # 2051 is odd: as a half it is 2052 (to even), not 2048.
    assert world(4, run) == [2052.0] * 4


@pytest.mark.parametrize("name", NAMES + FEEDBACK)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_on_one_rank_is_not_finite_on_all(name, bad):
    def run(communicator):
        variables = model()
        gradients = gradients_of(variables, communicator.rank, 0)
        if communicator.rank == 1:
            gradients[0][5, 5] = bad
        aggregator = Compressed(communicator, name, bucket_bytes=300, min_elements=0)
        reduced = aggregator.reduce(zip(gradients, variables, strict=True), Ticket(examples=1))
        return bool(np.isfinite(reduced[0][0]).all())

    assert world(3, run) == [False] * 3


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["int8:64", "ef-topk:0.2", "ef-powersgd:1"])
@pytest.mark.parametrize("in_arena", [True, False])
def test_missing_and_sparse_gradients_are_as_in_all_reduce(ranks, name, in_arena):
    def run(communicator):
        results = []
        for make in (lambda: AllReduce(communicator), lambda: Compressed(communicator, name)):
            variables = model(in_arena, {"w": (4, 3), "b": (5,), "table": (6, 2), "e": (0, 3)})
            for variable in variables if in_arena else ():
                variable.gradient[...] = 99
            last = communicator.rank == communicator.size - 1
            n = communicator.rank
            rows = IndexedSlices(np.full((n, 2), 2.0, "f4"), np.ones(n, int), (6, 2))
            gradients = [np.ones((4, 3), "f4") if last else None, None, rows, np.ones((0, 3), "f4")]
            reduced = make().reduce(zip(gradients, variables, strict=True), Ticket(examples=3 if last else 0))
            results.append([_plain(gradient) for gradient, _ in reduced])
        return results

    for exact, found in world(ranks, run):
        assert found == exact  # so few numbers are sent as they are


def _plain(gradient):
    dense = gradient.to_dense() if isinstance(gradient, IndexedSlices) else gradient
    return None if dense is None else (type(gradient).__name__, np.asarray(dense).tolist())


@pytest.mark.parametrize("name", NAMES)
def test_padding_between_variables_stays_zero(name):
    with LocalCommunicator() as communicator:
        variables = model()
        one_step(Compressed(communicator, name, min_elements=0), variables, 0)
        slab = variables[0].slab
        slab.gradients[...] = np.where(slab.gradients == 0, 0, 1)
        for variable in variables:
            variable.gradient[...] = 0
        assert not slab.gradients.any()


@pytest.mark.parametrize(
    ("name", "payload"),
    [
        # 263 numbers of kernel and v go to slices of 132 and 131 numbers in blocks of 64.
        ("fp16:64", lambda n: 2 * n + -(-n // 64)),
        ("bf16", lambda n: 2 * n),
        ("int8:64", lambda n: n + 4 * -(-n // 64)),
        ("sign:64", lambda n: -(-n // 8) + 4 * -(-n // 64)),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_wire_bytes_are_what_a_rank_sends_to_others(name, payload, ranks):
    shapes = {"kernel": (193,), "v": (70,), "bias": (3,)}

    def run(communicator):
        aggregator = Compressed(communicator, name, min_elements=4)
        sent = []
        exchange, gather = communicator.all_to_all, communicator.all_gather_rows
        others = [rank for rank in range(ranks) if rank != communicator.rank]

        def exchange_and_note(parts):
            sent.extend(parts[rank].nbytes for rank in others)
            return exchange(parts)

        communicator.all_to_all = exchange_and_note
        communicator.all_gather_rows = lambda v: (sent.extend(v.nbytes for _ in others), gather(v))[1]
        one_step(aggregator, model(shapes=shapes), 0)
        assert aggregator.wire_bytes == sum(sent) + 2 * 12 * (ranks - 1) // ranks
        return aggregator.wire_bytes

    lengths = [263 // ranks + (rank < 263 % ranks) for rank in range(ranks)]
    bias = 2 * 12 * (ranks - 1) // ranks
    expected = [
        sum(payload(lengths[r]) for r in range(ranks) if r != rank)
        + (ranks - 1) * payload(lengths[rank])
        + bias
        for rank in range(ranks)
    ]
    assert world(ranks, run) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("topk:10", 2 * (4 + 4) * 10),  # to each of two others
        ("topk:10:fp16", 2 * (6 * 10 + 1)),
        ("powersgd:2", 4 * 2 * (40 + 30) * 4 // 3),  # all_reduce: 2 * 2/3 of its bytes
    ],
)
def test_wire_bytes_of_codecs_that_do_not_cut(name, expected):
    def run(communicator):
        aggregator = Compressed(communicator, name)
        shapes = {"w": (40, 30), "v": (1500,)} if "power" in name else {"w": (4000,)}
        one_step(aggregator, model(shapes=shapes), 0)
        return aggregator.wire_bytes - (1500 * 4 * 4 // 3 if "power" in name else 0)

    # P and Q are two all_reduces, each rounded down.
    assert all(expected - 1 <= found <= expected for found in world(3, run))


def test_small_variables_are_exact():
    def run(communicator):
        shapes = {"large": (50, 40), "small": (31, 33)}
        variables = model(shapes=shapes)
        found = one_step(Compressed(communicator, "ef-sign"), variables, 0)  # 2000 and 1023 numbers
        exact = one_step(AllReduce(communicator), model(shapes=shapes), 0)
        return np.array_equal(found[0], exact[0]), np.array_equal(found[1], exact[1])

    assert world(2, run) == [(False, True)] * 2


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_dtypes_are_cast_to_float32_and_back(dtype):
    def run(communicator):
        variables = model(dtype=dtype)
        found = one_step(Compressed(communicator, "fp16", min_elements=0), variables, 0)
        assert all(g.dtype == dtype for g in found)
        exact = one_step(AllReduce(communicator), model(dtype=dtype), 0)
        return max(np.abs(a.astype(float) - b).max() for a, b in zip(found, exact, strict=True))

    assert max(world(3, run)) < 4 * 2.0**-11 * 4  # numbers below 4, cast a few times


def test_float64_beyond_float32_becomes_infinite():
    with LocalCommunicator() as communicator:
        (variable,) = model(shapes={"w": (8,)}, dtype=np.float64)
        aggregator = Compressed(communicator, "ef-int8", "sum", min_elements=0)
        ((gradient, _),) = aggregator.reduce([(np.full(8, 1e300), variable)])
        assert not np.isfinite(gradient).any()


def test_wrong_arguments_are_refused():
    with LocalCommunicator() as communicator:
        with pytest.raises(ValueError, match="there is no such codec"):
            Compressed(communicator, "zip")
        with pytest.raises(TypeError, match="codec must be one of"):
            Compressed(communicator, 8)
        with pytest.raises(ValueError, match="min_elements"):
            Compressed(communicator, "fp16", min_elements=-1)
        with pytest.raises(ValueError, match="was not given"):
            Compressed(communicator, "fp16").reduce([])


def test_ranks_with_other_codecs_are_told():
    def run(communicator):
        codec = "int8" if communicator.rank == 0 else "fp16"
        one_step(Compressed(communicator, codec), model(), 0)

    with pytest.raises(CommunicatorError, match=r"rank 1 .* by Compressed.fp16.* rank 0 by .*int8"):
        world(2, run)


class Eighths(Codec):
    """Multiples of 1/8 from -16 to 15.875, a byte each; the others go to the nearest end, NaN too."""

    name = "eighths"

    def encode(self, values):
        bad = ~np.isfinite(values).all()
        steps = np.clip(np.nan_to_num(np.rint(values * 8)), -128, 127).astype(np.int8)
        return np.concatenate([[bad], steps.view(np.uint8)]).astype(np.uint8)

    def decode(self, payload, n):
        values = payload[1:].view(np.int8)[:n].astype(np.float32) / np.float32(8)
        return values * np.float32(np.nan) if payload[0] else values


@pytest.mark.parametrize("ranks", RANKS)
def test_a_codec_of_ones_own(ranks):
    def run(communicator):
        variables = model(shapes={"w": (9, 5)})
        aggregator = Compressed(communicator, codecs.ErrorFeedback(Eighths()), "sum", min_elements=0)
        arrived = sum(
            np.array(aggregator.reduce([(np.full((9, 5), 0.3, "f4"), variables[0])])[0][0]) for _ in range(20)
        )
        return float(np.abs(arrived - 20 * 0.3 * ranks).max())

    # What is left out is at most half a step: of every rank, and of the sum.
    assert max(world(ranks, run)) <= (ranks + 1) / 16 + 1e-5


def test_stage_one_and_two_use_other_random_numbers_on_each_rank():
    places = []

    class Watched(Int8):
        def at(self, place):
            places.append(place)
            return super().at(place)

    def run(communicator):
        one_step(Compressed(communicator, Watched(16, stochastic=True), min_elements=0), model(), 0)

    world(2, run)
    assert len(set(places)) == len(places) == 2 * (2 + 1)
    assert {place.stage for place in places} == {0, 1}


def test_a_codec_object_of_half_precision_is_taken_too():
    with LocalCommunicator() as communicator:
        assert Compressed(communicator, Half()).codec.name == "fp16"
