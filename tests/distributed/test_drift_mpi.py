"""The drift check under mpirun: valid for any number of ranks."""

import numpy as np
import pytest
import training

from distopt.drift import DriftCheck, replicated
from distopt.errors import DriftError


def _state(communicator):
    made = training.run(training.trainer(communicator))
    return replicated(made.replicas[0].variables, made.optimizer, made.averages)


def _flip_lowest_bit(array, element):
    raw = array.reshape(-1).view(np.uint8)
    raw[element * array.itemsize] ^= 1


def test_training_raises_no_alarm(communicator):
    assert DriftCheck(communicator).check(4, _state(communicator)) is None


def test_a_flipped_bit_on_each_rank_in_turn_is_named_on_all_ranks(communicator):
    state = _state(communicator)
    names = list(state)
    check = DriftCheck(communicator)
    for wrong in range(communicator.size if communicator.size > 1 else 0):
        name = names[wrong % len(names)]
        array = state[name].value
        place = array.size // 2
        if communicator.rank == wrong:
            _flip_lowest_bit(array, place)
        with pytest.raises(DriftError) as caught:
            check.check(wrong, state)
        index = [int(n) for n in np.unravel_index(place, array.shape)]
        assert f"apart in {name!r}, first at element {index}: " in str(caught.value)
        assert f"on rank {wrong} (" in str(caught.value)
        if communicator.size > 2:
            assert f"The minority is rank {wrong} (" in str(caught.value)
        else:
            assert "it can't be said who is right" in str(caught.value)
        if communicator.rank == wrong:
            _flip_lowest_bit(array, place)
        assert check.check(wrong, state) is None


def test_repair_restores_the_majority_s_bits(communicator):
    state = _state(communicator)
    right = {name: variable.numpy().tobytes() for name, variable in state.items()}
    if communicator.rank == 1:
        for variable in state.values():
            _flip_lowest_bit(variable.value, variable.size - 1)
    check = DriftCheck(communicator, on_drift="repair")
    if communicator.size == 2:
        with pytest.raises(DriftError, match="It can't be repaired: no more than half of the ranks agree"):
            check.check(1, state)
        return
    drift = check.check(1, state)
    assert (drift is None) == (communicator.size == 1)
    assert drift is None or drift.minority == (1,)
    assert {name: variable.numpy().tobytes() for name, variable in state.items()} == right
