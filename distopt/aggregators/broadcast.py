"""Start every rank from the same values."""

from __future__ import annotations

from collections.abc import Iterable

from distopt.aggregators.agreement import check_same, schema_of
from distopt.backend import namespace
from distopt.communicators import Communicator
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
        CommunicatorError: ranks gave variables of other names, shapes or dtypes; all ranks raise it, and it
            names the first such variable, and the rank.
    """
    given = list(variables)
    # Whether a rank has put its variables into an arena says nothing about their values.
    own = [(name, shape, dtype, None) for name, shape, dtype, _ in schema_of(given)]
    everyone = communicator.all_gather_object((communicator.host, own))
    for rank, (host, other) in enumerate(everyone):
        check_same(everyone[0][1], other, rank, host)
    for variable in given:
        with variable.device.activate():
            value = namespace(variable.value).ascontiguousarray(variable.value)
            communicator.broadcast(value.reshape(-1), root).wait()
            if value is not variable.value:  # one that was put there by hand in another layout
                variable.value[...] = value.reshape(variable.shape)
        variable.version += 1
