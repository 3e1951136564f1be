"""Inputs on which every primitive's gradient is checked: name -> list of (inputs, options).

Inputs are float64 arrays; where a primitive is not smooth they keep away from the kink.
"""

import numpy as np

from distopt.communicators.local import LocalCommunicator
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.pooling import AveragePool, MaxPool
from distopt.regularizers import l1_regularizer, l2_regularizer

_random = np.random.default_rng(7)


def _normal(*shape):
    return _random.standard_normal(shape)


def _positive(*shape):
    return _random.uniform(0.5, 2.0, shape)


def _away_from_zero(*shape):
    return _random.uniform(0.2, 1.0, shape) * _random.choice([-1.0, 1.0], shape)


def _distinct(*shape):
    """Values at least 0.01 apart, so that a maximum stays where it is."""
    count = int(np.prod(shape))
    return (_random.permutation(count) * 0.01 - count * 0.005).reshape(shape)


_LABELS = np.array([2, 0, 1, 2])

CASES = {
    "add": [((_normal(3, 4), _normal(4)), {}), ((_normal(2, 1, 3), _normal(4, 1)), {})],
    "subtract": [((_normal(3, 4), _normal(3, 1)), {}), ((_normal(4), _normal(2, 4)), {})],
    "multiply": [((_normal(3, 4), _normal(4)), {}), ((_normal(), _normal(2, 2)), {})],
    "divide": [((_normal(3, 4), _positive(4)), {}), ((_normal(1, 4), _away_from_zero(3, 1)), {})],
    "power": [((_positive(3, 4), _normal(4)), {}), ((_positive(5), 3.0), {}), ((2.0, _normal(5)), {})],
    "maximum": [((_distinct(3, 4), _distinct(3, 4) + 0.005), {}), ((_away_from_zero(5), 0.0), {})],
    "minimum": [((_distinct(3, 4), _distinct(3, 4) + 0.005), {}), ((_away_from_zero(5), 0.0), {})],
    "negative": [((_normal(3, 4),), {})],
    "absolute": [((_away_from_zero(3, 4),), {})],
    "square": [((_normal(3, 4),), {})],
    "sqrt": [((_positive(3, 4),), {})],
    "exp": [((_normal(3, 4),), {})],
    "log": [((_positive(3, 4),), {})],
    "tanh": [((_normal(3, 4),), {})],
    "sigmoid": [((_normal(3, 4),), {})],
    "relu": [((_away_from_zero(3, 4),), {})],
    "cast": [((_normal(3, 4),), {"dtype": np.float64})],
    "matmul": [((_normal(3, 4), _normal(4, 2)), {}), ((_normal(0, 4), _normal(4, 2)), {})],
    "dense": [
        ((_normal(3, 4), _normal(4, 2), _normal(2)), {}),
        ((_normal(5, 4), _normal(4, 3), _normal(3)), {"relu": True}),
    ],
    "batch_normalization": [
        ((_normal(6, 4), _normal(4), _normal(4)), {}),
        ((_normal(2, 3, 2, 3), None, _normal(3)), {"epsilon": 0.1}),
        ((_normal(3, 2, 2), _normal(2), None), {"communicator": LocalCommunicator()}),
        ((_normal(0, 3), _normal(3), _normal(3)), {}),
    ],
    "sum_over_ranks": [((_normal(3, 2),), {"communicator": LocalCommunicator()})],
    "identity": [((_normal(3),), {})],
    "reshape": [((_normal(3, 4),), {"shape": (2, 6)}), ((_normal(2, 3, 2),), {"shape": (-1, 2)})],
    "transpose": [((_normal(2, 3, 4),), {"axes": (2, 0, 1)}), ((_normal(2, 3),), {})],
    "concat": [((_normal(2, 3), _normal(4, 3)), {}), ((_normal(2, 3), _normal(2, 1)), {"axis": 1})],
    "slice_of": [
        ((_normal(5, 3),), {"key": slice(1, 4)}),
        ((_normal(5, 3),), {"key": (slice(None, None, 2), 1)}),
    ],
    "gather": [
        ((_normal(5, 3),), {"indices": np.array([4, 0, 4])}),
        ((_normal(4),), {"indices": np.array([[1, 1], [3, 0]])}),
    ],
    "scatter_slice": [
        ((_normal(3, 3),), {"key": slice(1, 4), "shape": (5, 3)}),
        ((_normal(3),), {"key": (slice(None, None, 2), 1), "shape": (5, 3)}),
    ],
    "scatter_rows": [((_normal(3, 2),), {"indices": np.array([4, 0, 4]), "rows": 5})],
    "broadcast_to": [((_normal(3, 1),), {"shape": (2, 3, 4)}), ((_normal(),), {"shape": (2, 2)})],
    "select": [
        ((_normal(3, 4), _normal(4)), {"condition": np.arange(12).reshape(3, 4) % 5 < 2}),
        ((_normal(4), 0.5), {"condition": np.array([True, False, False, True])}),
    ],
    "reduce_sum": [((_normal(3, 4),), {}), ((_normal(2, 3, 4),), {"axis": (0, 2)})],
    "reduce_mean": [
        ((_normal(3, 4),), {}),
        ((_normal(2, 3, 4),), {"axis": 1, "keepdims": True}),
        ((_normal(2, 3),), {"axis": -1}),
    ],
    "add_n": [((_normal(3), _normal(3), _normal(3)), {})],
    "l2_loss": [((_normal(3, 4),), {})],
    "regularization_loss": [
        ((_normal(3, 4),), {"regularizer": l2_regularizer(0.1)}),
        ((_away_from_zero(3, 4),), {"regularizer": l1_regularizer(0.1)}),
    ],
    "sparse_softmax_cross_entropy": [
        ((_normal(4, 3),), {"labels": _LABELS}),
        ((_normal(4, 3),), {"labels": _LABELS, "reduction": "none"}),
        ((_normal(0, 3),), {"labels": np.zeros(0, np.int64)}),
    ],
    "softmax_cross_entropy": [
        ((_normal(4, 3),), {"labels": _positive(4, 3)}),
        ((_normal(4, 3),), {"labels": np.eye(3)[_LABELS], "reduction": "none"}),
        ((_normal(0, 3),), {"labels": np.zeros((0, 3))}),
    ],
    "sigmoid_cross_entropy": [
        ((_normal(4, 3),), {"labels": _random.uniform(0, 1, (4, 3))}),
        ((np.zeros(3),), {"labels": np.array([0.0, 0.5, 1.0])}),
    ],
    "mean_squared_error": [
        ((_normal(4, 3),), {"targets": _normal(4, 3)}),
        ((_normal(4, 3),), {"targets": _normal(4, 3), "reduction": "none"}),
    ],
    "chain": [
        (
            (_normal(2, 5, 5, 3), _normal(3, 3, 3, 4), _normal(4)),
            {"stages": (Convolution(),), "counts": (2,)},
        ),
        (
            (_normal(1, 6, 7, 2), _normal(3, 2, 2, 3)),
            {"stages": (Convolution(strides=2, padding="VALID"),), "counts": (1,)},
        ),
        (
            (_normal(1, 9, 9, 16), _normal(5, 5, 16, 16) * 0.1, _normal(16)),
            {"stages": (Convolution(relu=True),), "counts": (2,)},
        ),
        ((_distinct(2, 5, 5, 3),), {"stages": (MaxPool(3, 2, "SAME"),)}),
        ((_normal(2, 5, 5, 3),), {"stages": (AveragePool(2, 2, "SAME"),)}),
        ((_normal(2, 3, 3, 12),), {"stages": (LocalResponseNormalization(4, 1.0, 0.3, 0.75),)}),
        (
            (_normal(3, 6, 6, 2), _normal(3, 3, 2, 4), _normal(4)),
            {
                "stages": (
                    Convolution(relu=True),
                    MaxPool(3, 2, "SAME"),
                    LocalResponseNormalization(1, 1.0, 0.1, 0.5),
                ),
                "counts": (2,),
            },
        ),
    ],
}
