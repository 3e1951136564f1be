"""How the ranks of an aggregator agree: on the variables at the start, on the ticket in every step."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from distopt.aggregators.aggregator import Pair
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.errors import CommunicatorError
from distopt.variables import IndexedSlices, Variable

__all__ = ["Agreement"]

_log = logging.getLogger("distopt")

Schema: TypeAlias = "list[tuple[str, tuple[int, ...], str, bool]]"


class Agreement:
    """What the ranks of one aggregator have agreed on.

    Args:
        communicator: the ranks.
        configuration: what must be the same on all ranks beside the variables, in words.

    Attributes:
        steps: how many tickets were reduced.
    """

    def __init__(self, communicator: Communicator, configuration: str) -> None:
        self.communicator = communicator
        self.configuration = configuration
        self.steps = 0

    def start(self, pairs: Sequence[Pair]) -> None:
        """Compare the ranks' variables, in the first step; nothing later. Collective.

        Raises:
            CommunicatorError: they differ; it names the first variable that does, and the rank.
        """
        if self.steps == 0:
            self._compare(pairs, None)

    def total(self, ticket: Ticket, pairs: Sequence[Pair]) -> tuple[Ticket, Array]:
        """Sum the ranks' tickets, and find out who has which gradient. Collective.

        Args:
            ticket: of this rank.
            pairs: all variables in the order of their creation, with this rank's gradients or None.

        Returns:
            The sum, with the step's number. And [2, pairs]: on how many ranks a variable has a gradient,
            and how many of these are IndexedSlices.

        Raises:
            CommunicatorError: the ranks are at different steps, gave different variables, or one of them
                reported an error.
        """
        step = self.steps if ticket.step is None else ticket.step
        ranks = self.communicator.size
        complete = all(g is not None and not isinstance(g, IndexedSlices) for g, _ in pairs)
        record = np.array([*ticket.to_array(), complete, *_squared(self._fingerprint(pairs, step))])
        self.communicator.all_reduce(record).wait()
        # The sum of squares is the square of the sum over the number of ranks only if all are equal.
        if ranks * int(record[-1]) != int(record[-2]) ** 2:
            self._compare(pairs, step)
            raise CommunicatorError(
                "the ranks disagree about this step, and it could not be found in what"
            )  # pragma: no cover (the fingerprint is made of what is compared)
        self.steps += 1
        total = Ticket.from_array(record[:-3])
        total.step = step
        if total.error:
            self._raise_error(ticket, step)
        if int(record[-3]) == ranks:
            presence = np.zeros((2, len(pairs)), np.float32)
            presence[0] = ranks
            return total, presence
        presence = np.array(
            [[g is not None for g, _ in pairs], [isinstance(g, IndexedSlices) for g, _ in pairs]], np.float32
        )
        self.communicator.all_reduce(presence.reshape(-1)).wait()
        return total, presence

    def says_nothing_to_do(self, total: Ticket) -> bool:
        """Whether no rank has an example in this step; rank 0 then says that it is left out."""
        if total.examples:
            return False
        if self.communicator.rank == 0:
            _log.warning(
                "step %s: no rank has an example (their total is 0), so the update is left out on all ranks",
                total.step,
            )
        return True

    def _fingerprint(self, pairs: Sequence[Pair], step: int) -> float:
        text = f"{self.configuration};{step};{_schema(pairs)}"
        return float(zlib.crc32(text.encode()) & 0xFFFFF)

    def _compare(self, pairs: Sequence[Pair], step: int | None) -> None:
        own = (self._place(), self.configuration, step, _schema(pairs))
        everyone: list[Any] = self.communicator.all_gather_object(own)
        _, configuration, first_step, schema = everyone[0]
        for rank, (host, other_configuration, other_step, other_schema) in enumerate(everyone):
            if other_configuration != configuration:
                raise CommunicatorError(
                    f"rank {rank} on {host} aggregates by {other_configuration}, rank 0 by {configuration}. "
                    "Make the aggregator with the same arguments on every rank."
                )
            if other_step != first_step:
                raise CommunicatorError(
                    f"rank {rank} on {host} is at step {other_step}, rank 0 at step {first_step}: one of "
                    "them left steps out. A rank without data calls with no examples and None gradients."
                )
            if other_schema != schema:
                raise CommunicatorError(
                    f"rank {rank} on {host} has other variables than rank 0: "
                    f"{_first_difference(schema, other_schema)}. Build the same model in the same order on "
                    "every rank, and give every variable on every rank, with None where it has no gradient."
                )

    def _place(self) -> str:
        """Return this rank's host, and its group where ranks are not those of the world."""
        label = self.communicator.label
        return self.communicator.host + ("" if label == "world" else f" in group {label}")

    def _raise_error(self, ticket: Ticket, step: int) -> None:
        communicator = self.communicator
        reason = ticket.reason or "no reason given"
        own = f"rank {communicator.rank} on {self._place()}: {reason}" if ticket.error else ""
        reasons = [text for text in communicator.all_gather_object(own) if text]
        raise CommunicatorError(f"step {step} can't be done: {'; '.join(reasons)}")


def _schema(pairs: Sequence[Pair]) -> Schema:
    return [_described(variable) for _, variable in pairs]


def _described(variable: Variable) -> tuple[str, tuple[int, ...], str, bool]:
    return variable.name, variable.shape, variable.dtype.str, variable.slab is not None


def _squared(number: float) -> tuple[float, float]:
    return number, number * number


def _first_difference(first: Schema, second: Schema) -> str:
    for number, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return f"variable {number} is {_in_words(b)} there and {_in_words(a)} on rank 0"
    longer, where = (first, "only on rank 0") if len(first) > len(second) else (second, "only there")
    extra = longer[min(len(first), len(second))]
    return f"{len(second)} variables there and {len(first)} on rank 0; {_in_words(extra)} is {where}"


def _in_words(entry: tuple[str, tuple[int, ...], str, bool]) -> str:
    name, shape, dtype, in_arena = entry
    return f"{name!r} {np.dtype(dtype).name}{list(shape)}{' in an arena' if in_arena else ''}"
