"""The pieces of a step (distopt/step.py): canonical shards, micro-batches, statistics over them."""

import dataclasses
import threading

import numpy as np
import pytest
import training

from distopt import layers, ops, scopes
from distopt.checkpoint import digest_of, latest
from distopt.communicators import connect
from distopt.errors import CheckpointError, CommunicatorError, NonFiniteError
from distopt.optimizers import SGD, Adam, LossScaleOptimizer
from distopt.settings import Settings
from distopt.step import Piece, kernels, make_pieces
from distopt.testing import world


def _network(images, training):
    x = layers.batch_normalization(images + 5.0, momentum=0.9, training=training, name="bn")
    x = layers.dense(layers.flatten(x), 8, relu=True, name="hidden")
    x = layers.dropout(x, 0.5, training=training)
    return layers.dense(x, 3, name="logits")


def _without_statistics(images, training):
    x = layers.dense(layers.flatten(images), 8, relu=True, name="hidden")
    x = layers.dropout(x, 0.5, training=training)
    return layers.dense(x, 3, name="logits")


TASK = dataclasses.replace(
    training.TASK, model=_network, optimizer=lambda rate, n, batch, **options: Adam(0.01, **options)
)
CUTS = [(1, 1), (2, 1), (3, 1), (4, 1), (7, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 2)]


def _digests(ranks, replicas=1, task=TASK, **settings):
    """Train 4 steps on 17 examples, and return the different digests of all ranks."""
    settings = {"global_batch": 17, **settings}

    def run(communicator):
        with np.errstate(all="ignore"):
            return training.run(training.trainer(communicator, replicas, task, **settings)).digest()

    return set(world(ranks, run))


@pytest.mark.parametrize("canonical", [6, 7, 17])
def test_canonical_training_has_the_same_bits_on_any_number_of_ranks_and_replicas(canonical):
    expected = _digests(1, canonical=canonical)
    assert len(expected) == 1
    for ranks, replicas in CUTS:
        if ranks * replicas <= canonical:
            assert _digests(ranks, replicas, canonical=canonical, bucket_bytes=100 * ranks) == expected
    assert _digests(2, canonical=canonical - 1) != expected  # other sums: the number is part of the result


def test_plain_training_has_other_bits_on_other_numbers_of_ranks():
    task = dataclasses.replace(TASK, model=training.network)  # even without local statistics
    alone, two, three = (_digests(ranks, task=task) for ranks in (1, 2, 3))
    assert not alone & two | alone & three | two & three


@pytest.mark.parametrize("model", [_without_statistics, training.network])
def test_canonical_training_is_that_of_the_whole_batch_but_for_rounding(model):
    # The second has a regularization loss, which must count once.
    task = dataclasses.replace(training.TASK, model=model)

    def run(communicator, **settings):
        made = training.trainer(communicator, 1, task, global_batch=17, **settings)
        return training.state(training.run(made))

    expected = world(1, run)[0]
    for found in world(3, lambda c: run(c, canonical=7)):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_statistics_become_the_weighted_mean_of_what_each_shard_made_of_them():
    seen = []

    def model(images, training):
        if training:
            seen.append(images.shape[0])
        return _network(images, training)

    task = dataclasses.replace(TASK, model=model)
    with connect("local") as communicator:
        made = training.trainer(communicator, 1, task, global_batch=17, canonical=5, steps=1)
        batches = made._make_batches(0)
        training.run(made)
    assert seen == [len(batch.labels) for batch in batches] == [4, 4, 3, 3, 3]
    means = [0.1 * (batch.images.astype("f8") + 5).mean((0, 1, 2)) for batch in batches]
    mean, variance = (v.numpy() for v in made.replicas[0].statistics)
    np.testing.assert_allclose(mean, np.average(means, axis=0, weights=seen), rtol=1e-6)
    variances = [
        b.images.astype("f8").var((0, 1, 2)) * (n := b.images[..., 0].size) / (n - 1) for b in batches
    ]
    expected = 0.9 + 0.1 * np.average(variances, axis=0, weights=seen)
    np.testing.assert_allclose(variance, expected, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"micro_batches": 2}, {"canonical": 2}])
def test_a_piece_of_more_examples_has_more_weight_in_the_moving_averages(settings):
    task = dataclasses.replace(TASK, model=_network)
    with connect("local") as communicator:
        made = training.trainer(communicator, 1, task, global_batch=5, steps=1, **settings)
        images = np.concatenate([batch.images for batch in made._make_batches(0)]).astype("f8")
        training.run(made)
    # A mean of means of 3 and 2 examples would be another number.
    mean = made.replicas[0].statistics[0].numpy()
    np.testing.assert_allclose(mean, 0.1 * (images + 5).mean((0, 1, 2)), rtol=1e-5)


def test_statistics_that_are_no_floats_become_what_the_first_shard_made_of_them():
    def model(images, training):
        counter = scopes.get_variable("counter", initializer=np.int64(40), trainable=False)
        if training:
            first = int(scopes.get_default_graph().open_step.first_example)
            counter.assign_add(np.int64(first + 2))
        return _network(images, training)

    task = dataclasses.replace(TASK, model=model)

    def run(communicator):
        made = training.run(training.trainer(communicator, 1, task, global_batch=17, canonical=5, steps=3))
        (counter,) = (v for v in made.replicas[0].statistics if v.name == "counter")
        return counter.numpy().tolist(), counter.dtype

    for ranks in (1, 2, 3):
        assert world(ranks, run) == [(46, np.int64)] * ranks


@pytest.mark.parametrize("settings", [{"canonical": 5}, {"micro_batches": 3}])
@pytest.mark.parametrize("infinite", ["loss", "gradient"])
def test_a_step_that_is_not_done_leaves_weights_and_statistics(settings, infinite):
    parts = [layers.BatchNormalization(momentum=0.5, name="bn"), layers.Flatten(), layers.Dense(3)]
    task = dataclasses.replace(TASK, model=layers.Sequential(parts))

    def run(communicator):
        made = training.trainer(communicator, 1, task, global_batch=17, steps=1, **settings)
        before = training.state(made)
        if communicator.rank == communicator.size - 1:
            make, stream = made._make_batches, made.replicas[0].gradients

            def spoiled_batches(step):
                batches = make(step)
                batches[-1].images[:] = np.nan
                return batches

            def spoiled_stream(tape, loss, scale):
                for gradient, variable in stream(tape, loss, scale):
                    gradient[...] = np.inf
                    yield gradient, variable

            if infinite == "loss":
                made._make_batches = spoiled_batches
            else:
                made.replicas[0].gradients = spoiled_stream
        with np.errstate(all="ignore"), pytest.raises(NonFiniteError):
            training.run(made)
        after = training.state(made)
        return all(np.array_equal(after[name], value) for name, value in before.items())

    for ranks in (1, 2):
        assert world(ranks, run) == [True] * ranks


def test_batch_normalization_over_ranks_is_refused_on_every_rank_instead_of_waiting():
    def run(communicator):
        parts = [layers.BatchNormalization(communicator=communicator), layers.Flatten(), layers.Dense(3)]
        task = dataclasses.replace(TASK, model=layers.Sequential(parts))
        made = training.trainer(communicator, 1, task, global_batch=17, canonical=5)
        with pytest.raises(ValueError, match=r"model communicates in its forward pass \(batch_normalization"):
            training.run(made)
        return "raised"

    for ranks in (1, 2, 3):  # 5 shards: with 2 or 3 ranks not all have equally many
        assert world(ranks, run) == ["raised"] * ranks


def test_a_dynamic_loss_scale_keeps_the_bits_on_any_number_of_ranks():
    def optimizer(rate, examples, batch, **options):
        return LossScaleOptimizer(SGD(0.05, 0.9, **options), initial_scale=2.0**126, dynamic_growth_steps=2)

    task = dataclasses.replace(TASK, optimizer=optimizer)
    expected = _digests(1, task=task, canonical=6)
    assert _digests(3, task=task, canonical=6) == _digests(2, 2, task=task, canonical=6) == expected


def test_resuming_on_other_ranks_gives_the_bits_of_an_undisturbed_run(tmp_path):
    (expected,) = _digests(2, steps=8, canonical=6)

    def first(communicator):
        training.run(training.trainer(communicator, 1, TASK, global_batch=17, canonical=6, output=tmp_path))

    def second(communicator):
        made = training.trainer(
            communicator, 2, TASK, global_batch=17, canonical=6, output=tmp_path, steps=8, checkpoint_every=3
        )
        assert made.resume() == "resumed after step 4"
        return training.run(made).digest()

    world(3, first)
    assert world(2, second) == [expected] * 2
    _, arrays, manifest, _ = latest(tmp_path)
    assert manifest["canonical"] == 6
    assert digest_of(arrays) == expected
    with connect("local") as communicator:
        for other in (5, None):
            made = training.trainer(communicator, 1, TASK, global_batch=17, canonical=other, output=tmp_path)
            with pytest.raises(CheckpointError, match=f"trained with canonical 6, this run has {other}"):
                made.resume()


def test_a_digest_tells_any_change_of_what_training_made():
    with connect("local") as communicator:
        made = training.run(training.trainer(communicator, 1, TASK, canonical=4, global_batch=17))
        digests = {made.digest()}
        replica = made.replicas[0]
        slot = made.optimizer.get_slot(replica.variables[0], "m")
        average = made.averages.average(replica.variables[0])
        changed = [replica.variables[-1], replica.statistics[0], slot, average]
        for variable in changed:
            flat = variable.value.reshape(-1)
            flat[:1].view(np.int32)[0] ^= 1  # the last bit
            digests.add(made.digest())
    assert len(digests) == 5


@pytest.mark.parametrize("micro_batches", [2, 4])
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 1), (2, 2)])
def test_micro_batches_train_as_the_whole_batch_does(ranks, replicas, micro_batches):
    seen = []

    def model(images, training=False):
        if training:
            seen.append(images.shape[0])
        return training_network(images)

    training_network = training.network
    task = dataclasses.replace(training.TASK, model=model)

    def run(communicator, replicas=replicas, **settings):
        made = training.trainer(communicator, replicas, task, global_batch=17, **settings)
        return training.state(training.run(made))

    expected = world(1, lambda c: run(c, 1))[0]
    seen.clear()
    found = world(ranks, lambda c: run(c, micro_batches=micro_batches))
    assert len(seen) == 4 * ranks * replicas * micro_batches
    assert max(seen) <= -(-17 // (ranks * replicas * micro_batches))
    for state in found:
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
            np.testing.assert_array_equal(state[name], found[0][name])


def test_rows_and_missing_gradients_add_up_over_micro_batches():
    def model(images, training=False):
        table = scopes.get_variable("table", (17, 3), initializer=lambda shape, dtype: np.ones(shape, dtype))
        never = scopes.get_variable("never", (2,), initializer=lambda shape, dtype: np.ones(shape, dtype))
        del never
        step = scopes.get_default_graph().open_step
        places = np.arange(images.shape[0]) + step.first_example
        return ops.gather(table, places) + 0.0 * layers.dense(layers.flatten(images), 3)

    task = dataclasses.replace(training.TASK, model=model)

    def run(communicator, **settings):
        made = training.trainer(communicator, 1, task, global_batch=17, **settings)
        return training.state(training.run(made))

    expected = world(1, run)[0]
    assert not np.array_equal(expected["table"], np.ones((17, 3)))
    for settings in ({"micro_batches": 4}, {"canonical": 5}):
        for found in world(2, lambda c, settings=settings: run(c, **settings)):
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_update_operations_of_each_micro_batch_start_from_the_step_before():
    def run(communicator, **settings):
        made = training.trainer(communicator, 1, TASK, global_batch=17, steps=1, **settings)
        batch = made._make_batches(0)
        return training.run(made).replicas[0].statistics[0].numpy(), batch

    with connect("local") as communicator:
        mean, batches = run(communicator, micro_batches=4)
    expected = np.mean([0.1 * (b.images.astype("f8") + 5).mean((0, 1, 2)) for b in batches], axis=0)
    np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_pieces_cover_the_global_batch_in_order_and_by_the_shards_alone():
    class Rank:
        def __init__(self, rank, size):
            self.rank, self.size = rank, size

    for ranks, replicas in CUTS:
        for options in ({"canonical": 9}, {"micro_batches": 2}, {}):
            settings = Settings(global_batch=31, steps=1, **options)
            pieces = [p for rank in range(ranks) for p in make_pieces(settings, Rank(rank, ranks), replicas)]
            lengths = [p.examples.stop - p.examples.start for p in pieces]
            counted = [
                n if p.regularized is None else p.regularized for p, n in zip(pieces, lengths, strict=True)
            ]
            assert sum(counted) == 31
            places = [place for p in pieces for place in range(31)[p.examples]]
            assert places == list(range(31))
            assert {p.replica for p in pieces} == set(range(replicas))
            if options.get("canonical"):
                assert [p.shard for p in pieces] == list(range(9))
                assert lengths == [4] * 4 + [3] * 5
            else:
                assert len(pieces) == ranks * replicas * options.get("micro_batches", 1)
    assert make_pieces(Settings(5, 1), Rank(1, 2), 2) == [Piece(0, slice(3, 4)), Piece(1, slice(4, 5))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"canonical": 0}, "from 1 to the global batch, 16, so that each has an example; got 0"),
        ({"canonical": 17}, "got 17"),
        ({"canonical": 4, "micro_batches": 2}, "micro_batches=2 has no place beside canonical=4"),
        ({"micro_batches": 0}, "micro_batches must be at least 1, got 0"),
        ({"canonical": 5}, "5 canonical shards can't be shared by 2 ranks x 3 replicas"),
        ({"micro_batches": 3}, "16 can't be cut for 2 ranks x 3 replicas x 3 micro-batches"),
    ],
)
def test_numbers_that_can_not_be_are_refused_on_every_rank(settings, message):
    def run(communicator):
        with pytest.raises(ValueError, match=message):
            training.trainer(communicator, 3, **settings)
        return "raised"

    assert world(2, run) == ["raised"] * 2


def test_ranks_that_compute_matrix_products_in_other_ways_are_told(monkeypatch):
    own = kernels()
    assert own
    assert {len(line.split()) for line in own} == {4}
    ranks = threading.local()
    monkeypatch.setattr("distopt.trainer.kernels", lambda: [f"openblas {ranks.kernels}"])

    def run(communicator):
        ranks.kernels = ("Haswell", "Zen")[communicator.rank]
        training.trainer(communicator)  # without canonical shards it does not matter
        with pytest.raises(
            CommunicatorError, match="other matrix products than rank 0: entry 0 is 'openblas Z"
        ):
            training.trainer(communicator, canonical=4)
        return "raised"

    assert world(2, run) == ["raised"] * 2
