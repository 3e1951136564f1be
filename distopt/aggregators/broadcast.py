"""Start every rank from the same values."""

from __future__ import annotations

from collections.abc import Iterable

from distopt.backend import namespace
from distopt.communicators import Communicator
from distopt.errors import CommunicatorError
from distopt.variables import Variable

__all__ = ["broadcast_variables"]


def broadcast_variables(variables: Iterable[Variable], communicator: Communicator, root: int = 0) -> None:
    """Give variables on all ranks the values of one rank. Collective.

    Equal gradients keep ranks alike only if they began alike: call it before the first step where initial
    values may differ, from a random generator without a seed or from a file that one rank alone has read.
    The Trainer does it by itself.

    Args:
        variables: the same on every rank, in the same order.
        communicator: the ranks.
        root: whose values all get.

    Raises:
        CommunicatorError: ranks gave variables of other shapes or dtypes; it names the first, and the rank.
    """
    given = list(variables)
    own = [(variable.name, variable.shape, str(variable.dtype)) for variable in given]
    for rank, (host, other) in enumerate(communicator.all_gather_object((communicator.host, own))):
        for number in range(max(len(own), len(other))):
            mine, theirs = own[number : number + 1], other[number : number + 1]
            if [entry[1:] for entry in mine] != [entry[1:] for entry in theirs]:
                raise CommunicatorError(
                    f"variable {number} is {theirs or 'missing'} on rank {rank} ({host}), and "
                    f"{mine or 'missing'} on rank {communicator.rank}; build the same model on every rank"
                )
    for variable in given:
        with variable.device.activate():
            value = namespace(variable.value).ascontiguousarray(variable.value)
            communicator.broadcast(value.reshape(-1), root).wait()
            if value is not variable.value:  # one that was put there by hand in another layout
                variable.value[...] = value.reshape(variable.shape)
        variable.version += 1
