"""Canonical mode under mpirun: valid for any number of ranks."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
import training

from distopt import layers
from distopt.aggregators import Canonical, Ticket
from distopt.aggregators.tree import Tree
from distopt.backend import Device
from distopt.communicators import SumOrder, connect
from distopt.communicators.communicator import cut
from distopt.communicators.mpi import MpiCommunicator
from distopt.data.dataset import Dataset
from distopt.errors import CommunicatorError
from distopt.models import cifar10
from distopt.optimizers import Adam
from distopt.settings import Settings
from distopt.testing import world
from distopt.trainer import Trainer
from distopt.variables import Arena, Variable


def _network(images, training):
    x = layers.batch_normalization(images + 5.0, momentum=0.9, training=training, name="bn")
    x = layers.dense(layers.flatten(x), 8, relu=True, name="hidden")
    x = layers.dropout(x, 0.5, training=training)
    return layers.dense(x, 3, name="logits")


TASK = dataclasses.replace(
    training.TASK, model=_network, optimizer=lambda rate, n, batch, **options: Adam(0.01, **options)
)


def _digest(communicator, replicas=1, **settings):
    made = training.trainer(communicator, replicas, TASK, **{"global_batch": 17, "canonical": 12, **settings})
    return training.run(made).digest()


def _cifar_digest(communicator, canonical):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 32, 32, 3), np.uint8)
    data = Dataset(images, random.integers(0, 10, 40), tuple("0123456789"), "random images")
    settings = Settings(global_batch=18, steps=2, canonical=canonical, log_every=100)
    return training.run(Trainer(cifar10.TASK, data, communicator, [Device()], settings)).digest()


def _alone(communicator, train):
    """What one process gets; rank 0 trains, the others wait."""
    if communicator.rank == 0:
        with connect("local") as alone:
            return communicator.broadcast_object(train(alone))
    return communicator.broadcast_object(None)


@pytest.mark.parametrize("overlap", [False, True])
def test_digests_are_those_of_other_worlds_with_overlap_on_and_off(communicator, overlap):
    expected = _alone(communicator, _digest)
    if communicator.rank == 0:
        assert set(world(3, _digest)) == {expected}
    with connect("mpi", overlap=overlap) as ranks:
        found = {_digest(ranks), _digest(ranks, bucket_bytes=64)}
        found |= {_digest(ranks, 3)}
    assert found == {expected}


@pytest.mark.parametrize("algorithm", ["shared", "mpi"])
def test_ranks_combine_by_shared_memory_and_by_messages_to_the_same_bits(communicator, algorithm):
    ranks = communicator.size
    with connect("mpi", algorithm=None if ranks == 1 else algorithm) as forced:
        for shards, size in itertools.product(range(ranks, 10), (0, 1, ranks - 1, ranks + 1, 100_003)):
            tree = Tree(shards)
            nodes = [tree.nodes_of(range(part.start, part.stop)) for part in cut(shards, ranks)]
            order = tree.order_of(nodes)
            leaves = {node: _floats(node, size) for own in nodes for node in own}
            # Two more than ranks need, and not in one order: they say where theirs are.
            memory = [forced.allocate(size, np.float32) for _ in range(max(order.counts) + 2)]
            arrays = np.random.default_rng(forced.rank).permutation(len(memory))[: order.counts[forced.rank]]
            arrays = [memory[i] for i in arrays]
            assert [forced.is_shared(a) for a in arrays] == [
                ranks > 1 and size > 0 and algorithm == "shared"
            ] * len(arrays)
            for array, node in zip(arrays, nodes[forced.rank], strict=True):
                array[...] = leaves[node]
            expected = tree.fold(dict(leaves), np.add)
            assert forced.combine([a.copy() for a in arrays], order).wait().tobytes() == expected.tobytes()
            assert forced.combine(arrays, order).wait() is arrays[-1]
            assert arrays[-1].tobytes() == expected.tobytes()
            forced.barrier()


def _floats(node, size):
    random = np.random.default_rng([*node, size])
    return (random.standard_normal(size) * 10.0 ** random.integers(-3, 4, size)).astype("f4")


def test_sums_in_shared_memory_go_on_while_this_rank_does_other_things(communicator):
    if communicator.size == 1:
        pytest.skip("one rank waits for nobody")
    counts = (2,) * communicator.size
    order = SumOrder(counts, tuple((0, other) for other in range(1, sum(counts))))
    with connect("mpi", algorithm="shared") as forced:
        left, right = (forced.allocate(200 * 70, np.float64) for _ in range(2))
        left[...], right[...] = forced.rank, 1
        parts = [slice(start, start + 70) for start in range(0, left.size, 70)]  # more than may be in flight
        first = forced.combine([left[parts[0]], right[parts[0]]], order)
        # No rank waits before all have started: one that blocked in `combine` would hang here.
        communicator.barrier()
        deadline = time.monotonic() + 60
        while not first.test() and time.monotonic() < deadline:
            forced.progress()
        assert first.test()
        pending = [forced.combine([left[p], right[p]], order) for p in parts[1:]]
        for one in pending:
            one.wait()
        total = forced.size * (forced.size - 1) / 2 + forced.size
        np.testing.assert_array_equal(right, total)


def test_memory_that_only_some_ranks_share_is_told_when_calls_are_compared(communicator):
    if communicator.size == 1:
        pytest.skip("one rank shares with nobody")
    counts = (2,) * communicator.size
    order = SumOrder(counts, tuple((0, other) for other in range(1, sum(counts))))
    with MpiCommunicator(algorithm="shared", checked=True) as forced:
        shared = [forced.allocate(8, np.float32) for _ in range(2)]
        arrays = shared if forced.rank else [np.zeros(8, np.float32) for _ in range(2)]
        with pytest.raises(CommunicatorError, match=r"memory of `allocate` on some ranks .* \[False, True"):
            forced.combine(arrays, order)


@pytest.mark.parametrize("dtypes", [("f4",), ("f4", "f2")])
@pytest.mark.parametrize("in_shared_memory", [True, False])
@pytest.mark.parametrize("shards", [4, 7])
def test_gradients_have_the_bits_of_the_tree_wherever_the_arena_lies(
    communicator, shards, in_shared_memory, dtypes
):
    with connect("mpi", algorithm=None if communicator.size == 1 else "shared") as forced:
        variables = [
            Variable(np.zeros(size, dtype), name=f"{size} {dtype}") for size in (3001, 5) for dtype in dtypes
        ]
        Arena(variables, allocate=forced.allocate if in_shared_memory else None)
        aggregator = Canonical(forced, shards, "sum", bucket_bytes=1000)
        streamed = []
        for _ in range(3):
            found = aggregator.reduce_shards(_shards_of(aggregator, variables, streamed))
            for gradient, variable in found:
                leaves = {(s, s + 1): _floats((s, s + 1), variable.size) for s in range(shards)}
                if variable.dtype == np.float16:
                    leaves = {n: np.clip(v, -1e3, 1e3).astype("f2").astype("f4") for n, v in leaves.items()}
                expected = Tree(shards).fold(leaves, np.add).astype(variable.dtype)
                assert gradient.tobytes() == expected.tobytes()
        # From the second step on, buckets of the shared arena go before the last gradient is there.
        if in_shared_memory and forced.size > 1:
            assert streamed[0] == 0
            assert min(streamed[1:]) > 0


def _shards_of(aggregator, variables, streamed):
    for shard in aggregator.own_shards:

        def pairs(shard=shard):
            before = aggregator.communicator.calls["combine"]
            for variable in reversed(variables):  # as backward has them, in the arena's order
                values = _floats((shard, shard + 1), variable.size)
                variable.gradient[...] = (
                    np.clip(values, -1e3, 1e3) if variable.dtype == np.float16 else values
                )
                yield variable.gradient, variable
            if shard == aggregator.own_shards[-1]:
                streamed.append(aggregator.communicator.calls["combine"] - before)

        yield shard, pairs(), Ticket(examples=1)


def test_the_cifar_network_has_the_same_bits_on_any_number_of_ranks(communicator, monkeypatch):
    monkeypatch.setenv("DISTOPT_NUMBA", "0")  # ranks that share two cores would compile for long
    expected = _alone(communicator, lambda alone: _cifar_digest(alone, 6))
    assert _cifar_digest(communicator, 6) == expected


def test_plain_training_of_the_cifar_network_has_not(communicator, monkeypatch):
    monkeypatch.setenv("DISTOPT_NUMBA", "0")
    expected = _alone(communicator, lambda alone: _cifar_digest(alone, None))
    assert (_cifar_digest(communicator, None) == expected) == (communicator.size == 1)


def test_a_canonical_checkpoint_goes_on_on_any_number_of_ranks(communicator, tmp_path_factory):
    folder = communicator.broadcast_object(tmp_path_factory.mktemp("run"))
    expected = _alone(communicator, lambda alone: _digest(alone, steps=6))
    _alone(communicator, lambda alone: _digest(alone, steps=3, output=folder))
    made = training.trainer(communicator, 1, TASK, global_batch=17, canonical=12, steps=6, output=folder)
    assert made.resume() == "resumed after step 3"
    assert training.run(made).digest() == expected


def test_batch_normalization_over_ranks_raises_on_every_rank(communicator):
    parts = [layers.BatchNormalization(communicator=communicator), layers.Flatten(), layers.Dense(3)]
    task = dataclasses.replace(TASK, model=layers.Sequential(parts))
    made = training.trainer(communicator, 1, task, global_batch=17, canonical=5)
    with pytest.raises(ValueError, match="the model communicates in its forward pass"):
        training.run(made)
    communicator.barrier()


def test_fewer_shards_than_ranks_are_refused(communicator):
    if communicator.size == 1:
        pytest.skip("one rank has a shard always")
    with pytest.raises(ValueError, match="canonical shard"):
        Canonical(communicator, communicator.size - 1)
