"""Delayed aggregation against a loop in NumPy, over ranks as threads; mpirun: test_strategies_mpi.py."""

import dataclasses

import numpy as np
import pytest
import strategies_cases as cases
import training

from distopt import ops
from distopt.aggregators import Accumulate, Adasum, Aggregator, AllReduce, Delayed, LocalSGD, Ticket
from distopt.communicators import connect
from distopt.communicators.communicator import Done
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD, LossScaleOptimizer, optimize_loss
from distopt.tape import GradientTape
from distopt.testing import world
from distopt.variables import Arena, Variable

RANKS = [1, 2, 3, 4]
STEPS = 9


def start(communicator, in_arena=True):
    made = cases.variables(in_arena)
    aggregator = Delayed(AllReduce(communicator))
    return made, aggregator, SGD(cases.RATE, momentum=0.5, gradient_aggregator=aggregator)


def train(communicator, made, optimizer, steps):
    for step in steps:
        pairs, examples = cases.pairs_of(made, step, communicator.rank, communicator.size)
        optimizer.apply_gradients(pairs, examples=examples)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("in_arena", [True, False])
def test_step_t_applies_the_global_gradient_of_the_step_before(ranks, in_arena):
    def run(communicator):
        made, aggregator, optimizer = start(communicator, in_arena)
        train(communicator, made, optimizer, range(1))
        assert not aggregator.ready
        assert aggregator.ticket.examples == sum(cases.counts(0, r, ranks) for r in range(ranks))
        assert optimizer.step == 0
        train(communicator, made, optimizer, range(1, STEPS))
        optimizer.apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)
        optimizer.apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)  # nothing
        return np.concatenate(cases.state_of(made)), optimizer.step

    expected, updates = cases.delayed(ranks, STEPS)
    results = world(ranks, run)
    for found, steps in results:
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        np.testing.assert_array_equal(found, results[0][0])
        assert steps == updates == STEPS - 1  # step 3 has no examples
    assert abs(expected - cases.delayed(ranks, STEPS, late=0)[0]).max() > 1e-3  # not what undelayed SGD gives


@pytest.mark.parametrize("ranks", RANKS)
def test_gradients_of_a_tape_in_an_arena_are_exchanged_from_a_second_buffer(ranks):
    # Integers: sums in any order have the same bits. Gradient of step t: t * (rank + 1) * [1..5].
    def run(communicator):
        w = Variable(np.zeros(5, "f4"), name="w")
        Arena([w])
        aggregator = Delayed(AllReduce(communicator, "sum", bucket_bytes=8))
        history = []
        for step in range(1, 5):
            factor = np.arange(1, 6, dtype="f4") * step * (communicator.rank + 1)
            with GradientTape() as tape:
                loss = ops.reduce_sum(w * factor)
            ((gradient, variable),) = aggregator.reduce(tape.gradients(loss, [w]))
            assert variable is w
            assert (gradient is None) == (step == 1)
            assert gradient is None or gradient is w.gradient
            history.append(None if gradient is None else gradient.tolist())
        return history

    total = ranks * (ranks + 1) // 2
    expected = [None, *([float(i * step * total) for i in range(1, 6)] for step in (1, 2, 3))]
    assert world(ranks, run) == [expected] * ranks


def test_the_exchange_of_a_step_is_in_flight_while_the_next_gradients_come():
    events = []

    class Noted(Done):
        def wait(self):
            events.append("waited")
            return super().wait()

    with connect("local") as communicator:
        begin = communicator.all_reduce

        def all_reduce(values, op="sum"):
            if values.dtype == np.float64:  # the ticket
                return begin(values, op)
            events.append("started")
            return Noted(begin(values, op).wait())

        communicator.all_reduce = all_reduce
        communicator.progress = lambda: events.append("polled")
        w = Variable(np.zeros(4, "f4"), name="w")
        Arena([w])
        aggregator = Delayed(AllReduce(communicator, "sum"))

        def pairs(step):
            events.append(f"backward {step}")
            yield np.ones(4, "f4"), w

        for step in range(2):
            aggregator.reduce(pairs(step))
        polls = [event for event in events if event != "polled"]
        assert polls == ["backward 0", "started", "backward 1", "waited", "started"]
        assert "polled" in events[events.index("backward 1") : events.index("waited")]


@pytest.mark.parametrize("ranks", RANKS)
def test_rows_none_and_dense_gradients_are_delayed_alike(ranks):
    def run(communicator):
        rank = communicator.rank
        table = Variable(np.zeros((4, 2)), name="table")
        unused = Variable(np.zeros(2), name="unused")
        aggregator, plain = Delayed(AllReduce(communicator)), AllReduce(communicator)
        due, checked = None, 0
        for step in range(6):
            pairs = [*cases.table_pairs(table, step, rank, ranks), (None, unused)]
            ticket = Ticket(examples=cases.counts(step, rank, ranks))
            found = aggregator.reduce(pairs, ticket)
            if due is not None:
                assert found[0][0].to_dense().tolist() == due.to_dense().tolist()
                assert found[1][0] is None
                checked += 1
            due = plain.reduce(pairs, ticket)[0][0]
        return checked

    assert world(ranks, run) == [4] * ranks


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 3), (4, 4), (3, 2), (2, 4), (4, 1)])
@pytest.mark.parametrize("in_arena", [True, False])
def test_a_checkpoint_holds_the_pending_gradient_also_for_other_numbers_of_ranks(before, after, in_arena):
    def first(communicator):
        made, aggregator, optimizer = start(communicator, in_arena)
        train(communicator, made, optimizer, range(5))
        state = cases.state_of(made), optimizer.state(), aggregator.state()
        whole = []
        for step in range(5, STEPS):  # going on after `state` is not disturbed by it
            train(communicator, made, optimizer, [step])
            whole.append(cases.state_of(made))
        return state, whole

    (values, slots, kept), whole = world(before, first)[0]
    kept = {name: array.copy() for name, array in kept.items()}

    def second(communicator):
        made, aggregator, optimizer = start(communicator, in_arena)
        for variable, value in zip(made, values, strict=True):
            variable.assign(value)
        optimizer.load_state(slots, made)
        aggregator.load_state(kept, made)
        found = []
        for step in range(5, STEPS):
            train(communicator, made, optimizer, [step])
            found.append(cases.state_of(made))
        return found

    for found in world(after, second):
        # The first step applies what was pending, whatever the ranks; later ones have other batches.
        for number in range(len(whole) if before == after else 1):
            for own, expected in zip(found[number], whole[number], strict=True):
                np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_after_a_step_without_examples_has_nothing_to_apply(ranks):
    def run(communicator):
        made, aggregator, optimizer = start(communicator)
        train(communicator, made, optimizer, range(4))  # step 3 has none
        again, other, second = start(communicator)
        for variable, value in zip(again, made, strict=True):
            variable.assign(value.value)
        second.load_state(optimizer.state(), again)
        other.load_state(aggregator.state(), again)
        for models in ((made, optimizer), (again, second)):
            train(communicator, *models, [4])
        return aggregator.ready, other.ready, optimizer.step, second.step

    assert world(ranks, run) == [(False, False, 3, 3)] * ranks


class InNewMemory(Aggregator):
    """One of a user's own, which returns other arrays than it was given."""

    def reduce(self, pairs, ticket=None):
        return [(gradient * 2.0, variable) for gradient, variable in pairs]


def test_an_aggregator_of_ones_own_may_return_new_arrays():
    w = Variable(np.zeros(2), name="w")
    Arena([w])
    aggregator = Delayed(InNewMemory())
    found = []
    for step in range(3):
        w.gradient[...] = step + 1
        ((gradient, _),) = aggregator.reduce([(w.gradient, w)])
        assert step == 0 or gradient is w.gradient
        found.append(None if gradient is None else gradient.tolist())
    assert found == [None, [2.0, 2.0], [4.0, 4.0]]
    assert [g.tolist() for g, _ in aggregator.flush()] == [[6.0, 6.0]]


def test_a_state_of_another_model_or_aggregator_is_refused():
    with connect("local") as communicator:
        made, aggregator, _ = start(communicator)
        with pytest.raises(ValueError, match="is not that of Delayed"):
            aggregator.load_state({"calls": np.array(1)}, made)
        with pytest.raises(ValueError, match=r"gradient/x.*no such variable"):
            aggregator.load_state({"ready": np.array(1), "gradient/x": np.ones(3)}, made)
        with pytest.raises(ValueError, match=r"'w' has shape \(2,\).*\(3,\)"):
            aggregator.load_state({"ready": np.array(1), "gradient/w": np.ones(2)}, made)


def test_what_cannot_be_delayed_is_refused():
    with connect("local") as communicator:
        for inner in (LocalSGD(communicator, 2), Accumulate(AllReduce(communicator), 2)):
            with pytest.raises(TypeError, match=f"can't delay {type(inner).__name__}, which has a `"):
                Delayed(inner)
        with pytest.raises(TypeError, match="Delayed needs an aggregator"):
            Delayed(list)


def test_ranks_with_other_variables_are_named_before_anything_is_allocated():
    def run(communicator):
        w = Variable(np.zeros(2 + communicator.rank), name="w")
        Arena([w])
        with pytest.raises(CommunicatorError, match=r"rank 1 on .* has other variables than rank 0"):
            Delayed(AllReduce(communicator)).reduce([(w.numpy(), w)], Ticket(examples=1))
        return communicator.calls["allocate"]

    assert world(2, run) == [0, 0]


def test_another_aggregator_is_delayed_as_a_whole():
    def run(communicator):
        w = Variable(np.zeros(2), name="w")
        Arena([w])
        aggregator = Delayed(Adasum(communicator))
        found = []
        for step in (1.0, 2.0, 3.0):
            own = np.array([step, 0.0]) if communicator.rank else np.array([0.0, step])  # orthogonal: added
            found.append(aggregator.reduce([(own, w)], Ticket(examples=1))[0][0])
        return [None if g is None else g.tolist() for g in (*found[:1], found[2])]

    assert world(2, run) == [[None, [2.0, 2.0]]] * 2


@pytest.mark.parametrize("ranks", [1, 3])
def test_optimize_loss_takes_a_step_without_examples_while_gradients_are_pending(ranks):
    def run(communicator):
        w = Variable(np.zeros(2, "f4"), name="w")
        train_op = optimize_loss(
            lambda x: ops.reduce_sum(w * x) + ops.reduce_sum(x) * 2.0,
            None,
            1.0,
            SGD,
            gradient_aggregator=Delayed(AllReduce(communicator)),
            variables=[w],
            examples=len,
        )
        losses = [float(train_op(np.ones((n, 2), "f4"))) for n in (2, 0, 1)]
        return losses, w.numpy().tolist()

    # 2 rows of two ones: the loss is 2 x 2 each; the gradient of one row is [1, 1].
    assert world(ranks, run) == [([4.0, 0.0, 2.0], [-1.0, -1.0])] * ranks


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2)])
def test_a_training_resumes_to_the_bits_of_an_undisturbed_one(tmp_path, ranks, replicas):
    def run(communicator):
        settings = {"global_batch": 17, "delayed": True}
        whole = training.run(training.trainer(communicator, replicas, steps=8, **settings))
        training.run(training.trainer(communicator, replicas, steps=4, output=tmp_path, **settings))
        communicator.barrier()
        second = training.trainer(communicator, replicas, steps=8, output=tmp_path, **settings)
        assert second.resume() == "resumed after step 4"
        training.run(second)
        return training.state(whole), training.state(second)

    results = world(ranks, run)
    for whole, resumed in results:
        for name, expected in results[0][0].items():
            np.testing.assert_array_equal(whole[name], expected, err_msg=name)
            np.testing.assert_array_equal(resumed[name], expected, err_msg=name)


def test_a_training_refuses_a_loss_scale_that_may_change_before_the_gradients_come():
    task = dataclasses.replace(
        training.TASK, optimizer=lambda rate, examples, batch, **o: LossScaleOptimizer(SGD(0.05, **o))
    )
    with connect("local") as communicator, pytest.raises(ValueError, match="use a fixed scale"):
        training.trainer(communicator, task=task, delayed=True)
