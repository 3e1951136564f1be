"""What goes wrong in aggregators: halves out of range, wrappers that lose something, wrong arguments."""

import re

import numpy as np
import pytest

from distopt.aggregators import (
    Accumulate,
    Adasum,
    AllReduce,
    Canonical,
    Compressed,
    Delayed,
    Grouped,
    LocalSGD,
    Sharded,
    Ticket,
)
from distopt.communicators import LocalCommunicator
from distopt.optimizers import Adam
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

LOCAL = LocalCommunicator()

MAKE = {
    "AllReduce": AllReduce,
    "Sharded": Sharded,
    "Canonical": Canonical,
    "Compressed, small": lambda c: Compressed(c, "bf16"),
    "Adasum": Adasum,
    "LocalSGD": lambda c: LocalSGD(c, 4),
    "Delayed": lambda c: Delayed(AllReduce(c)),
}


def _reduced(aggregator, pairs, examples):
    reduced = aggregator.reduce(pairs, Ticket(examples=examples))
    if isinstance(aggregator, Delayed):
        reduced = aggregator.flush()
    return reduced


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_mean_of_halves_whose_sum_is_out_of_range_is_exact(name, arena, ranks):
    def run(communicator):
        own = [Variable(np.zeros(n, np.float16), name=f"v{n}") for n in (5, 1, 7)]
        if arena:
            Arena(own)
        pairs = [(np.full(v.shape, 60000, np.float16), v) for v in own]
        return [g.tolist() for g, _ in _reduced(MAKE[name](communicator), pairs, 1.0)]

    assert world(ranks, run) == [[[60000.0] * n for n in (5, 1, 7)]] * ranks


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("arena", [True, False])
def test_halves_are_divided_by_more_examples_than_a_half_can_count(name, arena):
    def run(communicator):
        own = [Variable(np.zeros(6, np.float16), name="v")]
        if arena:
            Arena(own)
        pairs = [(np.full(6, 40000, np.float16), own[0])]
        return [g.tolist() for g, _ in _reduced(MAKE[name](communicator), pairs, 80000.0)]

    assert world(2, run) == [[[0.5] * 6]] * 2


@pytest.mark.parametrize("sparse", ["rows", "dense"])
def test_rows_of_halves_are_summed_and_divided_in_float32(sparse):
    def run(communicator):
        table = Variable(np.zeros((4, 2), np.float16), name="table")
        rows = IndexedSlices(np.full((1, 2), 60000, np.float16), np.array([communicator.rank // 2]), (4, 2))
        aggregator = AllReduce(communicator, sparse=sparse)
        ((found, _),) = aggregator.reduce([(rows, table)], Ticket(examples=2 / 3))
        return found.values.dtype, found.values.tolist(), found.indices.tolist()

    # 120000 and 60000, over 2
    assert world(3, run) == [(np.float16, [[60000.0] * 2, [30000.0] * 2], [0, 1])] * 3


def test_rows_by_one_rank_are_divided_by_more_examples_than_a_half_can_count():
    def run(communicator):
        table = Variable(np.zeros((4, 2), np.float16), name="table")
        rows = IndexedSlices(np.full((1, 2), 40000, np.float16), np.array([3]), (4, 2))
        ((found, _),) = LocalSGD(communicator, 4).reduce([(rows, table)], Ticket(examples=80000))
        return found.values.tolist()

    assert world(2, run) == [[[0.5, 0.5]]] * 2


@pytest.mark.parametrize("make", [AllReduce, Sharded, Canonical])
def test_a_sum_of_halves_that_is_not_divided_may_be_infinite(make):
    def run(communicator):
        own = [Variable(np.zeros(3, np.float16), name="v")]
        Arena(own)
        aggregator = make(communicator, reduction="sum")
        ((found, _),) = aggregator.reduce([(np.array([1, 2.5, 60000], np.float16), own[0])])
        return found.dtype, found.tolist()

    assert world(2, run) == [(np.float16, [2.0, 5.0, np.inf])] * 2


@pytest.mark.parametrize("wrong", [2.5, True, "4", np.float32(3), [2]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda c, n: Accumulate(AllReduce(c), n), "steps"),
        (LocalSGD, "every"),
        (lambda c, n: LocalSGD(c, 2, n), "start"),
        (lambda c, n: Canonical(c, n), "shards"),
        (lambda c, n: AllReduce(c, bucket_bytes=n), "bucket_bytes"),
        (lambda c, n: Sharded(c, bucket_bytes=n), "bucket_bytes"),
        (lambda c, n: Compressed(c, "fp16", min_elements=n), "min_elements"),
    ],
)
def test_counts_that_are_no_whole_numbers_are_refused_by_name(make, name, wrong):
    with pytest.raises(TypeError, match=rf"{name}.* must be a whole number.*got {re.escape(repr(wrong))}"):
        make(LOCAL, wrong)
    assert make(LOCAL, np.int64(3))
    with pytest.raises(ValueError, match=rf"{name}.* must be at least [01], got -1"):
        make(LOCAL, -1)


@pytest.mark.parametrize("wrap", [lambda a: Accumulate(a, 2), Delayed, lambda a: Accumulate(Delayed(a), 2)])
@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_wrapped_sharded_divides_the_slots_and_gives_the_same_bits(wrap, arena, ranks):
    def run(communicator, make):
        random = np.random.default_rng(communicator.rank)
        own = [Variable(np.ones(s, "f4"), name=f"v{i}") for i, s in enumerate([(9, 13), (5,), (16, 4)])]
        if arena:
            Arena(own)
        optimizer = Adam(0.1, gradient_aggregator=wrap(make(communicator, "mean", 64 * 4)))
        for step in range(6):
            examples = (communicator.rank + step) % 3
            pairs = [(random.normal(size=v.shape).astype("f4") * examples, v) for v in own]
            optimizer.apply_gradients(pairs, examples=examples)
        rest = optimizer.gradient_aggregator.flush()
        if rest:
            optimizer.apply_gradients(rest, experimental_aggregate_gradients=False)
        slots = optimizer.slot_bytes()
        return [v.numpy().tobytes() for v in own], [w.tobytes() for w in optimizer.get_weights()], slots

    whole, divided = world(ranks, lambda c: run(c, AllReduce)), world(ranks, lambda c: run(c, Sharded))
    assert [found[:2] for found in divided] == [found[:2] for found in whole]
    assert [found[2] for found in whole] == [2 * 4 * (256 if arena else 9 * 13 + 5 + 64)] * ranks
    assert sum(found[2] for found in divided) == whole[0][2]  # in an arena in lines of 64


def test_sharded_is_refused_where_slots_cannot_be_divided():
    for inner in (Sharded(LOCAL), Accumulate(Sharded(LOCAL), 2)):
        with pytest.raises(
            ValueError, match=r"LocalSGD can't begin with .*, which divides the optimizer's slots"
        ):
            LocalSGD(LOCAL, 4, 2, inner)
    with pytest.raises(TypeError, match=r"Grouped can't hold Sharded \('all'\), which divides the slots"):
        Grouped({"all": Sharded(LOCAL)}, lambda variable: "all")


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("make", "times"),  # the bytes of gradients, and (ranks - 1) / ranks
    [
        (AllReduce, 2),
        (Sharded, "parts"),
        (Canonical, 2),
        (lambda c: LocalSGD(c, 1), 2),
        (lambda c: LocalSGD(c, 1, 1), 2),
        (lambda c: Accumulate(AllReduce(c), 1), 2),
        (lambda c: Accumulate(Sharded(c), 1), 3),  # parts are summed, gradients gathered, values gathered
        (lambda c: Delayed(AllReduce(c)), 2),
        (Adasum, 2),
    ],
)
def test_wire_bytes_are_what_a_rank_sends_to_others_in_any_aggregator(make, times, ranks, arena):
    def run(communicator):
        own = [Variable(np.zeros(n, "f4"), name=f"v{n}") for n in (64, 128)]
        if arena:
            Arena(own)
        aggregator = make(communicator)
        Adam(gradient_aggregator=aggregator).apply_gradients([(v.numpy() + 1, v) for v in own], examples=2)
        products = 0
        if isinstance(aggregator, Adasum):  # three float64 for each variable and couple
            products = sum(
                2 * 3 * 8 * 2 * n * (ranks - 1) // ranks for n in {1: [], 2: [1], 4: [2, 1]}[ranks]
            )
        return aggregator.wire_bytes - products

    sent = world(ranks, run)
    if times == "parts":  # gradients are gathered only where they are packed
        times = 2 if arena else 3
    if not arena and times == 3:  # values of whole variables go from their owners
        assert sum(sent) == ranks * 2 * 192 * 4 * (ranks - 1) // ranks + 192 * 4 * (ranks - 1)
    else:
        assert sent == [times * 192 * 4 * (ranks - 1) // ranks] * ranks


def test_wire_bytes_of_rows():
    def run(communicator, mode):
        rows = IndexedSlices(np.ones((2, 4), "f4"), np.array([1, 3]), (30, 4))
        aggregator = AllReduce(communicator, "sum", sparse=mode)
        aggregator.reduce([(rows, Variable(np.zeros((30, 4), "f4"), name="t"))])
        return aggregator.wire_bytes

    assert world(3, lambda c: run(c, "rows")) == [2 * 2 * (16 + 8)] * 3
    assert world(3, lambda c: run(c, "dense")) == [2 * 30 * (16 + 4) * 2 // 3] * 3
    assert world(1, lambda c: run(c, "rows")) == world(1, lambda c: run(c, "dense")) == [0]
