"""Canonical mode under mpirun: valid for any number of ranks."""

import dataclasses

import numpy as np
import pytest
import training

from distopt import layers
from distopt.aggregators import Canonical
from distopt.backend import Device
from distopt.communicators import connect
from distopt.data.dataset import Dataset
from distopt.models import cifar10
from distopt.optimizers import Adam
from distopt.settings import Settings
from distopt.testing import world
from distopt.trainer import Trainer


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
