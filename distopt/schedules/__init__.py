"""Learning-rate schedules: pure functions of the step, serialisable; and TensorFlow 1's functions.

A schedule is called with the number of updates done so far (0, 1, 2 ...) and returns the learning
rate of the next update, as a Python float. It keeps no state, so a resumed run continues on the
same curve, and every rank gets the same number. Names, arguments and formulas are those of
`tf.keras.optimizers.schedules`; the arithmetic is float64 (TensorFlow's is float32, it agrees to
1e-5).

    >>> rate = ExponentialDecay(0.1, decay_steps=10, decay_rate=0.5, staircase=True)
    >>> [rate(step) for step in (0, 9, 10, 25)]
    [0.1, 0.1, 0.05, 0.025]
    >>> deserialize(serialize(rate)) == rate
    True

`exponential_decay` and the other functions in lower case are those of `tf.train`: bound to a global
step, they return a callable without arguments.

A schedule counts steps. To let the rate decay by examples seen, whatever the number of ranks,
compute `decay_steps` from the global batch with the function of that name.
"""

from distopt.schedules.cosine import (
    CosineDecay,
    CosineDecayRestarts,
    LinearCosineDecay,
    NoisyLinearCosineDecay,
)
from distopt.schedules.decay import (
    ExponentialDecay,
    InverseTimeDecay,
    NaturalExpDecay,
    PiecewiseConstantDecay,
    PolynomialDecay,
)
from distopt.schedules.schedule import LearningRateSchedule
from distopt.schedules.serialization import deserialize, serialize
from distopt.schedules.tf1 import (
    DecayedLearningRate,
    cosine_decay,
    cosine_decay_restarts,
    exponential_decay,
    inverse_time_decay,
    linear_cosine_decay,
    natural_exp_decay,
    noisy_linear_cosine_decay,
    piecewise_constant,
    piecewise_constant_decay,
    polynomial_decay,
)
from distopt.schedules.warmup import (
    LinearScaling,
    LinearWarmup,
    decay_steps,
    gradual_warmup,
    scale_learning_rate,
)

__all__ = [
    "LearningRateSchedule",
    "ExponentialDecay",
    "NaturalExpDecay",
    "InverseTimeDecay",
    "PolynomialDecay",
    "PiecewiseConstantDecay",
    "CosineDecay",
    "CosineDecayRestarts",
    "LinearCosineDecay",
    "NoisyLinearCosineDecay",
    "LinearWarmup",
    "LinearScaling",
    "gradual_warmup",
    "decay_steps",
    "scale_learning_rate",
    "serialize",
    "deserialize",
    "DecayedLearningRate",
    "exponential_decay",
    "natural_exp_decay",
    "inverse_time_decay",
    "polynomial_decay",
    "piecewise_constant",
    "piecewise_constant_decay",
    "cosine_decay",
    "cosine_decay_restarts",
    "linear_cosine_decay",
    "noisy_linear_cosine_decay",
]
