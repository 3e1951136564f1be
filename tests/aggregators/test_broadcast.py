"""Every rank starts from the same values."""

import numpy as np
import pytest

from distopt import broadcast_variables
from distopt.aggregators import AllReduce
from distopt.errors import CommunicatorError
from distopt.testing import world
from distopt.variables import Arena, Variable


@pytest.mark.parametrize("arena", [False, True])
def test_all_ranks_get_one_ranks_values(arena):
    def rank(communicator):
        variables = [
            Variable(np.full(shape, communicator.rank + 1.0), name=f"v{shape}")
            for shape in ((2, 3), (), (0,))
        ]
        if arena:
            Arena(variables)
        broadcast_variables(variables, communicator, root=1)
        return [variable.numpy().tolist() for variable in variables]

    assert world(3, rank) == [[[[2.0] * 3] * 2, 2.0, []]] * 3


def test_other_variables_are_named_with_their_rank():
    def rank(communicator):
        size = 2 if communicator.rank == 2 else 3
        broadcast_variables([Variable(np.zeros(1)), Variable(np.zeros(size), name="w")], communicator)

    with pytest.raises(CommunicatorError, match=r"rank 2 on .* variable 1 is 'w' float64\[2\] there"):
        world(3, rank)


@pytest.mark.parametrize("wrong", [None, 4])
def test_an_aggregator_needs_a_communicator(wrong):
    with pytest.raises(TypeError, match="AllReduce needs a communicator, such as"):
        AllReduce(wrong)


def test_a_value_in_another_layout_is_overwritten_too():
    def rank(communicator):
        v = Variable(np.zeros((3, 2)), name="v")
        v.value = np.full((2, 3), float(communicator.rank)).T
        broadcast_variables([v], communicator, root=1)
        return v.numpy().tolist()

    assert world(3, rank) == [[[1.0, 1.0]] * 3] * 3
