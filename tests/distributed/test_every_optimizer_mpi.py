"""Every optimizer under mpirun: the bits of one process, on any number of ranks."""

import numpy as np
import pytest
from every import CLASSES, make, shares, variables

from distopt.aggregators import AllReduce
from distopt.communicators import connect
from distopt.variables import Arena


def _trained(communicator, name, arena):
    own = variables()
    if arena:
        Arena(own)
    optimizer = make(name, gradient_aggregator=AllReduce(communicator, "sum"))
    for step in range(4):
        pairs = zip(shares(step, communicator.size, communicator.rank), own, strict=True)
        optimizer.apply_gradients(pairs)
    return [w.numpy() for w in own] + optimizer.get_weights()


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_the_sum_over_ranks_trains_with_the_bits_of_one_process(communicator, name, arena):
    with connect("local") as alone:
        expected = _trained(alone, name, arena)
    for found in communicator.all_gather_object(_trained(communicator, name, arena)):
        for value, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(value, wanted)
