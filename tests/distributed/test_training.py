"""Training under mpirun: valid for any number of ranks."""

import numpy as np
import pytest
import training

from distopt.communicators import connect
from distopt.errors import NonFiniteError


def _alone(**settings):
    with connect("local") as communicator:
        return training.state(training.run(training.trainer(communicator, **settings)))


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("bucket_bytes", [64, 4 << 20])
def test_uneven_shards_train_as_one_process_does(communicator, replicas, bucket_bytes):
    settings = {"global_batch": 17, "bucket_bytes": bucket_bytes}
    expected = _alone(**settings)
    found = training.state(training.run(training.trainer(communicator, replicas, **settings)))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_all_ranks_hold_the_same_bits(communicator):
    found = training.state(training.run(training.trainer(communicator, global_batch=17)))
    for other in communicator.all_gather_object(found):
        for name, value in other.items():
            np.testing.assert_array_equal(value, found[name], err_msg=name)


def test_resuming_gives_the_bits_of_an_undisturbed_run(communicator, tmp_path_factory):
    folder = communicator.broadcast_object(tmp_path_factory.mktemp("run"))
    whole = training.state(training.run(training.trainer(communicator, steps=8)))
    training.run(training.trainer(communicator, steps=4, output=folder))
    communicator.barrier()
    second = training.trainer(communicator, steps=8, output=folder)
    assert second.resume() == "resumed after step 4"
    resumed = training.state(training.run(second))
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value, err_msg=name)


def test_a_loss_that_is_not_finite_stops_all_ranks(communicator):
    made = training.trainer(communicator)
    if communicator.rank == communicator.size - 1:
        make = made._make_batches

        def spoiled(step):
            batches = make(step)
            batches[0].images[:] = np.nan
            return batches

        made._make_batches = spoiled
    with pytest.raises(NonFiniteError, match=f"rank {communicator.size - 1} on "):
        training.run(made)


def test_evaluation_counts_every_example_once(communicator):
    made = training.trainer(communicator)
    found = made.evaluate(training.data("test", 29))
    assert found["examples"] == 29
    with connect("local") as alone:
        expected = training.trainer(alone).evaluate(training.data("test", 29))
    assert found == pytest.approx(expected, rel=1e-5)
