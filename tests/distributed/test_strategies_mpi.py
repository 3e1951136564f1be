"""Local SGD, delayed, accumulating, Adasum and grouped aggregation under mpirun, on any number of ranks."""

import numpy as np
import pytest
import strategies_cases as cases
import training

from distopt.aggregators import Accumulate, Adasum, AllReduce, Delayed, Grouped, LocalSGD, Ticket
from distopt.errors import CommunicatorError
from distopt.optimizers import SGD
from distopt.variables import Arena, Variable

STEPS = 9


def train(communicator, aggregator, in_arena, momentum=0.5):
    """Train the linear model; return its values as one vector."""
    made = cases.variables(in_arena)
    optimizer = SGD(cases.RATE, momentum, gradient_aggregator=aggregator)
    for step in range(STEPS):
        pairs, examples = cases.pairs_of(made, step, communicator.rank, communicator.size)
        optimizer.apply_gradients(pairs, examples=examples)
    optimizer.apply_gradients(aggregator.flush(), experimental_aggregate_gradients=False)
    return np.concatenate(cases.state_of(made))


def same_everywhere(communicator, found):
    assert len(set(communicator.all_gather_object(found.tobytes()))) == 1


@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (3, 3)])
@pytest.mark.parametrize("agree_every_step", [True, False])
def test_local_sgd_is_the_loop_of_the_paper(communicator, in_arena, every, start, agree_every_step):
    aggregator = LocalSGD(communicator, every, start, agree_every_step=agree_every_step)
    found = train(communicator, aggregator, in_arena)
    expected = cases.local_sgd(communicator.size, STEPS, every, start, 0.5)
    np.testing.assert_allclose(found, expected[communicator.rank], rtol=1e-12)
    same_everywhere(communicator, found)  # the last step averaged


@pytest.mark.parametrize("in_arena", [True, False])
def test_delayed_sgd_is_that_of_numpy(communicator, in_arena):
    found = train(communicator, Delayed(AllReduce(communicator, bucket_bytes=16)), in_arena)
    np.testing.assert_allclose(found, cases.delayed(communicator.size, STEPS)[0], rtol=1e-12)
    same_everywhere(communicator, found)


def test_a_large_delayed_gradient_is_right_while_the_next_one_is_written(communicator):
    # 8 MiB in two buckets, integers: any order of sums has the same bits.
    w = Variable(np.zeros(1 << 21, "f4"), name="w")
    Arena([w], allocate=communicator.allocate)
    aggregator = Delayed(AllReduce(communicator, "sum"))
    ranks = communicator.size
    for step in range(4):
        w.gradient[...] = step * 8 + communicator.rank
        ((found, _),) = aggregator.reduce([(w.gradient, w)])
        expected = (step - 1) * 8 * ranks + ranks * (ranks - 1) // 2
        assert (found is None) if step == 0 else (found is w.gradient and (found == expected).all())


@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("n", [2, 4])
def test_accumulated_sgd_is_that_of_numpy_over_all_examples(communicator, in_arena, n):
    found = train(communicator, Accumulate(AllReduce(communicator), n), in_arena)
    updates = [range(first, min(first + n, STEPS)) for first in range(0, STEPS, n)]
    np.testing.assert_allclose(found, cases.accumulated(communicator.size, updates)[0], rtol=1e-12)
    same_everywhere(communicator, found)


@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adasum_is_the_papers_recursion(communicator, in_arena, dtype):
    shapes = [(5, 3), (), (0,), (5000,)]

    def gradients(rank):
        random = np.random.default_rng(rank)
        return [random.standard_normal(shape).astype(dtype) for shape in shapes]

    made = [Variable(np.zeros(shape, dtype), name=str(n)) for n, shape in enumerate(shapes)]
    if in_arena:
        Arena(made)
    # The last rank of several is absent.
    present = range(max(1, communicator.size - 1))
    own = Ticket(examples=float(communicator.rank in present))
    reduced = Adasum(communicator).reduce(list(zip(gradients(communicator.rank), made, strict=True)), own)
    for number, (found, _) in enumerate(reduced):
        expected = cases.adasum([np.float64(gradients(rank)[number]) for rank in present])
        np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == np.float32 else 1e-12, atol=1e-6)
        same_everywhere(communicator, found)


def test_groups_train_models_of_their_own_beside_a_shared_one(communicator):
    rank, ranks = communicator.rank, communicator.size
    group = communicator.split(rank % 2)
    body = Variable(np.zeros(1000, "f4"), name="body")
    head = Variable(np.zeros(10 + rank % 2, "f4"), name="head")  # of other sizes in the groups
    Arena([body])
    Arena([head])
    aggregator = Grouped(
        {"world": AllReduce(communicator), "group": AllReduce(group)},
        lambda variable: "group" if variable is head else "world",
    )
    optimizer = SGD(1.0, gradient_aggregator=aggregator)
    for _ in range(2):
        pairs = [(np.full(v.shape, rank * (rank + 1.0)), v) for v in (head, body)]
        optimizer.apply_gradients(pairs, examples=rank)  # none on rank 0
    members = range(rank % 2, ranks, 2)
    for variable, of in ((body, range(ranks)), (head, members)):
        expected = -2 * sum(n * (n + 1) for n in of) / max(1, sum(of))
        np.testing.assert_allclose(variable.numpy(), np.full(variable.shape, expected), rtol=1e-6)
    group.close()


def test_a_disagreement_within_a_group_names_the_group(communicator):
    group = communicator.split(communicator.rank % 2)
    w = Variable(np.zeros(2 + (communicator.rank == 3)), name="w")
    message = ""
    try:
        AllReduce(group).reduce([(w.numpy(), w)], Ticket(examples=1))
    except CommunicatorError as error:
        message = str(error)
    alike = communicator.size < 4 or communicator.rank % 2 == 0
    assert (message == "") == alike
    assert alike or (message.startswith("rank 1 on ") and "in group world/" in message)
    group.close()


@pytest.mark.parametrize(
    "settings",
    [{"delayed": True}, {"adasum": True}, {"local_steps": 3}, {"local_steps": 3, "local_start": 2}],
    ids=str,
)
def test_a_training_resumes_to_the_bits_of_an_undisturbed_one(communicator, tmp_path_factory, settings):
    folder = communicator.broadcast_object(tmp_path_factory.mktemp("run"))
    settings = {"global_batch": 17, "checkpoint_every": 4, **settings}
    whole = training.state(training.run(training.trainer(communicator, steps=8, **settings)))
    training.run(training.trainer(communicator, steps=4, output=folder, **settings))
    communicator.barrier()
    second = training.trainer(communicator, steps=8, output=folder, **settings)
    assert second.resume() == "resumed after step 4"
    resumed = training.state(training.run(second))
    for other in communicator.all_gather_object(resumed):
        for name, value in whole.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)
