"""Batch normalization over ranks beside streaming reductions: valid for any number of ranks."""

import numpy as np

from distopt import ops, scopes
from distopt.aggregators import AllReduce
from distopt.layers import BatchNormalization
from distopt.optimizers import SGD
from distopt.variables import Arena, Variable


def test_ranks_without_a_gradient_keep_the_order_of_collectives(communicator):
    # Rank 1 doesn't use `last`, so its first bucket becomes complete at another time.
    with scopes.Graph(seed=1).as_default() as graph:
        first = Variable(np.ones((2, 4), np.float32), name="first")
        normalization = BatchNormalization(communicator=communicator, name="normalization")
        with graph.step():
            normalization(np.zeros((1, 4), np.float32))
        last = Variable(np.ones((4,), np.float32), name="last")
        variables = [first, *normalization.trainable_variables, last]
        Arena(variables)
        optimizer = SGD(0.1, gradient_aggregator=AllReduce(communicator, "sum", bucket_bytes=64))

        def loss(step):
            x = np.arange(2 * (communicator.rank + 1), dtype=np.float32).reshape(-1, 2) + step
            hidden = normalization(ops.matmul(x, first), training=True)
            if communicator.rank != 1:
                hidden = hidden * last
            return ops.reduce_sum(hidden * hidden)

        for step in range(4):
            optimizer.minimize(lambda step=step: loss(step), variables)
    own = np.concatenate([variable.numpy().ravel() for variable in variables])
    for other in communicator.all_gather_object(own):
        np.testing.assert_array_equal(other, own)
