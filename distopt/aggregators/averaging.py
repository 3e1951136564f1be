"""Average variables over ranks, each rank weighted by a count of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array, namespace
from distopt.communicators import Communicator
from distopt.communicators.communicator import wire_dtype
from distopt.variables import Slab, Variable

__all__ = ["average_over_ranks", "take_over"]


def average_over_ranks(communicator: Communicator, variables: Sequence[Variable], count: float) -> int:
    """Set variables to the sum over ranks of (count x value), divided by the sum of counts. Collective.

    Values are multiplied by counts and divided by their sum in the end, not multiplied by shares: shares that
    are rounded have a sum beside 1, by which every averaging would scale the variables. 16-bit
    floats are averaged in float32. Where all counts are 0, nothing is touched.

    Args:
        communicator: over whose ranks.
        variables: of floats; the same on every rank, in the same order.
        count: this rank's weight, >= 0.

    Returns:
        How many bytes this rank sent to others.
    """
    total = float(_counts(communicator, count).sum())
    if not total:
        return 0
    given = {id(variable) for variable in variables}
    whole: dict[int, Slab] = {}
    loose: list[Variable] = []
    for variable in variables:
        slab = variable.slab
        if slab is not None and all(id(member) in given for member in slab.variables):
            whole[slab.number] = slab
        else:
            loose.append(variable)
    sent = sum(_average(communicator, whole[number].values, count, total) for number in sorted(whole))
    for dtype in sorted({str(variable.dtype) for variable in loose}):
        sent += _average_packed(communicator, [v for v in loose if str(v.dtype) == dtype], count, total)
    for variable in variables:
        variable.version += 1
    return sent


def take_over(communicator: Communicator, variables: Sequence[Variable], count: float) -> None:
    """Set variables to those of the rank with the largest count, the first one of several. Collective.

    Args:
        communicator: over whose ranks.
        variables: the same on every rank, in the same order.
        count: of this rank.
    """
    leader = int(np.argmax(_counts(communicator, count)))
    for variable in variables:
        with variable.device.activate():
            value = variable.value.reshape(-1).copy()
            communicator.broadcast(value, leader).wait()
            variable.assign(value.reshape(variable.shape))


def _counts(communicator: Communicator, count: float) -> Array:
    return communicator.all_gather(np.array([count], np.float64)).wait().reshape(-1)


def _average_packed(communicator: Communicator, variables: list[Variable], count: float, total: float) -> int:
    device = variables[0].device
    with device.activate():
        flat = namespace(variables[0].value).concatenate([v.value.reshape(-1) for v in variables])
    sent = _average(communicator, flat, count, total)
    start = 0
    for variable in variables:
        with variable.device.activate():
            part = flat[start : start + variable.size].reshape(variable.shape)
            variable.value[...] = variable.device.asarray(part)
        start += variable.size
    return sent


def _average(communicator: Communicator, values: Array, count: float, total: float) -> int:
    sums = values.astype(wire_dtype(values.dtype), copy=False)
    sums *= sums.dtype.type(count)
    communicator.all_reduce(sums).wait()
    sums /= sums.dtype.type(total)
    if sums is not values:
        values[...] = sums
    return sent_by_all_reduce(sums.nbytes, communicator.size)
