"""The communicator over MPI (mpi4py): one process per rank.

How all_reduce is done is measured on the ranks themselves (tuning.py), among what can be:

- One host: in shared memory (shared_reduce.py), where the array should lie already (`allocate`), or
  MPI's own blocking call, which is faster below a few KB. Non-blocking calls lose (4 MB in 1 MB buckets
  between matrix products, 4.3 MB, 16 MB in 4 MB buckets): neither polled MPI_Iallreduce nor a thread of
  blocking calls beat the plain blocking call. A copy in memory is work for the same cores, and Open MPI
  takes 6 times as long for 16 MB by MPI_Iallreduce (9.8 ms against 1.5 ms), so they are not among the
  candidates unless asked for.
- Several hosts: a ring of messages (ring.py), or one between hosts after a sum within each (hierarchical.py),
  which a thread moves on while this rank computes; MPI_Iallreduce for what is small. With three hosts at
  1 Gbit/s both MPIs' own choice takes 2.5 to 3 times as long as a ring from 1 MB on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, NoReturn, cast

import numpy as np
from mpi4py import MPI

from distopt.backend import Array, asnumpy, device_of, namespace
from distopt.communicators.algorithm import Algorithm
from distopt.communicators.communicator import (
    Call,
    Communicator,
    Done,
    Pending,
    ReduceOp,
    cut,
    describe_mismatch,
    reduce_in_rank_order,
    wire_dtype,
)
from distopt.communicators.mpi_algorithms import (
    Blocking,
    Finished,
    MpiLinks,
    Neighbours,
    NonBlocking,
    Notes,
    Watch,
    flat_bytes,
    flattened,
    make_hierarchical,
    pieces_of,
)
from distopt.communicators.ring import Ring
from distopt.communicators.shared_combine import SharedCombine
from distopt.communicators.shared_memory import SharedMemory
from distopt.communicators.shared_reduce import HostSteps, SharedReduce
from distopt.communicators.sum_order import SumOrder
from distopt.communicators.tuning import Choice
from distopt.communicators.watchdog import Wait, Watchdog
from distopt.errors import CommunicatorError

__all__ = ["MpiCommunicator", "library_name", "raw_all_reduce", "world_size"]

_log = logging.getLogger("distopt")

_COPY_PIECE_BYTES = 64 * 2**20  # broadcast and all_gather: no arithmetic, so only the count matters
_SMALL_BYTES = 256 * 2**10  # over before anything could be hidden behind it


def library_name() -> str:
    """Return the MPI library's name and version, as in "Open MPI 5.0.11"."""
    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def raw_all_reduce(communicator: Communicator, values: Array) -> Callable[[], None]:
    """Return one plain call of MPI_Allreduce, in place, as a program without distopt has it; to compare with.

    Raises:
        TypeError: it is no communicator over MPI.
    """
    if not isinstance(communicator, MpiCommunicator):
        raise TypeError(f"only a communicator over MPI can make MPI's own calls, got {communicator!r}")
    mpi = communicator._mpi  # pyright: ignore[reportPrivateUsage]
    return lambda: mpi.Allreduce(MPI.IN_PLACE, values)


def world_size() -> int:
    """Return the number of ranks that MPI itself sees."""
    return MPI.COMM_WORLD.Get_size()


class MpiCommunicator(Communicator):
    """Ranks that are processes, started by an MPI launcher.

    Talks on a duplicate of the given MPI communicator, so that no message meets those of other
    code. Arrays of a GPU go through a copy in host memory.

    Args:
        base: the MPI communicator to duplicate; all its ranks construct this together.
        overlap: whether all_reduce is non-blocking; None: where the ranks are on several hosts.
        algorithm: name of the one way to do all_reduce, wherever it can, as DISTOPT_ALLREDUCE has it; None:
            the fastest, as measured when a size is first reduced.
        checked: compare the ranks' calls before each collective, and raise on all ranks where they
            differ (one more, small exchange each); None: if DISTOPT_DEBUG is 1.
        timeout_seconds: limit for a wait in a collective, after which the job is ended; 0: none.
            Watching needs MPI_THREAD_MULTIPLE, which mpi4py asks for and both usual MPIs give.
    """

    name: ClassVar[str] = "mpi"
    processes: ClassVar[bool] = True

    def __init__(
        self,
        base: MPI.Intracomm = MPI.COMM_WORLD,
        *,
        overlap: bool | None = None,
        algorithm: str | None = None,
        checked: bool | None = None,
        timeout_seconds: float = 0.0,
    ) -> None:
        self._set_up(base, overlap, checked, "world")
        self._check_algorithm(algorithm)
        self._watchdog: Watchdog | None = None
        self._notes_mpi: MPI.Intracomm | None = None
        if self.size > 1 and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self._notes_mpi = base.Dup()
            self._watchdog = Watchdog(
                self.rank,
                self.size,
                self.host,
                Notes(self._notes_mpi),
                self.abort,
                timeout_seconds,
            )
        self._make_algorithms(algorithm)

    def _set_up(self, base: MPI.Intracomm, overlap: bool | None, checked: bool | None, label: str) -> None:
        self._mpi = base.Dup()
        self._mpi.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns what returns into exceptions
        self._neighbours = Neighbours(cast("MPI.Intracomm", self._mpi.Split_type(MPI.COMM_TYPE_SHARED)))
        local_size = self._neighbours.size
        one_host = local_size == self._mpi.Get_size()
        self._overlap = not one_host if overlap is None else overlap
        self._checked = os.environ.get("DISTOPT_DEBUG") == "1" if checked is None else checked
        super().__init__(
            rank=self._mpi.Get_rank(),
            size=self._mpi.Get_size(),
            local_rank=self._neighbours.rank,
            local_size=local_size,
            host=MPI.Get_processor_name(),
            label=label,
            description=f"{library_name()}, {'one host' if one_host else 'several hosts'}, "
            f"{'non-blocking' if self._overlap else 'blocking'} all_reduce",
        )
        self._process_id = os.getpid()
        self._careful = self._checked  # or closed: each start of a prepared collective is looked at

    def _check_algorithm(self, algorithm: str | None) -> None:
        everyone = self._mpi.allgather(algorithm)
        if len(set(everyone)) > 1:
            raise ValueError(
                f"all ranks must ask for the same all_reduce algorithm, got {everyone} by rank. Set "
                "DISTOPT_ALLREDUCE alike for all (mpirun -x DISTOPT_ALLREDUCE), or for none."
            )

    def _make_algorithms(self, forced: str | None, optional: bool = False) -> None:
        watch: Watchdog | Watch = self._watchdog or Watch()
        self._watch = watch
        if self._watchdog is not None:
            self._watchdog.watch(self.label, lambda: self.sequence)
        self._steps = HostSteps(SharedMemory(self._neighbours, self._first_problem), self._waiting)
        self._combining = SharedCombine(self._steps)
        one_host = 1 < self.size == self.local_size
        self._algorithms: list[Algorithm] = []
        background = self._overlap and MPI.Query_thread() == MPI.THREAD_MULTIPLE
        if self._overlap:
            # A thread moves rings on while this rank computes, which MPI's own call has nobody for.
            limit = _SMALL_BYTES if background and self.size > self.local_size and forced is None else None
            self._algorithms.append(NonBlocking(self._mpi, self._waiting, limit))
        if one_host:
            self._algorithms.append(SharedReduce(self._steps, staged=not self._overlap or forced == "shared"))
        if self.size > self.local_size or forced == Ring.name:
            self._algorithms.append(Ring(MpiLinks(self._mpi), self._waiting, background=background))
        self._across: MPI.Intracomm | None = None
        if self.size > self.local_size:
            levels, self._across = make_hierarchical(
                self._mpi, self._neighbours.communicator, self._waiting, background
            )
            self._algorithms.append(levels)
        self._queueing = list(self._algorithms)
        self._algorithms.append(Blocking(self._mpi, self._waiting, watch, self.label, self._start_all))
        if optional and forced not in [algorithm.name for algorithm in self._algorithms]:
            forced = None  # a group on one host has nothing between hosts
        self._forced = forced
        self._choice = Choice(
            self._algorithms,
            forced if self.size > 1 else None,
            # Who asks for overlap gets what overlaps, for all that it can do.
            last_is_fallback=self._overlap,
            in_shared_memory=self._steps.holds,
            scratch=self._scratch,
            share=self._share_times,
            barrier=self._meet,
        )

    def _share_times(self, seconds: list[float]) -> list[list[float]]:
        with self._waiting("all_reduce", self.sequence):
            return self._mpi.allgather(seconds)

    def _meet(self) -> None:
        with self._waiting("all_reduce", self.sequence):
            self._mpi.Barrier()

    def _first_problem(self, problem: str | None) -> str | None:
        """Let all ranks know what went wrong on any."""
        found = [
            f"{text} (rank {rank} on host {host})"
            for rank, (text, host) in enumerate(self._mpi.allgather((problem, self.host)))
            if text is not None
        ]
        return found[0] if found else None

    def _prepare_shared_memory(self) -> bool:
        """Make what the ranks of a host share, once; where that fails on one, all do without. Collective."""
        if self.size == 1 or self._steps.tried:
            return self._steps.ready
        with self._waiting("all_reduce", self.sequence):  # its first one; a rank may be missing
            ready = self._steps.prepare()
        self._tell_problem()
        return ready

    def _tell_problem(self) -> None:
        problem = self._steps.memory.problem
        if problem is not None:
            self.description = f"{self.description}, no shared memory: {problem}"
            if self.rank == 0:
                asked = ", though shared was asked for" if self._forced == "shared" else ""
                _log.warning(
                    "%s reduces without shared memory, by MPI alone%s: %s", self.label, asked, problem
                )

    def _scratch(self, shared: bool, size_bytes: int) -> Array:
        if shared:
            self._meet()  # another rank may be copying out of it
            memory = self._steps.staging[:size_bytes].view(np.float32)
            memory[...] = 0
            return memory
        return np.zeros(size_bytes // 4, np.float32)

    @property
    def all_reduce_choices(self) -> dict[str, str]:
        """Which algorithm reduces what, and what it was measured to take, by kind of memory and size."""
        return {"all": f"{self._forced} (asked for)"} if self._forced else self._choice.describe()

    def progress(self) -> None:
        """Let MPI move on, take note of what is done, and start what was queued."""
        try:  # no context manager: this is called for each gradient
            for algorithm in self._algorithms:
                algorithm.progress()
        except MPI.Exception as error:
            raise self._failure("all_reduce", self.sequence, error) from error

    def abort(self, code: int, message: str) -> NoReturn:
        """End the job: MPI_Abort, after what was printed had time to get out."""
        for stream in (sys.__stdout__, sys.stdout):
            if stream is not None:
                with contextlib.suppress(ValueError, OSError):  # closed already
                    stream.flush()
        stream = sys.__stderr__
        if stream is not None:
            stream.write(f"distopt: {self.where} ended the job: {message.rstrip()}\n")
            stream.flush()
        time.sleep(0.3)
        MPI.COMM_WORLD.Abort(code)
        os._exit(code)  # where the launcher is cut off, Abort may come back

    def close(self) -> None:
        """Finish what is pending, wait until all ranks close, and free the MPI communicators.

        Happens by itself when the process ends. A rank that comes here while another one waits for
        it in a collective ends the job with a message, instead of letting it hang.
        """
        if self._closed or os.getpid() != self._process_id or MPI.Is_finalized():
            return
        for algorithm in self._algorithms:
            algorithm.close()
        self._steps.close()
        self._combining.close()
        super().close()
        self._careful = True
        if self._watchdog is not None and self._notes_mpi is not None:
            self._watchdog.leave()
            self._notes_mpi.Free()
        if self._across is not None:
            self._across.Free()
        self._neighbours.free()
        self._mpi.Free()

    def prepare_all_reduce(self, values: Array, op: ReduceOp = "sum") -> Callable[[], Pending]:
        """See `Communicator.prepare_all_reduce`."""
        self._check_reduction("all_reduce", values, op)
        call = Call("all_reduce", op, tuple(values.shape), str(values.dtype))
        begin: Callable[[int], Pending] | None = None

        def start() -> Pending:
            nonlocal begin
            if begin is None or self._careful:
                number = self._begin(call)
                begin = begin or self._prepared(values, op, number)
            else:  # what `_begin` does then, in as little time
                number = self.sequence = self.sequence + 1
                self._prepared_starts += 1
            try:
                return begin(number)
            except MPI.Exception as error:
                raise self._failure("all_reduce", number, error) from error

        return start

    def _begin(self, call: Call) -> int:
        number = super()._begin(call)
        if self._checked:
            with self._waiting(call.operation, number):
                self._start_all()
                problem = describe_mismatch(number, self._mpi.allgather(call))
            if problem:
                raise CommunicatorError(f"{self.where}: {problem}")
        return number

    @contextlib.contextmanager
    def _translate_errors(self, operation: str, number: int) -> Generator[None]:
        try:
            yield
        except MPI.Exception as error:
            raise self._failure(operation, number, error) from error

    def _failure(self, operation: str, number: int, error: MPI.Exception) -> CommunicatorError:
        return CommunicatorError(
            f"{operation}, collective number {number} of {self.label}, failed on {self.where}: {error}"
        )

    @contextlib.contextmanager
    def _waiting(self, operation: str, number: int) -> Generator[None]:
        with self._translate_errors(operation, number):
            self._watch.waiting = Wait(self.label, operation, number)
            try:
                yield
            finally:
                self._watch.waiting = None

    def _start_all(self) -> None:
        # Before a blocking call: another rank may wait for a piece that only waits in our queue.
        for algorithm in self._queueing:
            if algorithm.backlog:
                algorithm.flush()

    def _all_reduce(self, values: Array, op: str, call: Call, number: int) -> Pending:
        with self._translate_errors(call.operation, number):
            return self._prepared(values, op, number)(number)

    def _prepared(self, values: Array, op: str, number: int) -> Callable[[int], Pending]:
        """Choose the algorithm, and return what starts it: number -> handle. Collective, see `Choice`."""
        self._prepare_shared_memory()
        combined = wire_dtype(values.dtype)
        if device_of(values).kind == "cpu":
            flat = values if values.ndim == 1 else flattened(values)
            chosen = self._choose(flat, op, number)
            if combined == values.dtype or chosen.takes_halves:
                begin = self._alone(chosen, chosen.prepare(flat, op))
                return begin if flat is values else lambda n: Finished(begin(n), lambda: values)

        def start(number: int) -> Pending:
            wire = np.array(asnumpy(values), combined)
            flat = flattened(wire)

            def finish() -> Array:
                _write(values, wire)
                return values

            chosen = self._choose(flat, op, number)
            return Finished(self._alone(chosen, lambda n: chosen.start(flat, op, n))(number), finish)

        return start

    def _alone(self, chosen: Algorithm, begin: Callable[[int], Pending]) -> Callable[[int], Pending]:
        """Let only one algorithm have work at a time: a wait inside one doesn't move the others on."""
        others = [other for other in self._queueing if other is not chosen]
        if not others or chosen is self._algorithms[-1]:  # which flushes by itself
            return begin

        def start(number: int) -> Pending:
            for other in others:
                other.flush()
            return begin(number)

        return start

    def _choose(self, flat: Array, op: str, number: int) -> Algorithm:
        if not flat.size:
            return self._algorithms[
                -1
            ]  # nothing to send; and where nothing lies is not the same on all ranks
        if self._checked:
            self._check_memory(self._steps.holds(flat), number)
        return self._choice.choose(flat, op, number)

    def is_shared(self, values: Array) -> bool:
        """See `Communicator.is_shared`."""
        return self._in_steps(values)

    def _combine(self, arrays: Sequence[Array], order: SumOrder, call: Call, number: int) -> Pending:
        shared = all(self._in_steps(array) for array in arrays)
        if self._checked:
            self._check_memory(shared, number)
        if not shared or not self._combining.can(order):
            return super()._combine(arrays, order, call, number)
        with self._translate_errors(call.operation, number):
            for other in self._queueing:
                if other.backlog is not self._steps.backlog:
                    other.flush()  # see `_alone`
            return self._combining.start(arrays, order, number)

    def _check_memory(self, shared: bool, number: int) -> None:
        with self._waiting("all_reduce", number):
            found = self._mpi.allgather(shared)
        if len(set(found)) > 1:
            raise CommunicatorError(
                f"{self.where}: collective number {number} reduces memory of `allocate` on some ranks and "
                f"other memory on others, by rank: {found}. Allocate on all ranks, or on none."
            )

    def _in_steps(self, values: Array) -> bool:
        """Whether a collective of this array goes by shared memory."""
        return (
            1 < self.size == self.local_size
            and self._forced in (None, "shared")
            and values.size > 0
            and device_of(values).kind == "cpu"
            and self._steps.holds(values)
        )

    def _allocate(self, size: int, dtype: np.dtype[Any], call: Call, number: int) -> Array:
        memory: Array | None = None
        with self._waiting(call.operation, number):
            self._start_all()
        # All or none: a host with a single rank takes part, so that all take the same algorithms.
        if self._prepare_shared_memory():
            with self._waiting(call.operation, number):
                memory = self._steps.memory.allocate(size, dtype)
            if memory is None:
                self._tell_problem()
        return np.zeros(size, dtype) if memory is None else memory

    def _broadcast(self, values: Array, root: int, call: Call, number: int) -> Pending:
        on_host = asnumpy(values)
        flat = flat_bytes(on_host)
        with self._waiting(call.operation, number):
            self._start_all()
            for part in pieces_of(flat.size, _COPY_PIECE_BYTES):
                self._mpi.Bcast(flat[part], root)
        if on_host is not values and self.rank != root:
            _write(values, on_host)
        return Done(values)

    def _all_gather(self, values: Array, call: Call, number: int) -> Pending:
        on_host = asnumpy(values)
        flat = flat_bytes(on_host)
        result = np.empty((self.size, *values.shape), values.dtype)
        rows = flat_bytes(result).reshape(self.size, flat.size)
        with self._waiting(call.operation, number):
            self._start_all()
            for part in pieces_of(flat.size, _COPY_PIECE_BYTES):
                whole = part.stop - part.start == flat.size
                piece = rows if whole else np.empty((self.size, part.stop - part.start), np.uint8)
                self._mpi.Allgather(flat[part], piece)
                if not whole:
                    rows[:, part] = piece
        return Done(device_of(values).asarray(result))

    def _all_gather_parts(self, values: Array, call: Call, number: int) -> Pending:
        if self._in_steps(values):
            return self._steps.start("all_gather_parts", values, "", number)
        on_host = np.ascontiguousarray(asnumpy(values))
        item = on_host.itemsize
        counts = [(part.stop - part.start) * item for part in cut(values.size, self.size)]
        with self._waiting(call.operation, number):
            self._start_all()
            self._mpi.Allgatherv(MPI.IN_PLACE, [flat_bytes(on_host), counts])
        if on_host is not values:
            _write(values, on_host)
        return Done(values)

    def _reduce_scatter(self, values: Array, call: Call, number: int) -> Pending:
        parts = cut(values.size, self.size)
        if self._in_steps(values):
            own = values[parts[self.rank]]
            return Finished(self._steps.start("reduce_scatter", values, "sum", number), lambda: own)
        wire = np.asarray(asnumpy(values), wire_dtype(values.dtype))
        received = self._exchange([wire[part] for part in parts], call, number)
        own = values[parts[self.rank]]
        _write(own, reduce_in_rank_order(received, "sum"))
        return Done(own)

    def _all_to_all(self, parts: Sequence[Array], call: Call, number: int) -> list[Array]:
        device = device_of(parts[0])
        received = self._exchange([asnumpy(part) for part in parts], call, number)
        return [device.asarray(part) for part in received]

    def _exchange(self, parts: Sequence[Array], call: Call, number: int) -> list[Array]:
        """Send part r to rank r; return new arrays, by the rank they came from."""
        sent = np.concatenate([flat_bytes(part) for part in parts])
        counts = np.array([part.nbytes for part in parts], np.int64)
        coming = np.empty_like(counts)
        with self._waiting(call.operation, number):
            self._start_all()
            self._mpi.Alltoall(counts, coming)
            received = np.empty(int(coming.sum()), np.uint8)
            self._mpi.Alltoallv([sent, counts], [received, coming])
        ends = np.cumsum(coming)
        return [
            received[end - count : end].view(parts[0].dtype) for end, count in zip(ends, coming, strict=True)
        ]

    def _all_gather_rows(self, values: Array, call: Call, number: int) -> list[Array]:
        flat = flat_bytes(asnumpy(values))
        lengths = np.empty(self.size, np.int64)
        with self._waiting(call.operation, number):
            self._start_all()
            self._mpi.Allgather(np.array([len(values)], np.int64), lengths)
            row_bytes = values.dtype.itemsize * int(np.prod(values.shape[1:]))
            received = np.empty(int(lengths.sum()) * row_bytes, np.uint8)
            self._mpi.Allgatherv(flat, [received, lengths * row_bytes])
        device = device_of(values)
        rows: list[Array] = []
        start = 0
        for length in map(int, lengths):
            part = received[start : start + length * row_bytes]
            rows.append(device.asarray(part.view(values.dtype).reshape(length, *values.shape[1:])))
            start += length * row_bytes
        return rows

    def _barrier(self, call: Call, number: int) -> None:
        with self._waiting(call.operation, number):
            self._start_all()
            self._mpi.Barrier()

    def _broadcast_object(self, value: Any, root: int, call: Call, number: int) -> Any:
        with self._waiting(call.operation, number):
            self._start_all()
            return self._mpi.bcast(value, root)

    def _all_gather_object(self, value: Any, call: Call, number: int) -> list[Any]:
        with self._waiting(call.operation, number):
            self._start_all()
            return self._mpi.allgather(value)

    def _split(self, color: int, key: int, label: str, call: Call, number: int) -> Communicator:
        with self._waiting(call.operation, number):
            self._start_all()
            part = cast("MPI.Intracomm", self._mpi.Split(color, key))
            child = MpiCommunicator._child(part, self, label)
            part.Free()
        return child

    @classmethod
    def _child(cls, base: MPI.Intracomm, parent: MpiCommunicator, label: str) -> MpiCommunicator:
        child = cls.__new__(cls)
        child._set_up(base, None, parent._checked, label)
        child._watchdog = parent._watchdog
        child._notes_mpi = None  # the parent owns the watchdog and its channel
        child._make_algorithms(parent._forced, optional=True)
        return child


def _write(values: Array, wire: Array) -> None:
    """Write what came over the wire into the caller's array, on its device."""
    if device_of(values).kind == "cuda":
        xp = namespace(values)
        with device_of(values).activate():
            values[...] = xp.asarray(wire.astype(values.dtype, copy=False))
            xp.cuda.get_current_stream().synchronize()  # `wire` may be freed after this
    else:
        with np.errstate(over="ignore"):  # a float16 sum may be infinite; that is its value
            values[...] = wire
