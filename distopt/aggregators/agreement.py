"""How the ranks of an aggregator agree: on the variables at the start, on the ticket in every step."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from distopt.aggregators.aggregator import Pair
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.errors import CommunicatorError
from distopt.variables import IndexedSlices, Variable

__all__ = ["Agreement", "DisagreementError", "Schema", "check_same", "schema_of"]

_log = logging.getLogger("distopt")

_Place: TypeAlias = "tuple[int, int, int] | None"
_Described: TypeAlias = "tuple[str, tuple[int, ...], str, _Place]"
Schema: TypeAlias = "list[_Described]"
"""Name, shape, dtype, and in an arena: the number of its slab, where the segment starts, the slab's size."""


class DisagreementError(CommunicatorError):
    """The ranks can't do this step together; every rank raises it, and can go on to use the communicator."""


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
        self._known: tuple[list[Variable], int] = [], 0

    def start(self, pairs: Sequence[Pair]) -> None:
        """Compare the ranks' variables, in the first step; nothing later. Collective.

        Raises:
            DisagreementError: they differ; it names the first variable that does, and the rank.
        """
        if self.steps == 0:
            self._compare(pairs, None)

    def total(self, ticket: Ticket, pairs: Sequence[Pair]) -> tuple[Ticket, Array]:
        """Sum the ranks' tickets, and find out who has which gradient. Collective.

        Args:
            ticket: of this rank.
            pairs: all variables in the order of their creation, with this rank's gradients or None.

        Returns:
            The sum, with the step's number. And [3, pairs]: on how many ranks a variable has a gradient,
            how many of these are IndexedSlices, and how many rows these have together.

        Raises:
            DisagreementError: the ranks are at different steps, gave different variables, or one of them
                reported an error. All ranks raise it.
        """
        step = self.steps if ticket.step is None else ticket.step
        ranks = self.communicator.size
        complete = all(g is not None and not isinstance(g, IndexedSlices) for g, _ in pairs)
        record = np.array([*ticket.to_array(), complete, *_squared(self._fingerprint(pairs, step))])
        self.communicator.all_reduce(record).wait()
        # The sum of squares is the square of the sum over the number of ranks only if all are equal.
        if ranks * int(record[-1]) != int(record[-2]) ** 2:
            self._compare(pairs, step)
            raise DisagreementError(
                "the ranks disagree about this step, and it could not be found in what"
            )  # pragma: no cover (the fingerprint is made of what is compared)
        self.steps += 1
        total = Ticket.from_array(record[:-3])
        total.step = step
        if total.error:
            self._raise_error(ticket, step)
        if total.not_finite:
            total.where = "; ".join(self._said(ticket.where or f"loss {ticket.loss}", ticket.not_finite))
        presence = np.zeros((3, len(pairs)), np.float64)
        if int(record[-3]) == ranks:
            presence[0] = ranks
            return total, presence
        for number, (gradient, _) in enumerate(pairs):
            presence[0, number] = gradient is not None
            if isinstance(gradient, IndexedSlices):
                presence[1:, number] = 1, len(gradient.indices)
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
        variables = [variable for _, variable in pairs]
        if variables != self._known[0]:  # by identity: what is described doesn't change
            text = f"{self.configuration};{schema_of(variable for _, variable in pairs)}"
            self._known = variables, zlib.crc32(text.encode())
        return float(zlib.crc32(str(step).encode(), self._known[1]) & 0xFFFFF)

    def _compare(self, pairs: Sequence[Pair], step: int | None) -> None:
        own = (self._place(), self.configuration, step, schema_of(variable for _, variable in pairs))
        everyone: list[Any] = self.communicator.all_gather_object(own)
        _, configuration, first_step, schema = everyone[0]
        for rank, (host, other_configuration, other_step, other_schema) in enumerate(everyone):
            if other_configuration != configuration:
                raise DisagreementError(
                    f"rank {rank} on {host} aggregates by {other_configuration}, rank 0 by {configuration}. "
                    "Make the aggregator with the same arguments on every rank."
                )
            if other_step != first_step:
                raise DisagreementError(
                    f"rank {rank} on {host} is at step {other_step}, rank 0 at step {first_step}: one of "
                    "them left steps out. A rank without data calls with no examples and None gradients."
                )
            check_same(schema, other_schema, rank, host)

    def _place(self) -> str:
        """Return this rank's host, and its group where ranks are not those of the world."""
        label = self.communicator.label
        return self.communicator.host + ("" if label == "world" else f" in group {label}")

    def _raise_error(self, ticket: Ticket, step: int) -> None:
        reasons = self._said(ticket.reason or "no reason given", ticket.error)
        raise DisagreementError(f"step {step} can't be done: {'; '.join(reasons)}")

    def _said(self, text: str, says: float) -> list[str]:
        """Return what the ranks say that have something to say, with their names. Collective."""
        own = f"rank {self.communicator.rank} on {self._place()}: {text}" if says else ""
        return [said for said in self.communicator.all_gather_object(own) if said]


def schema_of(variables: Iterable[Variable]) -> Schema:
    """Describe variables by what must be the same on all ranks."""
    slabs: dict[int, int] = {}  # numbered as they come: their own numbers may differ between ranks
    described: Schema = []
    for variable in variables:
        place: _Place = None
        if variable.slab is not None:
            number = slabs.setdefault(variable.slab.number, len(slabs))
            place = number, variable.start, int(variable.slab.gradients.size)
        described.append((variable.name, variable.shape, variable.dtype.str, place))
    return described


def check_same(first: Schema, other: Schema, rank: int, host: str) -> None:
    """Compare a rank's variables with those of rank 0.

    Args:
        first: of rank 0.
        other: of `rank`.
        rank: whose variables `other` are.
        host: of that rank.

    Raises:
        DisagreementError: they differ; it names the first one that does.
    """
    if first != other:
        raise DisagreementError(
            f"rank {rank} on {host} has other variables than rank 0: {_first_difference(first, other)}. "
            "Build the same model in the same order on every rank, and give every variable on every rank, "
            "with None where it has no gradient."
        )


def _squared(number: float) -> tuple[float, float]:
    return number, number * number


def _first_difference(first: Schema, second: Schema) -> str:
    # Another variable moves all that lie behind it in the arena, so places are looked at last.
    for differ in (_itself_differs, _place_differs):
        for number, (a, b) in enumerate(zip(first, second, strict=False)):
            if differ(a, b):
                return f"variable {number} is {_in_words(b)} there and {_in_words(a)} on rank 0"
        if len(first) != len(second):
            break
    longer, where = (first, "only on rank 0") if len(first) > len(second) else (second, "only there")
    extra = longer[min(len(first), len(second))]
    return f"{len(second)} variables there and {len(first)} on rank 0; {_in_words(extra)} is {where}"


def _itself_differs(a: _Described, b: _Described) -> bool:
    return a[:3] != b[:3] or (a[3] is None) != (b[3] is None)


def _place_differs(a: _Described, b: _Described) -> bool:
    return a[3] != b[3]


def _in_words(entry: _Described) -> str:
    name, shape, dtype, place = entry
    words = f"{name!r} {np.dtype(dtype).name}{list(shape)}"
    if place is None:
        return words
    return f"{words} in an arena (slab {place[0]} of {place[2]} elements, from element {place[1]})"
