"""What every communicator promises: rank, size and collectives that start now and end later.

A collective is called by all ranks of a communicator, in the same order, with the same shapes,
dtypes and arguments; it returns a `Pending`. Arguments are checked before anything is sent, so a
wrong one raises on the rank that gave it and leaves the others untouched.

A communicator belongs to one thread at a time.
"""

from __future__ import annotations

import collections
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeAlias, get_args

import ml_dtypes
import numpy as np

from distopt.backend import Array, device_of, namespace
from distopt.communicators.sum_order import SumOrder
from distopt.errors import CommunicatorError

__all__ = [
    "Call",
    "Communicator",
    "Done",
    "Pending",
    "ReduceOp",
    "cut",
    "describe_mismatch",
    "reduce_in_rank_order",
    "wire_dtype",
]

ReduceOp: TypeAlias = Literal["sum", "max", "min"]

_HALVES = frozenset({np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)})
_REDUCIBLE = _HALVES | {np.dtype(code) for code in "bBhHiIlLqQfd"}
_UFUNCS: dict[str, np.ufunc] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def wire_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that values are combined in: float32 for 16-bit floats, else their own."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if dtype in _HALVES else dtype


def reduce_in_rank_order(parts: Sequence[Array], op: str) -> Array:
    """Combine equal shapes as ((a + b) + c) + ..., in the wire dtype; NaN wins max and min."""
    total = np.array(parts[0], wire_dtype(parts[0].dtype))
    for part in parts[1:]:
        _UFUNCS[op](total, np.asarray(part, total.dtype), out=total)
    return total


def cut(length: int, parts: int) -> list[slice]:
    """Return `parts` neighbouring slices of [0, length), as equal as can be; the first ones are longer.

    This is how `reduce_scatter` and `all_gather_parts` cut an array: slice r belongs to rank r.
    """
    short, longer = divmod(length, parts)
    starts = [rank * short + min(rank, longer) for rank in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Call:
    """What one rank asks of a collective; all ranks must ask the same.

    `shape` and `dtype` are those of the rank's array; None where they may differ between ranks.
    """

    operation: str
    detail: str = ""
    shape: tuple[int, ...] | None = None
    dtype: str | None = None

    def __str__(self) -> str:
        words = [] if self.dtype is None else [f"{self.dtype}{list(self.shape or ())}"]
        words += [self.detail] if self.detail else []
        return f"{self.operation}({', '.join(words)})"


def describe_mismatch(number: int, calls: Sequence[Call]) -> str | None:
    """Return the sentence that names two ranks whose calls differ, or None where all agree."""
    for rank, call in enumerate(calls):
        if call != calls[0]:
            return (
                f"the ranks disagree about collective number {number}: rank 0 called {calls[0]}, "
                f"rank {rank} called {call}. All ranks must make the same calls, in the same "
                "order, with equal shapes and dtypes; look for a branch on the rank, or for models "
                "or data that differ between ranks."
            )
    return None


class Pending(ABC):
    """A collective that was started. Its array must not be touched before `wait()` returned."""

    @abstractmethod
    def test(self) -> bool:
        """Make progress without blocking, and say whether the collective is done."""

    @abstractmethod
    def wait(self) -> Array:
        """Block until the collective is done, and return its result. May be called again.

        Raises:
            CommunicatorError: the collective failed; the message names the rank.
        """


class Done(Pending):
    """A collective that was done when it returned."""

    def __init__(self, result: Array) -> None:
        self._result = result

    def test(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> Array:
        """Return the result."""
        return self._result


class Communicator(ABC):
    """A group of ranks, and what they can do together.

    Use it as a context manager, or `close()` it when done. After an error the block does not close
    it: closing is collective, and the other ranks may be elsewhere.

    Attributes:
        name: kind of communicator: "local", "threads" or "mpi".
        description: one line for people: library, version, how all_reduce is done.
        rank: number of this rank, 0 <= rank < size.
        size: number of ranks.
        local_rank: number of this rank among those of its host.
        local_size: number of ranks on this host.
        host: name of this host.
        label: name of the group: "world", or its parent's with what `split` added; equal on all
            ranks.
        sequence: number of collectives that were started on it.
        steps: number of training steps that were begun on it.
        processes: whether a rank is a process of its own, that `abort` can end.
    """

    name: ClassVar[str]
    processes: ClassVar[bool] = False

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        local_rank: int,
        local_size: int,
        host: str,
        label: str = "world",
        description: str,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self.host = host
        self.label = label
        self.description = description
        self.sequence = 0
        self.steps = 0
        self._calls: collections.Counter[str] = collections.Counter()
        self._prepared_starts = 0  # of all_reduce, not yet counted among the calls
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}: {self.where}>"

    @property
    def calls(self) -> collections.Counter[str]:
        """How often each collective was called on this rank, by name."""
        self._calls["all_reduce"] += self._prepared_starts
        self._prepared_starts = 0
        return self._calls

    @property
    def where(self) -> str:
        """This rank in words, for messages: "rank 2 of 4 on host node7"."""
        return f"rank {self.rank} of {self.size} on host {self.host}"

    def all_reduce(self, values: Array, op: ReduceOp = "sum") -> Pending:
        """Combine `values` over all ranks, in place; every rank receives the same bits.

        Args:
            values: C-contiguous and writable, any shape (a slice of an arena: nothing is copied);
                float16, bfloat16, float32, float64 or an integer. The 16-bit floats are combined in
                float32 and rounded once. Overwritten with the result.
            op: "sum", "max" or "min". NaN on any rank gives NaN on all.

        Returns:
            A handle; its `wait()` returns `values`.

        Raises:
            TypeError: not an array, or its dtype can't be reduced.
            ValueError: not contiguous, read-only, or an unknown op.
            CommunicatorError: the communicator is closed, or the collective failed.

        Cost: about 2 * (size - 1) / size times its bytes, sent and received by each rank.
        """
        self._check_reduction("all_reduce", values, op)
        call = Call("all_reduce", op, tuple(values.shape), str(values.dtype))
        return self._all_reduce(values, op, call, self._begin(call))

    def broadcast(self, values: Array, root: int = 0) -> Pending:
        """Overwrite `values` on every rank with those of rank `root`, in place.

        Args:
            values: C-contiguous and writable, of any shape and any dtype but object.
            root: the rank whose values all receive.

        Returns:
            A handle; its `wait()` returns `values`.

        Raises:
            TypeError: not an array, or it holds Python objects.
            ValueError: not contiguous, read-only, or `root` is no rank.
            CommunicatorError: the communicator is closed, or the collective failed.
        """
        self._check_array("broadcast", values, writable=True)
        self._check_root("broadcast", root)
        call = Call("broadcast", f"root={root}", tuple(values.shape), str(values.dtype))
        return self._broadcast(values, root, call, self._begin(call))

    def all_gather(self, values: Array) -> Pending:
        """Collect the arrays of all ranks, which have one shape.

        Args:
            values: C-contiguous, of any shape and any dtype but object. Not modified.

        Returns:
            A handle; its `wait()` returns a new array of shape (size, *values.shape) on the same
            device.

        Raises:
            TypeError: not an array, or it holds Python objects.
            ValueError: not contiguous.
            CommunicatorError: the communicator is closed, or the collective failed.
        """
        self._check_array("all_gather", values, writable=False)
        call = Call("all_gather", "", tuple(values.shape), str(values.dtype))
        return self._all_gather(values, call, self._begin(call))

    def prepare_all_reduce(self, values: Array, op: ReduceOp = "sum") -> Callable[[], Pending]:
        """Check an `all_reduce` once, for an array that is reduced again and again.

        Args:
            values: as for `all_reduce`; its memory must stay where it is.
            op: as for `all_reduce`.

        Returns:
            A function that starts the collective and returns its handle: what `all_reduce(values, op)`
            does, without the checks and the choices. Preparing sends nothing.

        Raises:
            TypeError, ValueError: as `all_reduce`.
        """
        self._check_reduction("all_reduce", values, op)
        call = Call("all_reduce", op, tuple(values.shape), str(values.dtype))
        return lambda: self._all_reduce(values, op, call, self._begin(call))

    def reduce_scatter(self, values: Array) -> Pending:
        """Sum `values` over all ranks; each rank receives its own part of the sum, in place.

        Parts are added in rank order, ((a + b) + c) + ..., so that the bits depend on the order of the
        ranks alone.

        Args:
            values: C-contiguous and writable, [n]; as for `all_reduce`. After `wait()`, its part
                `cut(n, size)[rank]` holds the sum; what the rest holds is not defined.

        Returns:
            A handle; its `wait()` returns the rank's part, a view of `values`.

        Raises:
            TypeError, ValueError, CommunicatorError: as `all_reduce`.

        Cost: (size - 1) / size times its bytes, sent and received by each rank.
        """
        self._check_reduction("reduce_scatter", values, "sum")
        self._check_flat("reduce_scatter", values)
        call = Call("reduce_scatter", "", tuple(values.shape), str(values.dtype))
        return self._reduce_scatter(values, call, self._begin(call))

    def all_gather_parts(self, values: Array) -> Pending:
        """Give every rank all parts of an array of which each has its own, in place.

        Args:
            values: C-contiguous and writable, [n], of any dtype but object; the rank's part
                `cut(n, size)[rank]` is sent, the others are overwritten.

        Returns:
            A handle; its `wait()` returns `values`.

        Raises:
            TypeError, ValueError, CommunicatorError: as `broadcast`.
        """
        self._check_array("all_gather_parts", values, writable=True)
        self._check_flat("all_gather_parts", values)
        call = Call("all_gather_parts", "", tuple(values.shape), str(values.dtype))
        return self._all_gather_parts(values, call, self._begin(call))

    def all_to_all(self, parts: Sequence[Array]) -> list[Array]:
        """Send `parts[r]` to rank r, for every r, and return what the others sent here, by rank.

        Args:
            parts: one C-contiguous array for each rank, all of one dtype, which is the same on all
                ranks; each of any length, [n]. Not modified.

        Returns:
            New arrays on the device of `parts[0]`; entry r has the length of what rank r sent.

        Raises:
            TypeError: something is no array, or the dtypes differ, or they hold Python objects.
            ValueError: not one array for each rank, not contiguous, or not flat.
            CommunicatorError: the communicator is closed, or the collective failed.
        """
        self._check_parts(parts)
        call = Call("all_to_all", str(parts[0].dtype))
        return self._all_to_all(parts, call, self._begin(call))

    def combine(self, arrays: Sequence[Array], order: SumOrder) -> Pending:
        """Sum arrays of which each rank brings some, in a given order, into the last one of each rank.

        The order alone decides the bits: not who adds, nor how the arrays are cut for it.

        Args:
            arrays: `order.counts[rank]` of them, C-contiguous and writable, each [n], of one dtype; the same
                n and dtype on all ranks. float32, float64 or an integer: 16-bit floats must be converted, so
                that sums are rounded once. Overwritten.
            order: of the sum, the same on all ranks.

        Returns:
            A handle; its `wait()` returns the last array, which holds the sum.

        Raises:
            TypeError, ValueError, CommunicatorError: as `all_reduce`; or other arrays than `order` says.

        Cost: where all arrays of all ranks are shared (`is_shared`), each number is read once, and its sum
            written once to each rank; nothing blocks before `wait()`. Otherwise it is that of an all_reduce
            with one array for each rank; with more, the first half of the traffic is that many times more.
        """
        self._check_combine(arrays, order)
        result = arrays[-1]
        call = Call("combine", str(order.counts), tuple(result.shape), str(result.dtype))
        number = self._begin(call)
        return self._combine(arrays, order, call, number) if result.size else Done(result)

    def is_shared(self, values: Array) -> bool:
        """Say whether an array lies in memory from `allocate` that all ranks see.

        The same on all ranks, for the same part of what they allocated together.
        """
        del values
        return False

    def all_gather_rows(self, values: Array) -> list[Array]:
        """Return the arrays of all ranks, by rank, which may have different lengths.

        Args:
            values: C-contiguous, [n, ...]; n may differ between ranks and be 0, the other axes and the
                dtype are the same. Not modified.

        Returns:
            New arrays on the device of `values`.

        Raises:
            TypeError: not an array, or it holds Python objects.
            ValueError: not contiguous, or without axes.
            CommunicatorError: the communicator is closed, or the collective failed.
        """
        self._check_array("all_gather_rows", values, writable=False)
        if not values.ndim:
            raise ValueError(f"all_gather_rows: an array without axes has no rows (on {self.where})")
        call = Call("all_gather_rows", "", (-1, *values.shape[1:]), str(values.dtype))
        return self._all_gather_rows(values, call, self._begin(call))

    def allocate(self, size: int, dtype: Any) -> Array:
        """Return zeroed host memory, [size], in which collectives are as fast as they can be. Collective.

        Where the ranks of a host can share memory, this is the rank's part of it, and `all_reduce`,
        `reduce_scatter` and `all_gather_parts` on slices of it copy nothing but results. It lives
        until the communicator is closed.

        Args:
            size: number of elements, >= 0, the same on every rank.
            dtype: of the elements, the same on every rank.

        Raises:
            ValueError: `size` is negative.
            TypeError: `dtype` holds Python objects.
        """
        if size < 0:
            raise ValueError(f"allocate: size must be >= 0, got {size} on {self.where}.")
        if np.dtype(dtype).hasobject:
            raise TypeError(f"allocate: arrays of Python objects can't be sent (on {self.where}).")
        call = Call("allocate", "", (size,), str(np.dtype(dtype)))
        return self._allocate(size, np.dtype(dtype), call, self._begin(call))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        call = Call("barrier")
        self._barrier(call, self._begin(call))

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Return `root`'s value on every rank (pickled; for small things, not for arrays).

        Raises:
            ValueError: `root` is no rank.
        """
        self._check_root("broadcast_object", root)
        call = Call("broadcast_object", f"root={root}")
        return self._broadcast_object(value, root, call, self._begin(call))

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the list of all ranks' values, by rank (pickled; for small things, not arrays)."""
        call = Call("all_gather_object")
        return self._all_gather_object(value, call, self._begin(call))

    def split(self, color: int, key: int = 0) -> Communicator:
        """Make a communicator for each `color`, of the ranks that gave it.

        Args:
            color: >= 0; which group this rank joins.
            key: ranks are ordered by key, then by their old rank.

        Raises:
            ValueError: `color` is negative.
            TypeError: `color` is no integer.
        """
        given: Any = color
        if not isinstance(given, int | np.integer):
            raise TypeError(
                f"split: color must be an integer, got {type(given).__name__} {given!r} on {self.where}."
            )
        if color < 0:
            raise ValueError(f"split: color must be >= 0, got {color} on {self.where}.")
        call = Call("split")
        number = self._begin(call)
        return self._split(color, key, f"{self.label}/{number}.{color}", call, number)

    def begin_step(self) -> bool:
        """Note that a training step begins; aggregators call it before they read its first gradient.

        Returns:
            Whether that gradient shall have a NaN in it: never but in a world of threads with faults, see
            `distopt.testing.Fault`.
        """
        self.steps += 1
        return False

    @abstractmethod
    def progress(self) -> None:
        """Move pending collectives on, without blocking; cheap when there is nothing to do."""

    def abort(self, code: int, message: str) -> NoReturn:
        """End the whole job, all ranks, with `message` as the last line on the error stream.

        Args:
            code: exit code of the job, 1 to 255.
            message: what happened.
        """
        raise CommunicatorError(f"{self.where} ended the job with code {code}: {message}")

    def close(self) -> None:
        """Give back what the communicator holds. Collective; a second call does nothing."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def _begin(self, call: Call) -> int:
        if self._closed:
            raise CommunicatorError(
                f"{call} was called on a closed communicator ({self.label}, {self.where}). "
                "Close it after its last use."
            )
        self.sequence += 1
        self._calls[call.operation] += 1
        return self.sequence

    def _check_array(self, operation: str, values: Any, writable: bool) -> None:
        if not (isinstance(values, np.ndarray) or device_of(values).kind == "cuda"):
            raise TypeError(
                f"{operation}: expected a NumPy or CuPy array, got {type(values).__name__} on {self.where}."
            )
        if values.dtype.hasobject:
            raise TypeError(
                f"{operation}: arrays of Python objects can't be sent (on {self.where}); "
                "use broadcast_object or all_gather_object."
            )
        if not values.flags.c_contiguous:
            raise ValueError(
                f"{operation}: the array of shape {values.shape} is not C-contiguous "
                f"(on {self.where}). Pass a contiguous slice, or a copy."
            )
        if writable and not getattr(values.flags, "writeable", True):
            raise ValueError(
                f"{operation}: the array of shape {values.shape} is read-only "
                f"(on {self.where}), and the result would be written into it. Pass a copy."
            )

    def _check_reduction(self, operation: str, values: Any, op: str) -> None:
        self._check_array(operation, values, writable=True)
        if op not in get_args(ReduceOp):
            raise ValueError(f'{operation}: op must be "sum", "max" or "min", got {op!r} on {self.where}.')
        if values.dtype not in _REDUCIBLE:
            raise TypeError(
                f"{operation}: arrays of {values.dtype} can't be reduced (on {self.where}). Use "
                "float16, bfloat16, float32, float64 or an integer of the machine's byte order."
            )

    def _check_flat(self, operation: str, values: Array) -> None:
        if values.ndim != 1:
            raise ValueError(
                f"{operation}: expected an array with one axis, got shape {values.shape} on {self.where}. "
                "Pass values.reshape(-1)."
            )

    def _check_parts(self, parts: Sequence[Array]) -> None:
        if len(parts) != self.size:
            raise ValueError(
                f"all_to_all: expected one array for each of {self.size} ranks, got {len(parts)} "
                f"on {self.where}."
            )
        for part in parts:
            self._check_array("all_to_all", part, writable=False)
            self._check_flat("all_to_all", part)
            if part.dtype != parts[0].dtype:
                raise TypeError(
                    f"all_to_all: all parts must have one dtype, got {parts[0].dtype} and {part.dtype} "
                    f"on {self.where}."
                )

    def _check_combine(self, arrays: Sequence[Array], order: SumOrder) -> None:
        if len(order.counts) != self.size or len(arrays) != order.counts[self.rank]:
            raise ValueError(
                f"combine: the order is of {order.counts} arrays by rank, got {len(arrays)} on {self.where}."
            )
        for array in arrays:
            self._check_reduction("combine", array, "sum")
            self._check_flat("combine", array)
            if array.dtype != arrays[-1].dtype or array.size != arrays[-1].size:
                raise ValueError(
                    f"combine: all arrays must have one dtype and length, got {array.dtype}[{array.size}] "
                    f"and {arrays[-1].dtype}[{arrays[-1].size}] on {self.where}."
                )
        if wire_dtype(arrays[-1].dtype) != arrays[-1].dtype:
            raise TypeError(
                f"combine: got arrays of {arrays[-1].dtype} on {self.where}; convert them to float32, so "
                "that the sum is rounded once."
            )

    def _check_root(self, operation: str, root: int) -> None:
        if not 0 <= root < self.size:
            raise ValueError(
                f"{operation}: root must be a rank, 0 to {self.size - 1}, got {root} on {self.where}."
            )

    @abstractmethod
    def _all_reduce(self, values: Array, op: str, call: Call, number: int) -> Pending: ...

    @abstractmethod
    def _broadcast(self, values: Array, root: int, call: Call, number: int) -> Pending: ...

    @abstractmethod
    def _all_gather(self, values: Array, call: Call, number: int) -> Pending: ...

    @abstractmethod
    def _all_gather_parts(self, values: Array, call: Call, number: int) -> Pending: ...

    @abstractmethod
    def _reduce_scatter(self, values: Array, call: Call, number: int) -> Pending: ...

    @abstractmethod
    def _all_to_all(self, parts: Sequence[Array], call: Call, number: int) -> list[Array]: ...

    def _combine(self, arrays: Sequence[Array], order: SumOrder, call: Call, number: int) -> Pending:
        """Send everyone its part, add up one's own, and gather the parts."""
        del call, number  # the collectives that this is made of have their own
        result = arrays[-1]
        if order.is_pair:
            return self.all_reduce(result)
        if self.size == 1:
            total = order.total(arrays)
            if total is not result:
                result[...] = total
            return Done(result)
        cuts = cut(result.size, self.size)
        own = cuts[self.rank]
        join = namespace(result).concatenate
        sent = [
            result[:0] if other == self.rank else join([array[part] for array in arrays])
            for other, part in enumerate(cuts)
        ]
        pieces: list[Array] = []
        for other, received in enumerate(self.all_to_all(sent)):
            if other == self.rank:
                pieces += [array[own] for array in arrays]
            else:
                pieces += list(received.reshape(order.counts[other], own.stop - own.start))
        result[own] = order.total(pieces)
        return self.all_gather_parts(result)

    @abstractmethod
    def _all_gather_rows(self, values: Array, call: Call, number: int) -> list[Array]: ...

    @abstractmethod
    def _barrier(self, call: Call, number: int) -> None: ...

    def _allocate(self, size: int, dtype: np.dtype[Any], call: Call, number: int) -> Array:
        return np.zeros(size, dtype)

    @abstractmethod
    def _broadcast_object(self, value: Any, root: int, call: Call, number: int) -> Any: ...

    @abstractmethod
    def _all_gather_object(self, value: Any, call: Call, number: int) -> list[Any]: ...

    @abstractmethod
    def _split(self, color: int, key: int, label: str, call: Call, number: int) -> Communicator: ...
