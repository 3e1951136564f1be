"""Count bytes that a rank sends to others: what `wire_bytes` means everywhere."""

from __future__ import annotations

__all__ = ["sent_by_all_reduce", "sent_by_half", "sent_to_each"]


def sent_by_half(nbytes: int, ranks: int) -> int:
    """Return how many bytes a rank sends in a reduce-scatter, an all-to-all or a gather of parts.

    Each is one half of an all-reduce: (ranks - 1) / ranks times the whole.

    Args:
        nbytes: of the whole array.
        ranks: how many take part; with one nothing is sent.
    """
    return nbytes * (ranks - 1) // ranks


def sent_by_all_reduce(nbytes: int, ranks: int) -> int:
    """Return how many bytes a rank sends when each rank's part is summed and gathered: the least there is.

    Args:
        nbytes: of the array.
        ranks: how many take part; with one nothing is sent.
    """
    return 2 * nbytes * (ranks - 1) // ranks


def sent_to_each(nbytes: int, ranks: int) -> int:
    """Return how many bytes a rank sends that gives the same payload to each other rank.

    Args:
        nbytes: of the payload.
        ranks: how many take part.
    """
    return nbytes * (ranks - 1)
