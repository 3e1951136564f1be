"""Local SGD against a loop in NumPy, over ranks as threads; under mpirun: test_strategies_mpi.py."""

import numpy as np
import pytest
import strategies_cases as cases
import training

from distopt.aggregators import AllReduce, LocalSGD, Ticket
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD, Adam, LossScaleOptimizer
from distopt.testing import world
from distopt.variables import Arena, Variable

RANKS = [1, 2, 3, 4]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (4, 2), (100, 0)])
@pytest.mark.parametrize("in_arena", [True, False])
def test_it_is_the_loop_of_the_paper_with_ranks_weighted_by_their_examples(ranks, every, start, in_arena):
    steps = 11

    def run(communicator):
        made = cases.variables(in_arena)
        aggregator = LocalSGD(communicator, every, start)
        optimizer = SGD(cases.RATE, momentum=0.5, gradient_aggregator=aggregator)
        for step in range(steps):
            pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
            optimizer.apply_gradients(pairs, examples=examples)
            assert aggregator.ticket.examples == sum(cases.counts(step, r, ranks) for r in range(ranks))
        return np.concatenate(cases.state_of(made))

    found = np.array(world(ranks, run))
    np.testing.assert_allclose(found, cases.local_sgd(ranks, steps, every, start, 0.5), rtol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("in_arena", [True, False])
def test_ranks_hold_the_same_bits_after_each_averaging_and_other_ones_before(ranks, in_arena):
    def run(communicator):
        made = cases.variables(in_arena, np.float32)
        optimizer = SGD(cases.RATE, gradient_aggregator=LocalSGD(communicator, 3))
        history = []
        for step in range(6):
            pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
            optimizer.apply_gradients(pairs, examples=examples)
            history.append(b"".join(value.tobytes() for value in cases.state_of(made)))
        return history

    alike = [len(set(step)) == 1 for step in zip(*world(ranks, run), strict=True)]
    assert alike == [False, False, True, True, False, True]  # step 3 has no examples


@pytest.mark.parametrize("ranks", RANKS)
def test_averaging_after_each_step_of_sgd_is_the_mean_over_the_global_batch(ranks):
    # x - rate * g is linear in g; Adam is not, and shows that the test can tell.
    def run(communicator):
        differences = []
        for kind in (SGD, Adam):
            ends = []
            for aggregator in (LocalSGD(communicator, 1), AllReduce(communicator)):
                made = cases.variables(True)
                optimizer = kind(cases.RATE, gradient_aggregator=aggregator)
                for step in range(8):
                    pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
                    optimizer.apply_gradients(pairs, examples=examples)
                ends.append(np.concatenate(cases.state_of(made)))
            differences.append(float(abs(ends[0] - ends[1]).max()))
        return differences

    for sgd, adam in world(ranks, run):
        assert sgd < 1e-14
        assert adam > 1e-3 or ranks == 1


def test_thousands_of_averagings_do_not_scale_what_is_alike():
    # 1/3 rounded to float32, three times, is 1 + 3e-8: shares would grow the values by 6e-5 here.
    def run(communicator):
        made = cases.variables(True, np.float32)
        before = np.concatenate(cases.state_of(made))
        optimizer = SGD(0.0, gradient_aggregator=LocalSGD(communicator, 1))
        for _ in range(2000):
            optimizer.apply_gradients([(v.numpy(), v) for v in made], examples=1)
        return abs(np.concatenate(cases.state_of(made)) - before).max()

    assert max(world(3, run)) < 1e-6


def test_16_bit_values_are_averaged_in_float32():
    # 3 x 30000 is beyond float16, and 2049 + 2049 too fine for it.
    def run(communicator):
        w = Variable(np.array([30000, 2048], np.float16), name="w")
        aggregator = LocalSGD(communicator, 1)
        aggregator.reduce([(np.zeros(2, np.float16), w)], Ticket(examples=3))
        w.assign(w.value + np.array([0, 2], np.float16) * communicator.rank)
        aggregator.after_apply([w])
        return w.numpy().tolist()

    assert world(3, run) == [[30000, 2050]] * 3


@pytest.mark.parametrize("ranks", RANKS)
def test_nothing_is_sent_between_averagings_when_the_ticket_waits_too(ranks):
    def run(communicator):
        made = cases.variables(True)
        aggregator = LocalSGD(communicator, 3, agree_every_step=False)
        optimizer = SGD(cases.RATE, gradient_aggregator=aggregator)
        optimizer.apply_gradients([(v.numpy(), v) for v in made], examples=1)  # compares variables once
        sent, tickets = [], []
        for step in range(1, 6):
            before = communicator.sequence
            own = Ticket(examples=2.0, loss=0.5, stop=float(step == 3 and communicator.rank == 0))
            pairs = aggregator.reduce([(v.numpy(), v) for v in made], own)
            optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
            sent.append(communicator.sequence - before)
            tickets.append((aggregator.ticket.examples, aggregator.ticket.loss, aggregator.ticket.stop))
        return sent, tickets, np.concatenate(cases.state_of(made)).tolist()

    results = world(ranks, run)
    for sent, tickets, values in results:
        assert [n > 0 for n in sent] == [False, True, False, False, True]
        # Own numbers between; the totals since the last averaging in the end, the wish to stop with them.
        own, first, second = (2, 0.5, 0), (5 * ranks, ranks, 0), (6 * ranks, 1.5 * ranks, 1)
        assert tickets == [own, first, own, own, second]
        assert values == results[0][2]


@pytest.mark.parametrize("agree_every_step", [True, False])
def test_an_error_of_one_rank_is_raised_on_all_with_its_reason(agree_every_step):
    def run(communicator):
        made = cases.variables(True)
        aggregator = LocalSGD(communicator, 2, agree_every_step=agree_every_step)
        failing = communicator.rank == 1
        for step in range(2):
            own = Ticket(examples=1, error=float(failing and step == 0), reason="no disk" if failing else "")
            try:
                aggregator.reduce([(v.numpy(), v) for v in made], own)
            except CommunicatorError as error:
                return step, str(error)
        return None

    for step, message in world(3, run):
        assert step == (0 if agree_every_step else 1)
        assert "rank 1 on " in message
        assert "no disk" in message


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("scaled", [False, True])
def test_settling_makes_variables_and_slots_alike_and_a_checkpoint_complete(ranks, scaled):
    def start(communicator):
        made = cases.variables(True)
        aggregator = LocalSGD(communicator, 4)
        optimizer = Adam(cases.RATE, gradient_aggregator=aggregator)
        return made, aggregator, LossScaleOptimizer(optimizer) if scaled else optimizer

    def train(communicator, made, optimizer, steps):
        for step in steps:
            pairs, examples = cases.pairs_of(made, step, communicator.rank, ranks)
            optimizer.apply_gradients(pairs, examples=examples)

    def run(communicator):
        made, aggregator, optimizer = start(communicator)
        train(communicator, made, optimizer, range(6))
        with pytest.raises(ValueError, match=r"2 step\(s\) by themselves .* call settle"):
            aggregator.state()
        aggregator.settle(made, optimizer.weights)
        saved = cases.state_of(made), optimizer.state(), aggregator.state()
        train(communicator, made, optimizer, range(6, 13))
        again, aggregator, second = start(communicator)
        for variable, value in zip(again, saved[0], strict=True):
            variable.assign(value)
        second.load_state(saved[1], again)
        aggregator.load_state(saved[2], again)
        train(communicator, again, second, range(6, 13))
        return saved, cases.state_of(made), cases.state_of(again)

    results = world(ranks, run)
    for saved, undisturbed, resumed in results:
        for own, first in zip(saved[0], results[0][0][0], strict=True):
            np.testing.assert_array_equal(own, first)
        for name, value in saved[1].items():
            np.testing.assert_array_equal(value, results[0][0][1][name], err_msg=name)
        for own, other in zip(undisturbed, resumed, strict=True):
            np.testing.assert_array_equal(own, other)


def test_settled_slots_are_averages_by_examples_and_counts_those_of_the_busiest_rank():
    def run(communicator):
        rank = communicator.rank
        w = Variable(np.zeros(2), name="w")
        optimizer = SGD(0.0, momentum=0.5, gradient_aggregator=LocalSGD(communicator, 100))
        for _ in range((1, 3, 2)[rank]):  # 1, 3 and 2 updates
            optimizer.apply_gradients([(np.ones(2), w)], examples=rank + 1)
        for _ in range((2, 0, 1)[rank]):  # as many calls on each
            optimizer.apply_gradients([(None, w)], examples=0)
        slot = optimizer.get_slot(w, "momentum")
        slot.assign(np.array([rank, 1.0]))
        optimizer.gradient_aggregator.settle([w], optimizer.weights)
        return slot.numpy().tolist(), int(optimizer.iterations)

    # 1 x 1, 3 x 2 and 2 x 3 examples: rank 1 is the first of the two with 6.
    expected = [(0 * 1 + 1 * 6 + 2 * 6) / 13, 1.0]
    for slot, iterations in world(3, run):
        np.testing.assert_allclose(slot, expected, rtol=1e-15)
        assert iterations == 3


@pytest.mark.parametrize("arena", [True, False])
@pytest.mark.parametrize("idle", [0, 1, 2])
def test_a_rank_without_slots_settles_with_those_that_have_some(idle, arena):
    def run(communicator):
        own = [Variable(np.zeros(n), name=f"w{n}") for n in (2, 3)]
        if arena:
            Arena(own)
        optimizer = SGD(0.1, momentum=0.5, gradient_aggregator=LocalSGD(communicator, 100))
        examples = 0 if communicator.rank == idle else communicator.rank + 1
        pairs = [(np.full(v.size, communicator.rank + 1.0) * examples if examples else None, v) for v in own]
        optimizer.apply_gradients(pairs, examples=examples)
        assert int(optimizer.iterations) == (examples > 0)  # which is made when it is read
        optimizer.gradient_aggregator.settle(own, optimizer.weights)
        if not examples:
            return None, int(optimizer.iterations)
        return optimizer.get_slot(own[1], "momentum").numpy().tolist(), int(optimizer.iterations)

    # A velocity of -0.1 x gradient, whose mean of ranks 0, 1, 2 has 1, 2, 3 times 1, 2, 3 examples.
    others = [n for n in (1, 2, 3) if n != idle + 1]
    velocity = -0.1 * sum(n * n for n in others) / sum(others)
    for rank, (slot, iterations) in enumerate(world(3, run)):
        assert iterations == 1
        if rank != idle:
            np.testing.assert_allclose(slot, [velocity] * 3, rtol=1e-15)


def test_settling_what_differs_in_shape_names_it():
    def run(communicator):
        w = Variable(np.zeros(2), name="w")
        aggregator = LocalSGD(communicator, 100)
        aggregator.reduce([(np.ones(2), w)], Ticket(examples=1))
        with pytest.raises(CommunicatorError, match=r"rank 1 on .* has 'slot' beside the variables as .*3"):
            aggregator.settle([w], [Variable(np.zeros(2 + communicator.rank), name="slot")])
        return True

    assert world(2, run) == [True] * 2


def test_wrong_use_is_refused():
    def run(communicator):
        w = Variable(np.zeros(2), name="w")
        for wrong in ({"every": 0}, {"every": 2, "start": -1}):
            with pytest.raises(ValueError, match=r"LocalSGD.* must be at least [01], got"):
                LocalSGD(communicator, **wrong)
        aggregator = LocalSGD(communicator, 1)
        with pytest.raises(ValueError, match="pass examples=len"):
            aggregator.reduce([(np.ones(2), w)])
        aggregator.reduce([(np.ones(2), w)], Ticket(examples=1))
        with pytest.raises(ValueError, match=r"step 1 had to average.*after_apply was not called"):
            aggregator.reduce([(np.ones(2), w)], Ticket(examples=1))
        other = LocalSGD(communicator, 2 + communicator.rank)
        with pytest.raises(
            CommunicatorError, match=r"rank 1 on .* aggregates by LocalSGD\(every=3, start=0\)"
        ):
            other.reduce([(np.ones(2), w)], Ticket(examples=1))
        return True

    assert world(2, run) == [True] * 2


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("local_start", [0, 2])
def test_a_training_resumes_to_the_bits_of_one_with_the_same_checkpoints(
    tmp_path, ranks, replicas, local_start
):
    # 17 examples: always uneven. Checkpoints lie between averagings.
    settings = {"global_batch": 17, "local_steps": 3, "local_start": local_start, "checkpoint_every": 4}

    def run(communicator):
        whole = training.run(training.trainer(communicator, replicas, steps=9, **settings))
        training.run(training.trainer(communicator, replicas, steps=4, output=tmp_path, **settings))
        communicator.barrier()
        second = training.trainer(communicator, replicas, steps=9, output=tmp_path, **settings)
        assert second.resume() == "resumed after step 4"
        training.run(second)
        return training.state(whole), training.state(second)

    results = world(ranks, run)
    for whole, resumed in results:
        for name, expected in results[0][0].items():
            np.testing.assert_array_equal(whole[name], expected, err_msg=name)  # the last step settles
            np.testing.assert_array_equal(resumed[name], expected, err_msg=name)


def test_a_training_evaluates_one_model_on_all_ranks():
    def run(communicator):
        made = training.trainer(communicator, global_batch=17, local_steps=100, steps=4)
        made.save_checkpoint = lambda: None  # it settles too
        training.run(made)
        apart = made.weights()
        found = made.evaluate(training.data("test", 29))
        return apart, made.weights(), found["loss"]

    results = world(3, run)
    first = results[0]
    assert any((other[0][name] != first[0][name]).any() for other in results for name in first[0])
    for _, weights, loss in results:
        assert loss == first[2]
        for name, expected in first[1].items():
            np.testing.assert_array_equal(weights[name], expected, err_msg=name)
