"""What a codec leaves out: that it arrives later, is saved, divided anew, and never poisoned."""

import numpy as np
import pytest
from codec_cases import FEEDBACK, RANKS, SHAPES, bits, gradients_of, model, one_step

from distopt.aggregators import AllReduce, Compressed, Ticket
from distopt.communicators import LocalCommunicator
from distopt.optimizers import SGD, LossScaleOptimizer
from distopt.testing import world
from distopt.variables import Arena, IndexedSlices, Variable


@pytest.mark.parametrize("name", FEEDBACK)
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("ranks", RANKS)
def test_what_arrives_over_steps_and_what_is_left_are_what_was_sent(name, in_arena, ranks):
    steps, examples = 12, 2.0 * ranks

    def run(communicator):
        variables = model(in_arena)
        aggregator = Compressed(communicator, name, bucket_bytes=256, min_elements=4)
        arrived = [0.0] * len(variables)
        for step in range(steps):
            found = one_step(aggregator, variables, step, examples=2.0)
            arrived = [total + g.astype(float) for total, g in zip(arrived, found, strict=True)]
        return arrived, aggregator.state()

    names = list(SHAPES)
    sent = [np.zeros(shape) for shape in SHAPES.values()]
    for rank in range(ranks):
        for step in range(steps):
            for total, gradient in zip(sent, gradients_of(model(False), rank, step), strict=True):
                total += gradient
    for arrived, state in world(ranks, run):
        left_somewhere = 0.0
        for number, name_of in enumerate(names):
            own = state.get(f"first:{name_of}")
            summed = state.get(f"second:{name_of}")
            left = (
                0.0 if own is None else own.astype(float).sum(axis=0).reshape(sent[number].shape) / examples
            )
            left = left if summed is None else left + summed.astype(float).reshape(sent[number].shape)
            left_somewhere += np.abs(left).sum()
            np.testing.assert_allclose(arrived[number] + left, sent[number] / examples, atol=2e-5)
        assert left_somewhere > 0


def test_without_feedback_what_is_left_out_is_lost():
    # The negative control of the test above.
    def run(communicator):
        variables = model(shapes={"w": (100,)})
        aggregator = Compressed(communicator, "topk:0.1", min_elements=0)
        steady = np.linspace(1, 2, 100, dtype="f4")
        total = sum(
            np.array(aggregator.reduce([(steady, variables[0])], Ticket(examples=1))[0][0]) for _ in range(50)
        )
        return total[0]

    assert world(2, run) == [0.0] * 2


def _poison(aggregator, variables, kind):
    """Do a step that is left out."""
    rank = aggregator.communicator.rank
    gradients = gradients_of(variables, rank, 99)
    if kind == "no examples":
        reduced = aggregator.reduce([(None, v) for v in variables], Ticket())
        assert not aggregator.ready
        assert all(g is None for g, _ in reduced)
    elif kind == "infinite gradient":
        gradients[3][0] = np.inf  # of one variable, in a bucket of its own; of one rank
        if rank == 0:
            gradients[3][0] = 0
        aggregator.reduce(zip(gradients, variables, strict=True), Ticket(examples=1))
    else:
        aggregator.reduce(
            zip(gradients, variables, strict=True), Ticket(examples=1, not_finite=float(rank == 0))
        )


_STEADY = [name for name in FEEDBACK if "stochastic" not in name]  # the random numbers go by the step


@pytest.mark.parametrize("name", [*_STEADY, "powersgd:2"])
@pytest.mark.parametrize("kind", ["no examples", "infinite gradient", "loss not finite"])
def test_a_step_that_is_left_out_leaves_residuals_alone(name, kind):
    def run(communicator, poisoned):
        variables = model()
        aggregator = Compressed(communicator, name, bucket_bytes=300, min_elements=4)
        one_step(aggregator, variables, 0)
        if poisoned:
            _poison(aggregator, variables, kind)
        return bits([*one_step(aggregator, variables, 1), *aggregator.state().values()])

    assert world(2, lambda c: run(c, True)) == world(2, lambda c: run(c, False))


@pytest.mark.parametrize("name", ["ef-int8:64", "ef-topk:0.2", "ef-powersgd:2"])
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_what_is_left_of_a_variable_waits_until_it_has_a_gradient_again(name, in_arena, rows):
    def run(communicator):
        variables = model(in_arena)
        aggregator = Compressed(communicator, name, min_elements=4)
        one_step(aggregator, variables, 0)
        before = aggregator.state()
        gradients = gradients_of(variables, communicator.rank, 1)
        gradients[0] = IndexedSlices(gradients[0][:2], [4, 7], (13, 11)) if rows else None
        reduced = aggregator.reduce(zip(gradients, variables, strict=True), Ticket(examples=1))
        assert isinstance(reduced[0][0], IndexedSlices) if rows else reduced[0][0] is None
        after = aggregator.state()
        mine = [key for key in before if key.endswith(":w")]
        assert mine
        assert all(np.array_equal(before[key], after[key]) for key in mine)
        others = [key for key in before if key.startswith("first:") and key not in mine]
        return not any(np.array_equal(before[key], after[key]) for key in others)

    assert world(2, run) == [True] * 2


@pytest.mark.parametrize("name", [*FEEDBACK, "powersgd:2", "int8:64:stochastic", "fp16"])
@pytest.mark.parametrize("in_arena", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(name, in_arena, ranks):
    def run(communicator):
        variables = model(in_arena)
        aggregator = Compressed(communicator, name, bucket_bytes=300, min_elements=4)
        for step in range(3):
            one_step(aggregator, variables, step)
        state = aggregator.state()
        again = model(in_arena)
        resumed = Compressed(communicator, name, bucket_bytes=300, min_elements=4)
        resumed.load_state(state, again)
        unused = resumed.state()  # before a step
        assert {k: v.tobytes() for k, v in unused.items()} == {k: v.tobytes() for k, v in state.items()}
        undisturbed = [bits(one_step(aggregator, variables, step)) for step in (3, 4)]
        return undisturbed == [bits(one_step(resumed, again, step)) for step in (3, 4)]

    assert world(ranks, run) == [True] * ranks


@pytest.mark.parametrize("name", ["ef-int8:64", "ef-topk:0.2", "ef-powersgd:2"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("bucket_bytes", [300, 1 << 20])
def test_another_number_of_ranks_has_the_same_sum_of_residuals(name, before, after, bucket_bytes):
    def first(communicator):
        variables = model()
        aggregator = Compressed(communicator, name, bucket_bytes=300, min_elements=4)
        for step in range(3):
            one_step(aggregator, variables, step)
        return aggregator.state()

    saved = world(before, first)[0]

    def second(communicator):
        variables = model()
        aggregator = Compressed(communicator, name, bucket_bytes=bucket_bytes, min_elements=4)
        aggregator.load_state(saved, variables)
        loaded = aggregator.state()
        one_step(aggregator, variables, 3)
        return loaded, aggregator.state()

    for loaded, later in world(after, second):
        assert loaded.keys() == later.keys() == saved.keys()
        for key, array in loaded.items():
            if key.startswith("first:"):
                assert array.shape == later[key].shape == (after, saved[key].shape[1])
                total = saved[key].astype(float).sum(axis=0)
                np.testing.assert_allclose(array.astype(float).sum(axis=0), total, atol=1e-6)
            else:
                np.testing.assert_array_equal(array, saved[key])


def test_the_state_of_another_codec_or_model_is_refused():
    with LocalCommunicator() as communicator:
        variables = model()
        feedback = Compressed(communicator, "ef-int8", min_elements=0)
        one_step(feedback, variables, 0)
        state = feedback.state()
        for name in ("int8", "ef-topk:0.1", "ef-powersgd"):
            with pytest.raises(ValueError, match="has no use"):
                Compressed(communicator, name).load_state(state, variables)
        with pytest.raises(ValueError, match="no variable 'w'"):
            Compressed(communicator, "ef-int8").load_state(state, variables[1:])
        with pytest.raises(ValueError, match="has shape"):
            Compressed(communicator, "ef-int8").load_state(state, model(shapes=dict.fromkeys(SHAPES, (7, 2))))
        with pytest.raises(ValueError, match="AllReduce keeps nothing"):
            AllReduce(communicator).load_state(state, variables)
        low = Compressed(communicator, "powersgd:1", min_elements=0)
        one_step(low, variables, 0)
        with pytest.raises(ValueError, match=r"'q:.*has shape"):
            Compressed(communicator, "powersgd:2").load_state(low.state(), variables)


def test_a_loss_scale_that_overflows_leaves_residuals_and_variables_alone():
    def run(communicator):
        variables = [Variable(np.ones(64, "f4"), name="w")]
        Arena(variables)
        aggregator = Compressed(communicator, "ef-int8:16", min_elements=0)
        optimizer = LossScaleOptimizer(SGD(0.1, gradient_aggregator=aggregator), initial_scale=4.0)
        good = np.linspace(-1, 1, 64, dtype="f4")
        optimizer.apply_gradients([(good * 4, variables[0])], examples=1)
        before, kept = variables[0].numpy().copy(), aggregator.state()
        bad = good.copy()
        bad[communicator.rank] = np.inf
        optimizer.apply_gradients([(bad, variables[0])], examples=1)
        assert optimizer.loss_scale == 2.0
        same = all(np.array_equal(kept[key], array) for key, array in aggregator.state().items())
        return same and np.array_equal(variables[0].numpy(), before)

    assert world(2, run) == [True] * 2


@pytest.mark.parametrize(
    ("codec", "converges"),
    [
        ("fp16", True),
        ("ef-int8", True),
        ("ef-sign:32", True),
        ("ef-topk:0.05", True),
        ("ef-powersgd:1", True),
        ("topk:0.05", False),
    ],
)
def test_least_squares_on_three_uneven_ranks_converges(codec, converges):
    # 3 ranks with 20, 8 and 0 of 28 examples; 10 x 8 unknowns, which a plane alone would not fit.
    random = np.random.default_rng(0)
    solution = random.standard_normal((10, 8)).astype("f4")
    inputs = random.standard_normal((28, 10)).astype("f4")
    targets = inputs @ solution
    cuts = [slice(0, 20), slice(20, 28), slice(28, 28)]

    def run(communicator):
        variable = Variable(np.zeros((10, 8), "f4"), name="w")
        Arena([variable])
        aggregator = Compressed(communicator, codec, min_elements=0)
        own = cuts[communicator.rank]
        x, y = inputs[own], targets[own]
        for _ in range(400):
            gradient = x.T @ (x @ variable.value - y)
            ((mean, _),) = aggregator.reduce([(gradient, variable)], Ticket(examples=len(x)))
            variable.value -= np.float32(0.1) * mean
        return float(np.abs(variable.value - solution).max())

    errors = world(3, run)
    assert len(set(errors)) == 1
    if converges:
        assert errors[0] < 0.02
    else:
        assert errors[0] > 0.001


@pytest.mark.parametrize("in_arena", [True, False])
def test_two_variables_of_one_name_would_share_what_is_left_and_are_refused(in_arena):
    with LocalCommunicator() as communicator:
        variables = [*model(in_arena, {"w": (40,)}), *model(in_arena, {"w": (30,)})]
        one_step(Compressed(communicator, "int8", min_elements=0), variables, 0)
        with pytest.raises(ValueError, match="two variables are named 'w'"):
            one_step(Compressed(communicator, "ef-int8", min_elements=0), variables, 0)
