"""Sharded: sums as AllReduce's, parts of ranks, what is sent, and training with divided slots."""

import numpy as np
import pytest
import training

from distopt.aggregators import AllReduce, Sharded, Ticket
from distopt.aggregators.ownership import Layout, Ownership
from distopt.communicators import connect
from distopt.errors import CommunicatorError
from distopt.exchange import make_aggregator
from distopt.models import Task
from distopt.optimizers import LAMB, SGD, Adam, LossScaleOptimizer
from distopt.settings import Settings
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable

RANKS = [1, 2, 3, 4]
SHAPES = {"kernel": (9, 13), "bias": (13,), "scale": ()}


def variables():
    return [Variable(np.zeros(shape, "f4"), name=name) for name, shape in SHAPES.items()]


def gradients(rank):
    random = np.random.default_rng(rank)
    return [np.asarray(random.standard_normal(shape), "f4") for shape in SHAPES.values()]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("arena", [True, False])
def test_sums_have_the_bits_of_an_all_reduce_in_rank_order(ranks, arena):
    # Rank 2 has nothing, the others 1, 2 and 4 examples.
    def rank(communicator, aggregator):
        own = variables()
        if arena:
            Arena(own)
        found = [None] * 3 if communicator.rank == 2 else gradients(communicator.rank)
        examples = (1.0, 2.0, 0.0, 4.0)[communicator.rank]
        made = aggregator(communicator, "mean", 100)
        pairs = made.reduce(zip(found, own, strict=True), Ticket(examples=examples))
        return [np.array(g) for g, _ in pairs], made.ticket.examples

    wanted, examples = world(ranks, lambda communicator: rank(communicator, AllReduce))[0]
    assert examples == (1.0, 3.0, 3.0, 7.0)[ranks - 1]
    for found, _ in world(ranks, lambda communicator: rank(communicator, Sharded)):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ranks", RANKS)
def test_parts_are_right_where_a_rank_owns_them_and_cover_all(ranks):
    def rank(communicator):
        own = variables()
        (slab,) = Arena(own).slabs
        made = Sharded(communicator, "sum", 100)
        made.reduce_parts([(np.full(v.shape, 1.0 + communicator.rank, "f4"), v) for v in own])
        layout = made.ownership.divide("elements").layout(slab)
        mine = [piece for piece, _ in layout.pieces(0, slab.values.size)]
        total = np.zeros(slab.values.size, "f4")
        for variable in own:
            total[variable.start : variable.start + variable.size] = ranks * (ranks + 1) / 2
        for piece in mine:
            np.testing.assert_array_equal(slab.gradients[piece], total[piece])
        return sorted(i for piece in mine for i in range(piece.start, piece.stop))

    assert sorted(element for found in world(ranks, rank) for element in found) == list(range(128 + 64 + 64))


@pytest.mark.parametrize(
    ("build", "gathers"),
    [
        (lambda **o: Adam(**o), 1),  # of the values
        (lambda **o: Adam(clipnorm=1.0, **o), 2),  # and of the gradients
        (lambda **o: Adam(gradient_transformers=[lambda pairs: pairs], **o), 2),
        (lambda **o: LossScaleOptimizer(Adam(**o)), 2),
        (lambda **o: SGD(**o), 1),  # of the gradients: there are no slots to divide
    ],
)
def test_gradients_are_gathered_only_where_something_looks_at_them(build, gathers):
    def rank(communicator):
        own = variables()
        Arena(own)
        optimizer = build(gradient_aggregator=Sharded(communicator, "sum", 64 * 4))
        optimizer.apply_gradients(zip(gradients(communicator.rank), own, strict=True))
        return communicator.calls["reduce_scatter"], communicator.calls["all_gather_parts"]

    # 9 * 13 elements take two lines of 64, the others one each: four buckets.
    assert world(2, rank) == [(4, 4 * gathers)] * 2


def test_values_are_gathered_only_of_buckets_that_were_updated():
    def rank(communicator):
        own = variables()
        Arena(own)
        optimizer = Adam(gradient_aggregator=Sharded(communicator, "sum", 64 * 4))
        bias = gradients(communicator.rank)[1]
        optimizer.apply_gradients(zip((None, bias, None), own, strict=True))
        return communicator.calls["all_gather_parts"]

    assert world(2, rank) == [1, 1]


def test_values_of_layers_are_gathered_in_one_message():
    def rank(communicator):
        own = variables()
        Arena(own)
        optimizer = LAMB(gradient_aggregator=Sharded(communicator, "sum"))
        optimizer.apply_gradients(zip(gradients(communicator.rank), own, strict=True))
        return communicator.calls["all_gather_rows"], communicator.calls["broadcast"]

    assert world(3, rank) == [(1, 0)] * 3


def test_a_step_without_examples_changes_and_gathers_nothing():
    def rank(communicator):
        own = variables()
        Arena(own)
        optimizer = Adam(gradient_aggregator=Sharded(communicator, "mean"))
        optimizer.apply_gradients([(None, v) for v in own], examples=0)
        return (
            optimizer.step,
            communicator.calls["all_gather_parts"],
            [float(abs(v.numpy()).sum()) for v in own],
        )

    assert world(2, rank) == [(0, 0, [0.0] * 3)] * 2


def test_the_time_for_the_values_of_others_is_counted():
    def rank(communicator):
        own = variables()
        Arena(own)
        made = Sharded(communicator, "sum")
        Adam(gradient_aggregator=made).apply_gradients(zip(gradients(0), own, strict=True))
        return made.ownership.gather_seconds, made.wire_bytes

    for seconds, sent in world(2, rank):
        assert seconds > 0
        assert sent == 4 * 256  # what was given to reduce_scatter


def test_a_rank_that_does_not_shard_is_found_in_the_first_step():
    def rank(communicator):
        own = variables()
        Arena(own)
        made = (Sharded if communicator.rank == 1 else AllReduce)(communicator, "sum")
        with pytest.raises(
            CommunicatorError, match=r"rank 1 .* aggregates by Sharded\(.*rank 0 by AllReduce\("
        ):
            made.reduce(zip(gradients(0), own, strict=True))

    world(2, rank)


def test_a_sparse_gradient_with_a_constraint_is_refused_before_anything_is_sent():
    def rank(communicator):
        table = Variable(np.ones((4, 2), "f4"), name="table", constraint=lambda w: w)
        optimizer = Adam(gradient_aggregator=Sharded(communicator, "sum"))
        rows = IndexedSlices(np.ones((1, 2), "f4"), np.array([1]), (4, 2))
        with pytest.raises(RuntimeError, match="constraint"):
            optimizer.apply_gradients([(rows, table)])

    world(2, rank)


def test_a_layout_lays_parts_one_after_the_other():
    layout = Layout([slice(2, 5), slice(5, 6), slice(6, 6), slice(10, 14)])
    assert layout.size == 8
    assert list(layout.pieces(0, 20)) == [(slice(2, 6), slice(0, 4)), (slice(10, 14), slice(4, 8))]
    assert list(layout.pieces(4, 11)) == [(slice(4, 6), slice(2, 4)), (slice(10, 11), slice(4, 5))]
    assert list(layout.pieces(6, 10)) == []


def test_a_variable_goes_to_the_rank_that_has_least():
    def rank(communicator):
        ownership = Ownership(communicator, 100)
        own = [Variable(np.zeros(size, "f4"), name="v") for size in (3, 1, 1, 2, 5)]
        first = [ownership.owner(variable) for variable in own]
        again = [ownership.owner(variable) for variable in own[::-1]]
        return first, again[::-1], ownership.loads

    # 12 bytes to rank 0; 4, 4 and 8 to rank 1, which has less each time; then 20 to rank 0, which has.
    assert world(2, rank) == [([0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [32, 16])] * 2


def test_settings_ask_for_it():
    with connect("local") as communicator:
        assert type(make_aggregator(Settings(8, 1), communicator)) is AllReduce
        made = make_aggregator(Settings(8, 1, shard_optimizer=True, bucket_bytes=64), communicator)
        assert (type(made), made.bucket_bytes, made.reduction) == (Sharded, 64, "mean")


def _task(build):
    return Task(**{**vars(training.TASK), "optimizer": lambda rate, examples, batch, **o: build(**o)})


TASKS = {
    "Adam": _task(lambda **o: Adam(0.01, **o)),
    "Adam, clipped": _task(lambda **o: Adam(0.01, global_clipnorm=0.1, **o)),
    "LAMB": _task(lambda **o: LAMB(0.01, **o)),
    "loss scale": _task(lambda **o: LossScaleOptimizer(SGD(0.05, 0.9, **o), initial_scale=8.0)),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_training_has_the_bits_of_the_undivided_one(name, ranks):
    def rank(communicator, shard):
        settings = {"global_batch": 17, "bucket_bytes": 300, "shard_optimizer": shard}
        made = training.trainer(communicator, 2, TASKS[name], **settings)
        return training.state(training.run(made)), made.optimizer.is_divided

    wanted = world(ranks, lambda communicator: rank(communicator, False))
    for (found, divided), (expected, _) in zip(
        world(ranks, lambda communicator: rank(communicator, True)), wanted, strict=True
    ):
        assert divided
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.mark.parametrize("name", ["Adam", "LAMB"])
def test_a_training_is_resumed_divided_or_not_on_other_ranks(name, tmp_path):
    def first(communicator):
        made = training.trainer(
            communicator, task=TASKS[name], output=tmp_path, shard_optimizer=True, bucket_bytes=300
        )
        return training.state(training.run(made))

    written = world(4, first)[0]

    def second(communicator, shard):
        made = training.trainer(communicator, task=TASKS[name], output=tmp_path, shard_optimizer=shard)
        assert made.resume() == "resumed after step 4"
        return training.state(made)

    for ranks, shard in ((1, False), (2, False), (1, True), (3, True)):
        for found in world(ranks, lambda communicator, shard=shard: second(communicator, shard)):
            assert found.keys() == written.keys()
            for key, value in written.items():
                np.testing.assert_array_equal(found[key], value, err_msg=key)
