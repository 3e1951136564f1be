"""Training over ranks as threads; the same claims under mpirun are in tests/distributed."""

import dataclasses
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import training

from distopt import layers
from distopt.backend import Device, current_device
from distopt.communicators import connect
from distopt.errors import CheckpointError, CommunicatorError, NonFiniteError
from distopt.optimizers import SGD, LossScaleOptimizer
from distopt.testing import world
from distopt.trainer import Settings, Trainer


@pytest.fixture(scope="module")
def alone():
    """What one process gets on the whole global batch."""
    with connect("local") as communicator:
        return training.state(training.run(training.trainer(communicator, global_batch=17)))


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (3, 1), (4, 1), (1, 3), (2, 2), (3, 2)])
def test_any_split_of_the_global_batch_trains_as_one_process_does(alone, ranks, replicas):
    # 17 examples over 2 to 6 replicas: always uneven.
    def run(communicator):
        return training.state(training.run(training.trainer(communicator, replicas, global_batch=17)))

    results = world(ranks, run)
    for name, expected in alone.items():
        for found in results:
            # Sums are taken in another order: float32 rounding, grown over 4 steps.
            np.testing.assert_allclose(found[name], expected, rtol=2e-4, atol=2e-6, err_msg=name)
        for found in results[1:]:
            np.testing.assert_array_equal(found[name], results[0][name], err_msg=name)


def test_logged_loss_is_that_of_the_global_batch_with_weight_decay_once(tmp_path):
    def run(communicator):
        made = training.trainer(communicator, global_batch=17, steps=1)
        variables = {v.name: v.numpy() for v in made.replicas[0].variables}
        path = tmp_path / "m.jsonl" if communicator.rank == 0 else None
        training.run(made, path)
        return variables

    variables = world(3, run)[0]
    logged = json.loads((tmp_path / "m.jsonl").read_text())
    with connect("local") as communicator:
        made = training.trainer(communicator, global_batch=17)
        batch = made._make_batches(0)[0]
        values = made.replicas[0].logits(batch.images).numpy().astype("f8")  # at the same initial values
    exponentials = np.exp(values - values.max(1, keepdims=True))
    probabilities = exponentials / exponentials.sum(1, keepdims=True)
    cross_entropy = -np.log(probabilities[np.arange(17), batch.labels]).mean()
    decay = 0.01 * 0.5 * np.sum(variables["logits/weights"].astype("f8") ** 2)
    assert logged["loss"] == pytest.approx(cross_entropy + decay, rel=1e-5)
    assert logged["examples"] == 17


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resuming_gives_the_bits_of_an_undisturbed_run(tmp_path, ranks):
    def run(communicator):
        whole = training.run(training.trainer(communicator, steps=8))
        first = training.trainer(communicator, steps=4, output=tmp_path)
        training.run(first)
        communicator.barrier()  # rank 0 has written
        second = training.trainer(communicator, steps=8, output=tmp_path)
        assert second.resume() == "resumed after step 4"
        assert second.step == 4
        training.run(second)
        return training.state(whole), training.state(second)

    for whole, resumed in world(ranks, run):
        assert whole.keys() == resumed.keys()
        for name, expected in whole.items():
            np.testing.assert_array_equal(resumed[name], expected, err_msg=name)


def test_resuming_refuses_another_run_and_starts_anew_without_a_checkpoint(tmp_path):
    with connect("local") as communicator:
        assert training.trainer(communicator, output=tmp_path).resume().startswith("no checkpoint in ")
        training.run(training.trainer(communicator, output=tmp_path))
        with pytest.raises(CheckpointError, match="trained with seed 0, this run has 1"):
            training.trainer(communicator, output=tmp_path, seed=1).resume()
        with pytest.raises(CheckpointError, match="trained with global_batch 16, this run has 8"):
            training.trainer(communicator, output=tmp_path, global_batch=8).resume()
        with pytest.raises(CheckpointError, match="give --output"):
            training.trainer(communicator).resume()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(tmp_path):
    with connect("local") as communicator:
        training.run(training.trainer(communicator, output=tmp_path))
        (tmp_path / "checkpoint-00000009.safetensors").write_bytes(b"cut off")
        said = training.trainer(communicator, output=tmp_path, steps=8).resume()
    assert said.startswith("warning: ")
    assert "checkpoint-00000009.safetensors is truncated or altered" in said
    assert said.endswith("resumed after step 4")


def test_an_unreadable_checkpoint_raises_on_every_rank(tmp_path):
    (tmp_path / "checkpoint-00000004.safetensors").write_bytes(b"cut off")

    def run(communicator):
        with pytest.raises(CheckpointError, match="truncated or altered"):
            training.trainer(communicator, output=tmp_path).resume()
        return "raised"

    assert world(3, run) == ["raised"] * 3


@pytest.mark.parametrize("guilty", [0, 2])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(guilty):
    def run(communicator):
        made = training.trainer(communicator, steps=4)
        before = training.state(made)
        if communicator.rank == guilty:
            make = made._make_batches

            def spoiled(step):
                batches = make(step)
                batches[0].images[0, 0, 0, 0] = np.nan
                return batches

            made._make_batches = spoiled
        with pytest.raises(NonFiniteError) as caught:
            training.run(made)
        after = training.state(made)
        assert all(np.array_equal(after[name], value) for name, value in before.items())
        return str(caught.value)

    for message in world(3, run):
        assert f"not finite at step 1: rank {guilty} on " in message
        assert "1 of its images are not finite" in message


def test_evaluation_counts_every_example_once_on_any_number_of_ranks():
    def run(communicator):
        made = training.run(training.trainer(communicator))
        return made.evaluate(training.data("test", 29)), made.evaluate(
            training.data("test", 2), averaged=True
        )

    (expected, few), *_ = world(1, run)
    assert (expected["examples"], few["examples"]) == (29, 2)
    for ranks in (2, 3, 4):  # with 2 examples, ranks are left without any
        for found, found_few in world(ranks, run):
            assert found == pytest.approx(expected, rel=1e-4)
            assert found_few == pytest.approx(few, rel=1e-4)


def test_evaluating_averages_leaves_the_weights_alone():
    with connect("local") as communicator:
        made = training.run(training.trainer(communicator))
        before = made.weights()
        raw = made.evaluate(training.data("test"))
        averaged = made.evaluate(training.data("test"), averaged=True)
        assert raw["loss"] != averaged["loss"]
        for name, value in made.weights().items():
            np.testing.assert_array_equal(value, before[name])


def test_ranks_started_differently_are_told_so():
    def run(communicator):
        with pytest.raises(CommunicatorError) as caught:
            training.trainer(communicator, seed=int(communicator.rank == 2))
        return str(caught.value)

    for message in world(3, run):
        assert "rank 2 on " in message
        assert "has other settings than rank 0: seed: 1 instead of 0" in message


def test_a_global_batch_smaller_than_the_replicas_is_refused_on_every_rank():
    def run(communicator):
        with pytest.raises(ValueError, match="batch of 5 can't be cut for 3 ranks x 2 replicas"):
            training.trainer(communicator, 2, global_batch=5)
        return "raised"

    assert world(3, run) == ["raised"] * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_batch": 0},
        {"steps": -1},
        {"learning_rate": -0.1},
        {"learning_rate": float("inf")},
        {"log_every": 0},
        {"checkpoint_every": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Settings(**{"global_batch": 4, "steps": 1, **wrong})


def test_a_signal_stops_after_a_whole_step_with_a_checkpoint(tmp_path):
    with connect("local") as communicator:
        made = training.trainer(communicator, steps=100_000, output=tmp_path)
        handler = signal.getsignal(signal.SIGUSR1)
        started = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
        started.start()
        began = time.monotonic()
        training.run(made)
        assert time.monotonic() - began < 60
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert 0 < made.step < 100_000
        assert made.stopped
        resumed = training.trainer(communicator, steps=100_000, output=tmp_path)
        assert resumed.resume() == f"resumed after step {made.step}"
        assert resumed.step == made.step


def test_a_step_allocates_nothing_large_after_the_first():
    from distopt.backend import memory_pool

    with connect("local") as communicator:
        task = training.TASK
        made = training.trainer(
            communicator, task=task, train_data=training.data(count=400), global_batch=256
        )
        training.run(made)
        misses = memory_pool.misses
        again = training.trainer(
            communicator, task=task, train_data=training.data(count=400), global_batch=256, steps=12
        )
        training.run(again)
        # A second trainer needs no more than its own arena and slots.
        assert memory_pool.misses - misses <= 6


def test_metrics_file_has_a_record_per_logging_step(tmp_path):
    with connect("local") as communicator:
        training.run(training.trainer(communicator, steps=4, log_every=2), tmp_path / "m.jsonl")
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4]
    assert records[0]["examples"] == 32
    assert records[0]["learning_rate"] == 0.05
    assert set(records[0]["phases_ms"]) == {
        "input",
        "forward",
        "backward",
        "exposed communication",
        "apply",
    }
    assert records[0]["ms_per_step"] >= sum(records[0]["phases_ms"].values()) * 0.5


def test_gradients_that_are_not_finite_stop_all_ranks_before_the_update():
    def run(communicator):
        made = training.trainer(communicator)
        before = training.state(made)
        stream = made.replicas[0].gradients

        def spoiled(tape, loss, scale):
            for gradient, variable in stream(tape, loss, scale):
                if communicator.rank == 1 and variable.name == "conv/biases":
                    gradient[2] = np.inf
                yield gradient, variable

        made.replicas[0].gradients = spoiled
        message = "the loss is finite at step 1, but the gradients of conv/biases are not"
        with pytest.raises(NonFiniteError, match=message):
            training.run(made)
        after = training.state(made)
        assert all(np.array_equal(after[name], value) for name, value in before.items())
        return "raised"

    assert world(2, run) == ["raised"] * 2


def test_a_new_run_refuses_the_folder_of_an_earlier_one_on_every_rank(tmp_path):
    def run(communicator):
        made = training.trainer(communicator, output=tmp_path)
        made.refuse_used_output()
        communicator.barrier()
        training.run(made)
        communicator.barrier()
        with pytest.raises(CheckpointError, match=r"holds checkpoints of an earlier run .*--resume"):
            training.trainer(communicator, output=tmp_path).refuse_used_output()
        return "raised"

    assert world(2, run) == ["raised"] * 2


def test_the_step_runs_with_the_first_replicas_device_current():
    seen = []
    with connect("local") as communicator:
        settings = Settings(global_batch=16, steps=1, log_every=1)
        made = Trainer(training.TASK, training.data(), communicator, [Device("cpu", 3)], settings)
        made.optimizer.gradient_transformers.append(lambda pairs: [seen.append(current_device()), pairs][1])
        training.run(made)
        assert current_device() == Device("cpu", 0)
    assert seen == [Device("cpu", 3)]


def _network_with_dropout(images, training):
    x = layers.dropout(layers.flatten(images), 0.5, training=training)
    return layers.dense(x, 3, name="logits")


@pytest.mark.parametrize(("ranks", "replicas"), [(3, 1), (1, 2), (2, 2)])
def test_dropout_does_not_depend_on_how_the_global_batch_is_cut(ranks, replicas):
    task = dataclasses.replace(training.TASK, model=_network_with_dropout)

    def run(communicator, replicas=replicas):
        return training.state(training.run(training.trainer(communicator, replicas, task, global_batch=17)))

    with connect("local") as communicator:
        expected = run(communicator, replicas=1)
    for found in world(ranks, run):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def _network_with_batch_normalization(images, training):
    x = layers.batch_normalization(images + 5.0, momentum=0.9, training=training, name="bn")
    return layers.dense(layers.flatten(x), 3, name="logits")


def test_moving_averages_of_batch_normalization_are_saved_and_resumed(tmp_path):
    task = dataclasses.replace(training.TASK, model=_network_with_batch_normalization)
    with connect("local") as communicator:
        first = training.trainer(communicator, 2, task, output=tmp_path)
        training.run(first)
        second = training.trainer(communicator, 2, task, output=tmp_path)
        second.resume()
    mean, variance = (v.numpy() for v in first.replicas[0].statistics)
    assert mean == pytest.approx([5 * (1 - 0.9**4)], rel=1e-5)  # images are standardised
    for replica in second.replicas:
        assert [v.name for v in replica.statistics] == ["bn/moving_mean", "bn/moving_variance"]
        np.testing.assert_array_equal(replica.statistics[0].numpy(), mean)
        np.testing.assert_array_equal(replica.statistics[1].numpy(), variance)


def _network_with_normalization_object():
    parts = [layers.BatchNormalization(momentum=0.5, name="bn"), layers.Flatten(), layers.Dense(3)]
    return layers.Sequential(parts)


@pytest.mark.parametrize("infinite", ["image", "gradient"])
def test_a_rejected_step_leaves_the_statistics_of_layer_objects_as_they_were(infinite):
    task = dataclasses.replace(training.TASK, model=_network_with_normalization_object())
    with connect("local") as communicator:
        made = training.trainer(communicator, 2, task, steps=4)
        replica = made.replicas[0]
        forward, stream = replica.forward, replica.gradients

        def shifted(batch):
            return forward(dataclasses.replace(batch, images=batch.images + 5.0))

        def spoiled_forward(batch):
            images = batch.images.copy()
            images[0, 0, 0, 0] = np.inf
            return forward(dataclasses.replace(batch, images=images))

        def spoiled_stream(tape, loss, scale):
            for gradient, variable in stream(tape, loss, scale):
                gradient[...] = np.inf
                yield gradient, variable

        replica.forward = shifted
        batches = {step: made._make_batches(step) for step in range(2)}

        class Batches:
            def get(self, step):
                return batches[step]

        made._train_step(Batches())
        before = [[v.numpy() for v in r.statistics] for r in made.replicas]
        assert abs(before[0][0] - 2.5).max() < 0.5  # half of the way to about 5
        if infinite == "image":
            replica.forward = spoiled_forward
        else:
            replica.gradients = spoiled_stream
        with np.errstate(all="ignore"), pytest.raises(NonFiniteError):
            made._train_step(Batches())
        for own, kept in zip(made.replicas, before, strict=True):
            for variable, value in zip(own.statistics, kept, strict=True):
                np.testing.assert_array_equal(variable.numpy(), value)


def _scaled_task(scale):
    return dataclasses.replace(
        training.TASK,
        optimizer=lambda rate, examples, batch, **options: LossScaleOptimizer(
            SGD(0.05 if rate is None else rate, 0.9, **options), initial_scale=scale, dynamic_growth_steps=2
        ),
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_loss_scale_changes_no_bit_and_leaves_out_steps_that_overflow(ranks):
    plain = training.state(training.run(world(1, lambda c: training.trainer(c, global_batch=15))[0]))

    def train(scale, steps):
        def rank(communicator):
            task = _scaled_task(scale)
            with np.errstate(all="ignore"):
                made = training.run(training.trainer(communicator, task=task, global_batch=15, steps=steps))
            return training.state(made), made.optimizer.loss_scale, made.optimizer.step

        return world(ranks, rank)

    for found, scale, step in train(1024.0, 4):
        assert (scale, step) == (4096.0, 4)  # twice doubled after two finite steps
        for name, value in plain.items():
            np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    for found, scale, step in train(2.0**127, 3):
        # The scaled gradients of a batch of 15 are infinite in float32 at first.
        assert scale < 2.0**127
        assert step < 3
        assert all(np.isfinite(value).all() for value in found.values())
