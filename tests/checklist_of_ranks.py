"""Two rows of TensorFlow's checklist that tests/distributed runs under mpirun as well."""

import numpy as np

from distopt import ops
from distopt.aggregators import AllReduce
from distopt.losses import compute_average_loss
from distopt.optimizers import SGD
from distopt.variables import Variable

_RANDOM = np.random.default_rng(5)
X = _RANDOM.standard_normal((7, 3))
Y = _RANDOM.standard_normal((7, 1))
STEPS = 4


def clipped_sum(communicator):
    """Apply gradient 1 on rank 0 and 2 on the others with clipvalue 2; return how far the weight moved."""
    w = Variable(0.0, name="w")
    optimizer = SGD(1.0, clipvalue=2.0, gradient_aggregator=AllReduce(communicator, "sum"))
    optimizer.apply_gradients([(np.float32(1 + min(communicator.rank, 1)), w)])
    return -float(w)


def trained(communicator):
    """Train a linear model, the loss (sum over own examples) / (global batch); shards are unequal."""
    first, last = (
        (7 * rank**2) // communicator.size**2 for rank in (communicator.rank, communicator.rank + 1)
    )
    x, y = X[first:last], Y[first:last]
    w = Variable(np.zeros((3, 1)), name="w")
    optimizer = SGD(0.1, momentum=0.9, gradient_aggregator=AllReduce(communicator, "sum"))

    def loss():
        each = ops.reduce_sum(ops.square(ops.matmul(x, w) - y), axis=1)
        return compute_average_loss(each, global_batch_size=len(X))

    for _ in range(STEPS):
        optimizer.minimize(loss, [w])
    return w.numpy()


def expected():
    """Return the weights that NumPy trains on the whole batch; Keras' momentum holds the rate."""
    w, velocity = np.zeros((3, 1)), np.zeros((3, 1))
    for _ in range(STEPS):
        velocity = 0.9 * velocity - 0.1 * (2 / len(X)) * (X.T @ (X @ w - Y))
        w = w + velocity
    return w
