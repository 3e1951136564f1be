"""What one rank of a training knows, all act on: over ranks as threads."""

import dataclasses
import logging
import os
import signal

import numpy as np
import pytest
import training

from distopt import layers
from distopt.communicators import connect
from distopt.data.prefetch import Prefetcher
from distopt.decisions import StopSignals
from distopt.errors import CommunicatorError, DataError, DriftError, NonFiniteError
from distopt.testing import world
from distopt.trainer import Settings

HOSTS = ["alpha", "beta", "gamma"]


def _task(communicator, synchronised):
    def network(images):
        x = layers.flatten(images)
        if synchronised:
            x = layers.batch_normalization(x, training=True, communicator=communicator, name="bn")
        return layers.dense(x, 3, name="logits")

    return dataclasses.replace(training.TASK, model=network)


def _failing(made, step_of_failure):
    make = made._make_batches

    def failing(step):
        if step == step_of_failure:
            raise DataError("image 17 is broken")
        return make(step)

    made._make_batches = failing


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("synchronised", [False, True])
@pytest.mark.parametrize(("prefetch", "replicas"), [(0, 1), (2, 1), (2, 2)])
def test_an_error_in_one_rank_s_input_raises_on_all(wrong, synchronised, prefetch, replicas, caplog):
    def run(communicator):
        task = _task(communicator, synchronised and replicas == 1)
        made = training.trainer(communicator, replicas, task, steps=5, prefetch=prefetch)
        if communicator.rank == wrong:
            _failing(made, 2)
        with pytest.raises(CommunicatorError) as caught:
            training.run(made)
        usable = communicator.all_gather_object(communicator.rank) == [0, 1, 2]
        return str(caught.value), made.step, int(made.optimizer.iterations), usable

    reason = "its input failed: DataError: image 17 is broken"
    message = f"step 2 can't be done: rank {wrong} on {HOSTS[wrong]}: {reason}"
    assert world(3, run, hosts=HOSTS) == [(message, 2, 2, True)] * 3
    (told,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert told.getMessage() == f"rank {wrong} on {HOSTS[wrong]} can't make its batch: image 17 is broken"
    assert "in failing" in caplog.text  # the traceback of the input thread


def test_one_rank_alone_raises_the_error_itself():
    with connect("local") as communicator:
        made = training.trainer(communicator)
        _failing(made, 1)
        with pytest.raises(DataError, match="image 17 is broken"):
            training.run(made)
        assert made.step == 1


def _spoil_gradients(made, spoil):
    stream = made.replicas[0].gradients

    def spoiled(tape, loss, scale):
        for gradient, variable in stream(tape, loss, scale):
            spoil(gradient, variable)
            yield gradient, variable

    made.replicas[0].gradients = spoiled


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_gradient_that_is_not_finite_is_named_by_rank_variable_and_element(wrong):
    def run(communicator):
        made = training.trainer(communicator)

        def spoil(gradient, variable):
            if communicator.rank == wrong and variable.name == "conv/weights":
                gradient[1, 2, 0, 3] = np.inf
                gradient[2, 2, 0, 3] = np.nan
            if communicator.rank == wrong and variable.name == "logits/biases":
                gradient[0] = np.nan

        _spoil_gradients(made, spoil)
        with pytest.raises(NonFiniteError) as caught:
            training.run(made)
        return str(caught.value)

    for message in world(3, run, hosts=HOSTS):
        assert (
            "the loss is finite at step 1, but the gradients of conv/weights, logits/biases are not: "
            f"rank {wrong} on {HOSTS[wrong]}: the gradient of 'conv/weights' is inf at element [1, 2, 0, 3] "
            "(2 of its elements are not finite)."
        ) in message


def test_a_sum_over_ranks_that_overflows_is_told_from_a_rank_s_own_gradients():
    def run(communicator):
        made = training.trainer(communicator)

        def spoil(gradient, variable):
            if variable.name == "conv/biases":
                gradient[2] = 3e38  # two of them are too large for float32

        _spoil_gradients(made, spoil)
        with np.errstate(over="ignore"), pytest.raises(NonFiniteError) as caught:
            training.run(made)
        return str(caught.value)

    for message in world(2, run):
        assert (
            "the gradients of conv/biases are not: each rank's own gradients are finite, but of their sum "
            "over ranks the gradient of 'conv/biases' is inf at element [2] (1 of its elements"
        ) in message


def test_a_loss_that_is_not_finite_is_named_with_the_first_gradient():
    def run(communicator):
        made = training.trainer(communicator)
        make = made._make_batches

        def spoiled(step):
            batches = make(step)
            if communicator.rank == 1:
                batches[0].images[0] = np.inf
            return batches

        made._make_batches = spoiled
        with np.errstate(all="ignore"), pytest.raises(NonFiniteError) as caught:
            training.run(made)
        return str(caught.value)

    for message in world(3, run, hosts=HOSTS):
        assert (
            "the loss is not finite at step 1: rank 1 on beta: loss nan, 1 of its images are not" in message
        )
        assert (
            "In the backward pass: rank 1 on beta: the gradient of 'conv/weights' is nan at element ["
            in message
        )


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize(
    ("number", "words", "preempted"),
    [
        (signal.SIGUSR1, "SIGUSR1: the scheduler is about to take its machine", True),
        (signal.SIGTERM, "SIGTERM: it was told to end", False),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(wrong, number, words, preempted):
    def run(communicator):
        made = training.trainer(communicator, steps=50)
        make, tickets = made.train_step, []

        def stepping(batches):
            if communicator.rank == wrong and made.step == 3:
                made._signals.asked = number  # ranks as threads get no signals
            tickets.append(make(batches))
            return tickets[-1]

        made.train_step = stepping
        training.run(made)
        last = tickets[-1]
        return made.step, made.stopped, made.stop_reason, (last.preempt, last.stop)

    reason = f"rank {wrong} on {HOSTS[wrong]} got {words}"
    expected = 4, True, reason, (1.0, 0.0) if preempted else (0.0, 1.0)
    assert world(3, run, hosts=HOSTS) == [expected] * 3


def test_signals_are_noted_and_handlers_put_back():
    signals, before = StopSignals(), signal.getsignal(signal.SIGTERM)
    assert (signals.ticket().stop, signals.ticket().preempt) == (0.0, 0.0)
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked == signal.SIGTERM  # the first one counts
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (signals.ticket().stop, signals.ticket().preempt) == (1.0, 0.0)


def _flipping_after(made, step, rank, name):
    """Flip a bit of a slot after a step on one rank."""
    train_step = made.train_step

    def stepping(batches):
        ticket = train_step(batches)
        if made.step == step and made.communicator.rank == rank:
            (slot,) = [weight for weight in made.optimizer.weights if weight.name == name]
            slot.value.reshape(-1).view(np.uint32)[5] ^= 1 << 22
        return ticket

    made.train_step = stepping


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_bit_that_flips_in_training_stops_all_ranks_at_the_next_check(wrong):
    def run(communicator):
        made = training.trainer(communicator, steps=12, drift_check_every=4)
        _flipping_after(made, 8, wrong, "SGD/conv/weights/momentum")
        with pytest.raises(DriftError) as caught:
            training.run(made)
        return str(caught.value), made.step

    for message, step in world(3, run, hosts=HOSTS):
        assert step == 8
        assert message.startswith("step 8: the replicas have drifted apart in 'SGD/conv/weights/momentum', ")
        assert f"The minority is rank {wrong} ({HOSTS[wrong]})" in message


@pytest.mark.parametrize("replicas", [1, 2])
def test_repair_gives_the_bits_of_an_undisturbed_run(replicas):
    def run(communicator, flip):
        made = training.trainer(
            communicator, replicas, steps=8, drift_check_every=2, on_drift="repair", global_batch=17
        )
        if flip:
            _flipping_after(made, 4, 1, "SGD/logits/weights/momentum")
        state = training.state(training.run(made))
        assert made.drift.checks == 4
        return {name: value.tobytes() for name, value in state.items()}

    undisturbed = world(3, lambda communicator: run(communicator, False))
    assert world(3, lambda communicator: run(communicator, True)) == undisturbed


def test_a_drift_check_can_be_left_out_and_sees_averages_too():
    def run(communicator, every):
        made = training.trainer(communicator, steps=4, drift_check_every=every)
        train_step = made.train_step

        def stepping(batches):
            ticket = train_step(batches)
            if communicator.rank == 0 and made.step == 4:
                made.averages.average(made.replicas[0].variables[0]).value[...] += 1
            return ticket

        made.train_step = stepping
        training.run(made)
        return made.drift

    assert world(2, lambda communicator: run(communicator, 0)) == [None, None]
    with pytest.raises(DriftError, match="apart in 'conv/weights/ExponentialMovingAverage'"):
        world(2, lambda communicator: run(communicator, 1))


@pytest.mark.parametrize("wrong", [{"drift_check_every": -1}, {"on_drift": "ignore"}])
def test_settings_out_of_range_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Settings(global_batch=4, steps=1, **wrong)


def test_batches_that_come_out_of_turn_are_an_error_too():
    with connect("local") as communicator:
        made = training.trainer(communicator)
        with (
            Prefetcher(made._make_batches, 5, 0) as batches,
            pytest.raises(ValueError, match="step 0 was asked"),
        ):
            made.train_step(batches)
