"""N ranks as threads of one process: for tests, deterministic, with faults on demand.

Every collective is a meeting: each rank brings its call and its values; the last to come combines
them in rank order; each rank takes the result away. So results are the same bits whoever came last,
calls that differ between ranks are noticed, and nobody waits for a rank that ended.

Memory: the result of a reduction exists once beside the ranks' own arrays.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn, get_args

import numpy as np

from distopt.backend import Array
from distopt.communicators.communicator import (
    Call,
    Communicator,
    Pending,
    cut,
    describe_mismatch,
    reduce_in_rank_order,
    wire_dtype,
)
from distopt.errors import CommunicatorError

__all__ = ["Fault", "RankKilled", "ThreadCommunicator", "ThreadWorld"]

FaultKind = Literal["kill", "delay", "nan", "mismatch"]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one rank, at one of its collectives or training steps.

    Args:
        kind: "kill": the rank ends there without a word; "delay": it comes late; "nan": the first
            element that it sends is NaN; "mismatch": it announces another shape than the others.
        rank: whose fault it is.
        call_number: at which of the rank's collectives, counted from 1 over all its communicators.
        seconds: how late, for "delay".
        step: in the place of `call_number`: at which of the rank's steps, counted from 1; a step begins when
            an aggregator's `reduce` does. "nan" is in the first gradient of the step then, the others are
            at its first collective.

    Raises:
        ValueError: unknown kind, a number out of range, or not one of `call_number` and `step`.
    """

    kind: FaultKind
    rank: int
    call_number: int | None = None
    seconds: float = 0.2
    step: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"fault kind must be one of {get_args(FaultKind)}, got {self.kind!r}")
        if (self.call_number is None) == (self.step is None):
            raise ValueError(f"a fault needs a call_number or a step, and not both; got {self}")
        if self.rank < 0 or (self.call_number or self.step or 0) < 1 or self.seconds < 0:
            raise ValueError(
                f"rank and seconds must be >= 0, call_number or step >= 1 (they count from 1); got {self}"
            )

    @property
    def when(self) -> str:
        """The moment in words: "its call 3" or "its step 3"."""
        return f"its step {self.step}" if self.call_number is None else f"its call {self.call_number}"


class RankKilled(BaseException):
    """Ends the thread of a rank that a fault killed; no `except Exception` stops it."""


@dataclass
class _Meeting:
    """One collective: what came, by rank, and what all take away."""

    calls: dict[int, Call] = field(default_factory=dict[int, Call])
    brought: dict[int, Any] = field(default_factory=dict[int, Any])
    done: bool = False
    taken: int = 0
    result: Any = None
    error: str | None = None


class ThreadWorld:
    """What the threads share: the meetings, who has ended and why, and the faults to come.

    Args:
        size: number of ranks.
        faults: what shall go wrong.
        timeout_seconds: how long a rank waits in a collective before it gives up.
        hosts: pretended host name of each rank; all on this host if None.

    Raises:
        ValueError: no ranks, a fault of a rank that does not exist, or a wrong number of hosts.
    """

    def __init__(
        self,
        size: int,
        faults: Sequence[Fault] = (),
        timeout_seconds: float = 60.0,
        hosts: Sequence[str] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"a world needs at least 1 rank, got {size}")
        for fault in faults:
            if fault.rank >= size:
                raise ValueError(f"{fault} names a rank that a world of {size} does not have")
        if hosts is not None and len(hosts) != size:
            raise ValueError(f"hosts must name one host for each of {size} ranks, got {list(hosts)}")
        self.size = size
        self.timeout_seconds = timeout_seconds
        self.hosts = tuple(hosts) if hosts is not None else (socket.gethostname(),) * size
        self.condition = threading.Condition()
        self.meetings: dict[tuple[str, int], _Meeting] = {}
        self.ended: dict[int, str] = {}  # by world rank: what became of it; set once
        self.errors: list[tuple[int, BaseException]] = []  # in the order of time
        self.calls_of_rank = [0] * size
        self.steps_of_rank = [0] * size
        self.faults_to_come = list(faults)

    def communicator(self, rank: int) -> ThreadCommunicator:
        """Return the communicator of one rank; only that rank's thread may use it."""
        return ThreadCommunicator(self, tuple(range(self.size)), rank, "world")

    def end(self, rank: int, error: BaseException | None) -> None:
        """Record that a rank has returned, or raised; whoever waits for it is woken up."""
        with self.condition:
            if error is None:
                self.ended.setdefault(rank, "has returned")
            elif isinstance(error, RankKilled):
                self.ended.setdefault(rank, "was killed")
            else:
                self.ended.setdefault(rank, f"raised {type(error).__name__}: {error}")
                self.errors.append((rank, error))
            self.condition.notify_all()

    def due_faults(self, rank: int) -> list[Fault]:
        """Count a collective of a rank, and take out the faults that belong to it."""
        with self.condition:
            self.calls_of_rank[rank] += 1
            number, step = self.calls_of_rank[rank], self.steps_of_rank[rank]
            return self._take_out(
                lambda fault: (
                    fault.rank == rank
                    and (fault.call_number == number or (fault.step == step and fault.kind != "nan"))
                )
            )

    def begin_step(self, rank: int) -> list[Fault]:
        """Count a step of a rank, and take out the faults of its gradients."""
        with self.condition:
            self.steps_of_rank[rank] += 1
            step = self.steps_of_rank[rank]
            return self._take_out(
                lambda fault: fault.rank == rank and fault.step == step and fault.kind == "nan"
            )

    def _take_out(self, is_due: Callable[[Fault], bool]) -> list[Fault]:
        due = [fault for fault in self.faults_to_come if is_due(fault)]
        for fault in due:
            self.faults_to_come.remove(fault)
        return due


class _InMeeting(Pending):
    """A collective of which this rank has brought its part."""

    def __init__(self, communicator: ThreadCommunicator, number: int, finish: Callable[[Any], Array]) -> None:
        self._communicator = communicator
        self._number = number
        self._finish = finish
        self._result: Array | None = None

    def test(self) -> bool:
        if self._result is None and self._communicator.is_ready(self._number):
            self.wait()
        return self._result is not None

    def wait(self) -> Array:
        if self._result is None:
            self._result = self._finish(self._communicator.take(self._number))
        return self._result


class ThreadCommunicator(Communicator):
    """One of the ranks of a `ThreadWorld`.

    Args:
        world: what the threads share.
        members: world ranks of this communicator, by rank.
        rank: of this one.
        label: name of the group.
    """

    name: ClassVar[str] = "threads"

    def __init__(self, world: ThreadWorld, members: tuple[int, ...], rank: int, label: str) -> None:
        host = world.hosts[members[rank]]
        neighbours = [member for member in members if world.hosts[member] == host]
        super().__init__(
            rank=rank,
            size=len(members),
            local_rank=neighbours.index(members[rank]),
            local_size=len(neighbours),
            host=host,
            label=label,
            description=f"{len(members)} threads of one process",
        )
        self._world = world
        self._members = members

    def is_ready(self, number: int) -> bool:
        """Whether a collective of this communicator has ended, well or with an error."""
        with self._world.condition:
            return self._has_ended(number)

    def take(self, number: int) -> Any:
        """Wait for a collective and return what it gave."""
        world = self._world
        with world.condition:
            meeting = world.meetings[self.label, number]
            in_time = world.condition.wait_for(lambda: self._has_ended(number), world.timeout_seconds)
            call = meeting.calls[self.rank]
            if meeting.done and meeting.error is None:
                meeting.taken += 1
                if meeting.taken == self.size:
                    del world.meetings[self.label, number]
                return meeting.result
            if meeting.error is not None:
                raise CommunicatorError(meeting.error)
            absent = [rank for rank in range(self.size) if rank not in meeting.calls]
            gone = [rank for rank in absent if self._members[rank] in world.ended]
            if not in_time:
                raise CommunicatorError(
                    f"{self.where} waited {world.timeout_seconds:g} s in {call}, collective number "
                    f"{number} of {self.label}, for rank(s) {absent}, which did not call it."
                )
            reasons = "; ".join(f"rank {rank} {world.ended[self._members[rank]]}" for rank in gone)
            raise CommunicatorError(
                f"{self.where} waits in {call}, collective number {number} of {self.label}, for "
                f"a rank that will not come: {reasons}."
            )

    def begin_step(self) -> bool:
        """See `Communicator.begin_step`; a `Fault` may ask for a NaN."""
        super().begin_step()
        return bool(self._world.begin_step(self._members[self.rank]))

    def progress(self) -> None:
        """Return: the rank that comes last does the work of a collective."""

    def abort(self, code: int, message: str) -> NoReturn:
        """Make this rank, and the others at their next collective, raise `CommunicatorError`."""
        error = CommunicatorError(f"{self.where} ended the job with code {code}: {message}")
        self._world.end(self._members[self.rank], error)
        raise error

    def _has_ended(self, number: int) -> bool:
        meeting = self._world.meetings[self.label, number]
        return meeting.done or any(
            self._members[rank] in self._world.ended and rank not in meeting.calls
            for rank in range(self.size)
        )

    def _meet(self, call: Call, number: int, brought: Any, combine: Callable[[list[Any]], Any]) -> None:
        world = self._world
        world_rank = self._members[self.rank]
        for fault in world.due_faults(world_rank):
            if fault.kind == "kill":
                raise RankKilled(f"rank {world_rank} was killed at {fault.when}")
            if fault.kind == "delay":
                time.sleep(fault.seconds)
            elif fault.kind == "mismatch":
                call = Call(call.operation, call.detail, (*(call.shape or ()), 1), call.dtype)
            else:
                brought = self._spoil(brought, fault, call)
        with world.condition:
            meeting = world.meetings.setdefault((self.label, number), _Meeting())
            meeting.calls[self.rank] = call
            meeting.brought[self.rank] = brought
            if len(meeting.calls) == self.size:
                meeting.error = describe_mismatch(number, [meeting.calls[rank] for rank in range(self.size)])
                if meeting.error is None:
                    meeting.result = combine([meeting.brought[rank] for rank in range(self.size)])
                meeting.brought.clear()
                meeting.done = True
                world.condition.notify_all()

    def _spoil(self, brought: Any, fault: Fault, call: Call) -> Array:
        if not isinstance(brought, np.ndarray) or wire_dtype(brought.dtype).kind != "f":
            raise ValueError(f"{fault} has nothing to spoil: {call} sends no floating-point array")
        spoiled: Array = brought.copy()
        spoiled.reshape(-1)[:1] = np.nan
        return spoiled

    def _all_reduce(self, values: Array, op: str, call: Call, number: int) -> Pending:
        def finish(total: Array) -> Array:
            with np.errstate(over="ignore"):  # a float16 sum may be infinite; that is its value
                values[...] = total
            return values

        self._meet(call, number, values, lambda parts: reduce_in_rank_order(parts, op))
        return _InMeeting(self, number, finish)

    def _broadcast(self, values: Array, root: int, call: Call, number: int) -> Pending:
        def finish(sent: Array) -> Array:
            values[...] = sent
            return values

        self._meet(call, number, values, lambda parts: parts[root].copy())
        return _InMeeting(self, number, finish)

    def _all_gather(self, values: Array, call: Call, number: int) -> Pending:
        self._meet(call, number, values, np.stack)
        return _InMeeting(self, number, lambda stacked: stacked.copy())

    def _all_gather_parts(self, values: Array, call: Call, number: int) -> Pending:
        parts = cut(values.size, self.size)

        def finish(sent: list[Array]) -> Array:
            for rank, part in enumerate(parts):
                if rank != self.rank:
                    values[part] = sent[rank]
            return values

        self._meet(call, number, values[parts[self.rank]], lambda brought: [b.copy() for b in brought])
        return _InMeeting(self, number, finish)

    def _reduce_scatter(self, values: Array, call: Call, number: int) -> Pending:
        own = cut(values.size, self.size)[self.rank]

        def finish(total: Array) -> Array:
            with np.errstate(over="ignore"):  # a float16 sum may be infinite; that is its value
                values[own] = total[own]
            return values[own]

        self._meet(call, number, values, lambda parts: reduce_in_rank_order(parts, "sum"))
        return _InMeeting(self, number, finish)

    def _all_to_all(self, parts: Sequence[Array], call: Call, number: int) -> list[Array]:
        self._meet(call, number, parts, lambda brought: [[p.copy() for p in sent] for sent in brought])
        return [sent[self.rank] for sent in self.take(number)]

    def _all_gather_rows(self, values: Array, call: Call, number: int) -> list[Array]:
        self._meet(call, number, values, lambda brought: [rows.copy() for rows in brought])
        return [rows.copy() for rows in self.take(number)]

    def _allocate(self, size: int, dtype: np.dtype[Any], call: Call, number: int) -> Array:
        self._barrier(call, number)  # which compares the calls
        return super()._allocate(size, dtype, call, number)

    def _barrier(self, call: Call, number: int) -> None:
        self._meet(call, number, None, len)
        self.take(number)

    def _broadcast_object(self, value: Any, root: int, call: Call, number: int) -> Any:
        self._meet(call, number, value, lambda values: values[root])
        return self.take(number)

    def _all_gather_object(self, value: Any, call: Call, number: int) -> list[Any]:
        self._meet(call, number, value, list)
        return list(self.take(number))

    def _split(self, color: int, key: int, label: str, call: Call, number: int) -> Communicator:
        self._meet(call, number, (color, key), list)
        wishes: list[tuple[int, int]] = self.take(number)
        group = [rank for rank in range(self.size) if wishes[rank][0] == color]
        group.sort(key=lambda rank: (wishes[rank][1], rank))
        members = tuple(self._members[rank] for rank in group)
        return ThreadCommunicator(self._world, members, group.index(self.rank), label)
