"""What ranks settle before they train: that all were started alike, and what rank 0 has read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from distopt.communicators import Communicator
from distopt.errors import CheckpointError, CommunicatorError

__all__ = ["check_started_alike", "from_rank_0"]


def check_started_alike(communicator: Communicator, own: Mapping[str, Any]) -> None:
    """Compare what must be equal on all ranks. Collective.

    Args:
        communicator: the ranks.
        own: what this rank has, by a name for messages.

    Raises:
        CommunicatorError: a rank has something else than rank 0; it names the rank and the first difference.
    """
    theirs = communicator.all_gather_object((communicator.host, dict(own)))
    for rank, (host, other) in enumerate(theirs):
        for key, value in theirs[0][1].items():
            if other[key] != value:
                raise CommunicatorError(
                    f"rank {rank} on {host} has other {key} than rank 0: "
                    f"{_first_difference(value, other[key])}. Start every rank with the same command."
                )


def from_rank_0(communicator: Communicator, read: Callable[[], Any]) -> Any:
    """Return on every rank what `read` gives on rank 0, or raise on every rank what it raises there.

    Raises:
        CheckpointError: `read` did; what else it raises is raised on rank 0 alone.
    """
    result: Any = None
    if communicator.rank == 0:
        try:
            result = read()
        except CheckpointError as error:
            result = error
    result = communicator.broadcast_object(result)
    if isinstance(result, CheckpointError):
        raise result
    return result


def _first_difference(first: Any, second: Any) -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        ours, theirs = cast("dict[Any, Any]", first), cast("dict[Any, Any]", second)
        keys = [key for key in ours if ours[key] != theirs.get(key)]
        return "; ".join(f"{key}: {theirs.get(key)!r} instead of {ours[key]!r}" for key in keys[:3])
    if isinstance(first, list) and isinstance(second, list):
        mine, others = cast("list[Any]", first), cast("list[Any]", second)
        for number, (a, b) in enumerate(zip(mine, others, strict=False)):
            if a != b:
                return f"entry {number} is {b!r} instead of {a!r}"
        return f"{len(others)} entries instead of {len(mine)}"
    return f"{second!r} instead of {first!r}"
