"""The drift check over ranks as threads; a part of it runs under mpirun in tests/distributed."""

import logging
import re

import ml_dtypes
import numpy as np
import pytest

from distopt.aggregators import AllReduce
from distopt.communicators import connect
from distopt.drift import DriftCheck, fingerprints, replicated
from distopt.errors import DriftError
from distopt.optimizers import Adam, ExponentialMovingAverage, LossScaleOptimizer
from distopt.testing import world
from distopt.variables import Arena, Variable

MASK = (1 << 64) - 1


def _model(communicator, in_arena=True):
    """Two steps of Adam on a small model: values, slots m and v, iterations, moving averages."""
    random = np.random.default_rng(3)
    variables = [
        Variable(random.standard_normal((37, 5)).astype("f4"), name="first"),
        Variable(random.standard_normal(4099), name="second"),
        Variable(np.float32(2.0), name="scalar"),
    ]
    if in_arena:
        Arena(variables)
    optimizer = Adam(0.1, gradient_aggregator=AllReduce(communicator, "sum"))
    averages = ExponentialMovingAverage(0.5)
    averages.track(variables)
    for _ in range(2):
        pairs = [(random.standard_normal(v.shape).astype(v.dtype), v) for v in variables]
        optimizer.apply_gradients(pairs)
        averages.apply(variables)
    return variables, optimizer, averages


def _flip(array, element, bit):
    """Flip one bit of one element, in place, whatever its type."""
    place = np.unravel_index(element, array.shape)
    raw = np.array([array[place]]).view(np.uint8)
    raw[bit // 8] ^= 1 << bit % 8
    array[place] = raw.view(array.dtype)[0]


def _words_by_hand(array):
    data = array.tobytes()
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    return [sum(words) & MASK, sum(i * w for i, w in enumerate(words, 1)) & MASK]


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "u1", "?", ml_dtypes.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 1000, 70_001])
def test_fingerprints_are_sums_of_words_in_python_integers(dtype, size):
    raw = np.random.default_rng(size).integers(0, 2 if dtype == "?" else 256, size * np.dtype(dtype).itemsize)
    array = raw.astype(np.uint8).view(dtype)
    assert fingerprints([array]).tolist() == [_words_by_hand(array)]


def test_fingerprints_don_t_depend_on_layout_or_address():
    array = np.random.default_rng(0).standard_normal((5, 9)).astype("f4")
    wide = np.zeros((5, 18), "f4")
    wide[:, ::2] = array
    shifted = np.zeros(46, "f4")[1:]
    shifted[:] = array.reshape(-1)
    unaligned = np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view("f4")
    found = fingerprints([array, wide[:, ::2], shifted, unaligned, array.reshape(-1)])
    assert (found == found[0]).all()


def test_swapped_words_and_each_flipped_bit_change_the_fingerprint():
    array = np.random.default_rng(1).standard_normal(6)
    swapped = array.copy()
    swapped[[1, 4]] = array[[4, 1]]
    before, after = fingerprints([array, swapped])
    assert before[0] == after[0]
    assert before[1] != after[1]
    for element in range(6):
        for bit in range(64):
            flipped = array.copy()
            _flip(flipped, element, bit)
            assert fingerprints([flipped])[0, 0] != before[0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("in_arena", [True, False])
def test_equal_replicas_raise_no_alarm(ranks, in_arena):
    def run(communicator):
        variables, optimizer, averages = _model(communicator, in_arena)
        check = DriftCheck(communicator, every=2)
        state = replicated(variables, optimizer, averages)
        steps = [step for step in range(1, 21) if check.due(step)]
        for step in steps:
            optimizer.apply_gradients([(np.full(v.shape, 0.5, v.dtype), v) for v in variables])
            averages.apply(variables)
            assert check.check(step, state) is None
        return steps, check.checks, check.read_bytes

    # Three values, two slots and one average each; the scalar is one float32; iterations 8 bytes.
    size = 4 * (37 * 5 * 4 + 4099 * 8 + 4) + 8
    expected = [] if ranks == 1 else list(range(2, 21, 2))
    assert world(ranks, run) == [(expected, len(expected), len(expected) * size)] * ranks


PLACES = ["first", "second", "scalar", "Adam/first/m", "Adam/second/v", "second/ExponentialMovingAverage"]
ELEMENTS = {"first element": 0, "middle element": 0.5, "last element": 1}
BITS = {"sign": -1, "exponent": -3, "lowest mantissa bit": 0}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("bit", BITS)
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_one_flipped_bit_is_found_and_named(name, element, bit, wrong):
    def run(communicator):
        state = replicated(*_model(communicator))
        array = state[name].value
        place = int(ELEMENTS[element] * (array.size - 1))
        right = array.reshape(-1)[place].item()
        if communicator.rank == wrong:
            _flip(array, place, BITS[bit] % (8 * array.dtype.itemsize))
        found = array.reshape(-1)[place].item()
        index = [int(n) for n in np.unravel_index(place, array.shape)]
        with pytest.raises(DriftError) as caught:
            DriftCheck(communicator).check(100, state)
        return str(caught.value), right, found, index, communicator.all_gather_object("usable")

    results = world(3, run, hosts=["node1", "node2", "node3"])
    _, right, found, index, usable = results[wrong]
    expected = f"step 100: the replicas have drifted apart in {name!r}, first at element {index}: "
    blame = f"rank {wrong} (node{wrong + 1})"
    for message, *_ in results:
        assert message.startswith(expected), message
        assert re.search(rf"{re.escape(str(found))} \(bits 0x[0-9a-f]+\) on {re.escape(blame)}", message)
        assert re.search(rf"{re.escape(str(right))} \(bits 0x[0-9a-f]+\) on rank", message)
        assert f"The minority is {blame}." in message
    assert usable == ["usable"] * 3


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("on_drift", ["stop", "repair"])
def test_two_ranks_have_no_majority_and_stop_in_any_case(wrong, on_drift):
    def run(communicator):
        v = Variable(np.arange(5.0), name="v")
        if communicator.rank == wrong:
            v.value[3] = -8.0
        with pytest.raises(DriftError) as caught:
            DriftCheck(communicator, on_drift=on_drift).check(7, {"v": v})
        return str(caught.value), v.numpy().tolist()

    results = world(2, run, hosts=["a", "b"])
    for message, _ in results:
        assert "No more than half of the ranks agree, so it can't be said who is right" in message
        assert f"-8.0 (bits 0xc020000000000000) on rank {wrong} ({'ab'[wrong]})" in message
        assert ("It can't be repaired: no more than half of the ranks agree on 'v'" in message) == (
            on_drift == "repair"
        )
    assert results[wrong][1] == [0.0, 1.0, 2.0, -8.0, 4.0]  # nothing was changed


@pytest.mark.parametrize(("ranks", "wrong"), [(3, [0]), (3, [2]), (4, [1]), (5, [0, 3])])
def test_repair_copies_what_most_ranks_have_and_goes_on(ranks, wrong, caplog):
    def run(communicator):
        variables, optimizer, averages = _model(communicator)
        state = replicated(variables, optimizer, averages)
        right = {name: v.numpy() for name, v in state.items()}
        if communicator.rank in wrong:
            _flip(state["first"].value, 30, 5)
            _flip(state["Adam/second/v"].value, 4000 + communicator.rank, 40)
            optimizer.iterations.assign(77)
        versions = variables[0].version, variables[1].version
        check = DriftCheck(communicator, on_drift="repair")
        drift = check.check(100, state)
        for name, value in right.items():
            assert state[name].numpy().tobytes() == value.tobytes(), name
        assert (variables[0].version > versions[0], variables[1].version > versions[1]) == (True, False)
        assert check.check(200, state) is None
        return drift

    drifts = world(ranks, run, hosts=[f"h{r}" for r in range(ranks)])
    assert len(set(drifts)) == 1
    assert drifts[0].repaired
    assert drifts[0].minority == tuple(wrong)
    assert drifts[0].names == ("first", "Adam/iter", "Adam/second/v")
    assert drifts[0].index == (6, 0)
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "Repaired 'first', 'Adam/iter', 'Adam/second/v' from the majority" in said[0]
    assert "'first' and 2 other array(s)" in said[0]


def test_repair_of_an_array_in_another_layout():
    def run(communicator):
        v = Variable(np.zeros((3, 2)), name="v")
        v.value = np.arange(6.0).reshape(2, 3).T
        if communicator.rank == 1:
            v.value[2, 1] = 9
        DriftCheck(communicator, on_drift="repair").check(1, {"v": v})
        return v.numpy().tolist()

    assert world(3, run) == [[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]] * 3


def test_arrays_without_a_majority_are_named_and_nothing_is_repaired():
    def run(communicator):
        a, b = np.zeros(2), np.zeros(2)
        a[0] = communicator.rank == 3  # a majority of three
        b[1] = communicator.rank >= 2  # two against two
        with pytest.raises(DriftError, match="no more than half of the ranks agree on 'b'"):
            DriftCheck(communicator, on_drift="repair").check(1, {"a": a, "b": b})
        return a[0]

    assert world(4, run) == [0.0, 0.0, 0.0, 1.0]


def test_nan_is_compared_by_its_bits():
    def run(communicator, payload):
        bits = np.array([0x7FC00000, 0x7FC00000 + payload * (communicator.rank == 1)], np.uint32)
        values = bits.view(np.float32)
        try:
            return DriftCheck(communicator).check(1, {"v": values})
        except DriftError as error:
            return str(error)

    assert world(2, lambda communicator: run(communicator, 0)) == [None, None]
    for message in world(2, lambda communicator: run(communicator, 1)):
        assert "element [1]: nan (bits 0x7fc00000) on rank 0" in message
        assert "nan (bits 0x7fc00001) on rank 1" in message


def test_minus_zero_differs_from_zero():
    def run(communicator):
        DriftCheck(communicator).check(1, {"v": np.array(-0.0 if communicator.rank else 0.0)})

    with pytest.raises(DriftError, match=r"element \[\]: 0.0 \(bits 0x0000000000000000\)"):
        world(2, run)


def test_what_is_left_out_may_differ():
    def run(communicator):
        state = {"w": np.zeros(3), "w/shard": np.full(2, float(communicator.rank))}
        check = DriftCheck(communicator, leave_out=lambda name: name.endswith("/shard"))
        return check.check(1, state)

    assert world(3, run) == [None] * 3


def test_other_state_on_a_rank_is_named_and_raised_on_all():
    def run(communicator, state):
        with pytest.raises(DriftError) as caught:
            DriftCheck(communicator).check(4, state(communicator.rank))
        return str(caught.value)

    for message in world(
        3, lambda c: run(c, lambda rank: {"v": np.zeros(2 + (rank == 2))}), hosts=list("xyz")
    ):
        assert "given other state on rank 2 (z): entry 0 is ('v', (3,), 'float64') there" in message
        assert "('v', (2,), 'float64') on rank 0" in message
    for message in world(2, lambda c: run(c, lambda rank: {"v": 0.0 * np.ones(1)} if rank else {})):
        assert "entry 0 is ('v', (1,), 'float64') there and missing on rank 0" in message


def test_a_step_s_difference_is_found_at_the_next_check_and_not_before():
    def run(communicator):
        variables, optimizer, averages = _model(communicator)
        check = DriftCheck(communicator, every=5)
        for step in range(1, 11):
            if step == 7 and communicator.rank == 2:
                _flip(variables[1].value, 17, 50)  # a bit that later roundings keep
            pairs = [(np.full(v.shape, 0.5, v.dtype), v) for v in variables]
            optimizer.apply_gradients(pairs)
            averages.apply(variables)
            if check.due(step):
                try:
                    check.check(step, replicated(variables, optimizer, averages))
                except DriftError as error:
                    return step, str(error)
        return None

    for step, message in world(3, run):
        assert step == 10
        # The flipped value stays in the value and gets into its average; the slots don't see it.
        assert "'second' and 1 other array(s), first at element [17]" in message


def test_what_a_loss_scale_and_transformers_keep_is_checked_too():
    class Counting:
        def __init__(self):
            self.count = Variable(0.0, name="count")

        def __call__(self, pairs):
            self.count.assign_add(1.0)
            return pairs

        def variables(self):
            return [self.count]

    with connect("local"):
        w = Variable(np.zeros(2, "f4"), name="w")
        optimizer = LossScaleOptimizer(Adam(gradient_transformers=[Counting()]))
        optimizer.apply_gradients([(np.ones(2, "f4"), w)])
        names = list(replicated([w], optimizer))
    assert names == [
        "w", "current_loss_scale", "good_steps", "Adam/iter", "Adam/w/m", "Adam/w/v", "count"
    ]  # fmt: skip


def test_variables_of_one_name_are_all_compared():
    def run(communicator):
        twins = [Variable(np.zeros(2), name="w"), Variable(np.zeros(2), name="w")]
        if communicator.rank == 1:
            twins[1].value[1] = 1.0
        DriftCheck(communicator).check(1, replicated(twins))

    with pytest.raises(DriftError, match="'w#2', first at element"):
        world(2, run)


def test_wrong_arguments_are_refused():
    with connect("local") as communicator:
        with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
            DriftCheck(communicator, every=0)
        with pytest.raises(ValueError, match="'stop' or 'repair', got 'ignore'"):
            DriftCheck(communicator, on_drift="ignore")
