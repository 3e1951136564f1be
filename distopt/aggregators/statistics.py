"""One set of statistics for all replicas: what batch normalization follows by itself, averaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distopt.communicators import Communicator
from distopt.variables import Variable

__all__ = ["average_statistics"]


def average_statistics(
    replicas: Sequence[Sequence[Variable]], communicator: Communicator, examples: Sequence[float]
) -> None:
    """Give all replicas of all ranks the mean of their statistics, weighted by examples. Collective.

    Batch normalization without a communicator follows each replica's own batches; the model that is evaluated
    and saved is one. Moving averages are linear in what they average: weighted by the examples of each
    replica's batches, the mean of the moving means is the moving mean of the whole batch, to rounding,
    however unevenly it is cut. (The mean of the moving variances lacks the variance between the
    replicas' means, by whatever it is weighted: for that, normalize with `communicator=`.)

    Args:
        replicas: for each replica of this rank, its variables that are not trained, in the same order on all;
            what is not floating stays as it is.
        communicator: the ranks.
        examples: how many examples each replica of this rank had in a batch, or in all of them. A replica
            with none has no say, and receives the mean. Where nobody has any, nothing changes.

    Raises:
        ValueError: not one number for each replica, one that is negative, or replicas that differ.
    """
    weights = [float(number) for number in examples]
    if len(weights) != len(replicas) or any(not 0 <= weight < np.inf for weight in weights):
        raise ValueError(
            f"examples must be one number >= 0 for each of {len(replicas)} replicas, got {list(examples)}"
        )
    schemas = [[(variable.name, variable.shape) for variable in statistics] for statistics in replicas]
    if any(schema != schemas[0] for schema in schemas):
        raise ValueError("the replicas of this rank have different statistics; build the same model on each")
    groups = [group for group in zip(*replicas, strict=True) if group[0].dtype.kind in "fV"]
    if not groups:
        return
    first = groups[0][0].device
    total = first.zeros(1 + sum(group[0].size for group in groups), np.float64)
    with first.activate():
        total[0] = sum(weights)
        start = 1
        for group in groups:
            own = total[start : start + group[0].size]
            for variable, weight in zip(group, weights, strict=True):
                if weight:  # 0 times what never saw a batch may be NaN
                    own += first.asarray(variable.value, np.float64).reshape(-1) * weight
            start += own.size
        communicator.all_reduce(total).wait()
        everyone = float(total[0])
        if not everyone:
            return
        total /= everyone
    start = 1
    for group in groups:
        for variable in group:
            mean = total[start : start + variable.size].reshape(variable.shape)
            variable.assign(variable.device.asarray(mean))
        start += group[0].size
