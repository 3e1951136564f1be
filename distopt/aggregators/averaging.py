"""Average variables over ranks, each rank weighted by a count of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array, Device, namespace
from distopt.communicators import Communicator
from distopt.communicators.communicator import wire_dtype
from distopt.errors import CommunicatorError
from distopt.variables import Slab, Variable

__all__ = ["average_over_ranks", "settle_others", "take_over"]


def average_over_ranks(
    communicator: Communicator, variables: Sequence[Variable], count: float, packed: bool = False
) -> int:
    """Set variables to the sum over ranks of (count x value), divided by the sum of counts. Collective.

    Values are multiplied by counts and divided by their sum in the end, not multiplied by shares: shares that
    are rounded have a sum beside 1, by which every averaging would scale the variables. 16-bit
    floats are averaged in float32. Where all counts are 0, nothing is touched.

    Args:
        communicator: over whose ranks.
        variables: of floats; the same on every rank, in the same order.
        count: this rank's weight, >= 0.
        packed: don't average whole arenas in place; for variables whose arenas differ between ranks.

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
        if not packed and slab is not None and all(id(member) in given for member in slab.variables):
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


def settle_others(
    communicator: Communicator, others: Sequence[Variable], count: float, device: Device
) -> None:
    """Average arrays over the ranks that have them, and take over counts and numbers. Collective.

    What a rank lacks, such as the slots of one that never had an example, is settled among the others; it
    takes part with a weight of 0, and nothing of it is made there.

    Args:
        communicator: over whose ranks.
        others: of this rank.
        count: this rank's weight, >= 0.
        device: for the places of what this rank lacks.

    Raises:
        CommunicatorError: arrays of one name differ in shape or dtype between ranks; on every rank.
    """
    seen: dict[str, int] = {}
    own: dict[tuple[str, int], tuple[tuple[int, ...], str]] = {}
    mine: dict[tuple[str, int], Variable] = {}
    for variable in others:
        number = seen[variable.name] = seen.get(variable.name, -1) + 1
        own[variable.name, number] = variable.shape, str(variable.dtype)
        mine[variable.name, number] = variable
    everyone = communicator.all_gather_object((communicator.host, own))
    kinds: dict[tuple[str, int], tuple[tuple[int, ...], str]] = {}
    for rank, (host, theirs) in enumerate(everyone):
        for key, kind in theirs.items():
            if kinds.setdefault(key, kind) != kind:
                raise CommunicatorError(
                    f"rank {rank} on {host} has {key[0]!r} beside the variables as {kind}, a rank before "
                    f"it as {kinds[key]}; build the same optimizer on every rank"
                )
    groups: dict[tuple[int, ...], list[tuple[str, int]]] = {}
    for key in kinds:
        having = tuple(rank for rank, (_, theirs) in enumerate(everyone) if key in theirs)
        groups.setdefault(having, []).append(key)
    # Where a rank has places of its own for what it lacks, arenas differ between ranks.
    packed = any(len(having) < communicator.size for having in groups)
    for having, keys in groups.items():
        has = communicator.rank in having
        members = [mine[key] if has else _place(key[0], *kinds[key], device) for key in keys]
        single = [v for v in members if not v.ndim or v.dtype.kind in "iub"]
        singles = {id(variable) for variable in single}
        arrays = [v for v in members if id(v) not in singles]
        average_over_ranks(communicator, arrays, count if has else 0.0, packed=packed)
        take_over(communicator, single, count if has else -1.0)


def _place(name: str, shape: tuple[int, ...], dtype: str, device: Device) -> Variable:
    return Variable(np.zeros(shape, np.dtype(dtype)), False, name, dtype, device=device)


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
