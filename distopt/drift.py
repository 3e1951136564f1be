"""Drift check: notice within K steps that a replica is no longer what the others are, and say where.

Equal gradients keep ranks alike only while every bit of values, slots and averages stays what the optimizer
made it. Memory that forgets a bit, a library that rounds otherwise on one host, or code that changes a
variable on one rank let replicas drift apart without a word. So every K steps the ranks compare
fingerprints: two 64-bit words for each array, the sum of its words and their sum weighted by position,
both modulo 2**64. Integer sums have the same value in any order and in any blocks, on any device.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from distopt.backend import Array, asnumpy, namespace
from distopt.communicators import Communicator
from distopt.errors import DriftError
from distopt.optimizers import ExponentialMovingAverage, Optimizer
from distopt.variables import Variable

__all__ = ["Drift", "DriftCheck", "OnDrift", "fingerprints", "replicated"]

_log = logging.getLogger("distopt")

OnDrift: TypeAlias = Literal["stop", "repair"]

_WORDS = 1 << 15  # in a block: 256 KB, and as much of weights, stay in a core's cache
_WORDS_ON_GPU = 1 << 22  # large enough that launches don't count
_WORDS_COMPARED = 1 << 12  # size of the block that is sent whole to find an element
_MASK = (1 << 64) - 1

_weights: dict[str, Array] = {"numpy": np.arange(1, _WORDS + 1, dtype=np.uint64)}


@dataclass(frozen=True)
class Drift:
    """The first place at which replicas differ.

    Attributes:
        step: at which it was found.
        names: of all arrays that differ, in their order.
        index: of the first element of the first of them that differs.
        values: that element on each rank.
        bits: the same in hexadecimal, which tells NaN from NaN.
        hosts: of each rank.
        minority: ranks that differ from what more than half of the ranks have in that array; empty where no
            more than half of them agree.
        repaired: whether the arrays were set to what the majority has.
    """

    step: int
    names: tuple[str, ...]
    index: tuple[int, ...]
    values: tuple[Any, ...]
    bits: tuple[str, ...]
    hosts: tuple[str, ...]
    minority: tuple[int, ...]
    repaired: bool = False

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for rank, bits in enumerate(self.bits):
            groups.setdefault(bits, []).append(rank)
        name, *others = self.names
        found = ", ".join(
            f"{self.values[ranks[0]]} (bits {bits}) on {self._who(ranks)}" for bits, ranks in groups.items()
        )
        more = f" and {len(others)} other array(s)" if others else ""
        blame = (
            f"The minority is {self._who(self.minority)}"
            if self.minority
            else "No more than half of the ranks agree, so it can't be said who is right"
        )
        return (
            f"step {self.step}: the replicas have drifted apart in {name!r}{more}, first at "
            f"element {list(self.index)}: {found}. {blame}."
        )

    def _who(self, ranks: Iterable[int]) -> str:
        return ", ".join(f"rank {rank} ({self.hosts[rank]})" for rank in ranks)


class DriftCheck:
    """Compares what must be the same on all ranks, every K steps.

    A check reads everything once, and exchanges 8 bytes. What is sharded or differs between ranks by nature
    (a part of optimizer state, residuals of a codec, batch statistics that each rank has of its own) doesn't
    belong into the state that is given, or is named by `leave_out`.

    Args:
        communicator: the ranks.
        every: steps between two checks.
        on_drift: "stop" raises `DriftError` on every rank; "repair" sets what differs to what more than
            half of the ranks have, says so, and goes on. Without such a majority it raises, too.
        leave_out: name -> whether an array is not compared; the same on every rank.

    Attributes:
        checks: how many were made.
        seconds: spent in checks, waiting for other ranks included.
        reading_seconds: spent in reading arrays.
        read_bytes: how much was read.

    Raises:
        ValueError: `every` is below 1, or an unknown `on_drift`.
    """

    def __init__(
        self,
        communicator: Communicator,
        every: int = 100,
        on_drift: OnDrift = "stop",
        leave_out: Callable[[str], bool] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        if on_drift not in get_args(OnDrift):
            raise ValueError(f"on_drift must be 'stop' or 'repair', got {on_drift!r}")
        self.communicator = communicator
        self.every = every
        self.on_drift: OnDrift = on_drift
        self.leave_out = leave_out
        self.checks = 0
        self.seconds = 0.0
        self.reading_seconds = 0.0
        self.read_bytes = 0

    def due(self, step: int) -> bool:
        """Whether a check belongs after this step, of which `step` are done."""
        return step % self.every == 0 and self.communicator.size > 1

    def check(self, step: int, state: Mapping[str, Variable | Array]) -> Drift | None:
        """Compare the state of all ranks now. Collective.

        Args:
            step: its number, for messages.
            state: name -> variable or array, in the same order on every rank; such as `replicated` gives.
                Repairs go into these arrays.

        Returns:
            None where all are alike, bit for bit; what was repaired otherwise.

        Raises:
            DriftError: on every rank: they differ and nothing was repaired, or the ranks gave other names,
                shapes or dtypes.
        """
        began = time.perf_counter()
        try:
            return self._check(step, self._kept(state))
        finally:
            self.checks += 1
            self.seconds += time.perf_counter() - began

    def _kept(self, state: Mapping[str, Variable | Array]) -> dict[str, Variable | Array]:
        leave_out = self.leave_out
        return {name: v for name, v in state.items() if leave_out is None or not leave_out(name)}

    def _check(self, step: int, state: Mapping[str, Variable | Array]) -> Drift | None:
        arrays = {name: _array(given) for name, given in state.items()}
        began = time.perf_counter()
        found = fingerprints(arrays.values())
        self.reading_seconds += time.perf_counter() - began
        self.read_bytes += sum(array.nbytes for array in arrays.values())
        described = [(name, tuple(array.shape), str(array.dtype)) for name, array in arrays.items()]
        digest = hashlib.blake2b(repr(described).encode() + found.tobytes(), digest_size=8).digest()
        digests = self.communicator.all_gather(np.frombuffer(digest, np.uint64).copy()).wait()
        if (digests == digests[0]).all():
            return None
        return self._differing(step, state, arrays, described, found)

    def _differing(
        self,
        step: int,
        state: Mapping[str, Variable | Array],
        arrays: Mapping[str, Array],
        described: list[tuple[str, tuple[int, ...], str]],
        found: Array,
    ) -> Drift:
        communicator = self.communicator
        everyone: list[Any] = communicator.all_gather_object((communicator.host, described))
        hosts = tuple(host for host, _ in everyone)
        _check_described(everyone, step)
        table = communicator.all_gather(found).wait()  # [ranks, arrays, 2]
        names = list(arrays)
        differing = [i for i in range(len(names)) if (table[:, i] != table[0, i]).any()]
        majorities = {i: _majority([tuple(words) for words in table[:, i].tolist()]) for i in differing}
        first = differing[0]
        index, values, bits = self._first_element(arrays[names[first]])
        agreed = majorities[first]
        minority = tuple(r for r in range(communicator.size) if agreed and r not in agreed)
        drift = Drift(
            step=step,
            names=tuple(names[i] for i in differing),
            index=index,
            values=values,
            bits=bits,
            hosts=hosts,
            minority=minority,
            repaired=self.on_drift == "repair" and all(majorities.values()),
        )
        if not drift.repaired:
            undecided = [names[i] for i in differing if not majorities[i]]
            reason = (
                f"It can't be repaired: no more than half of the ranks agree on {undecided[0]!r}."
                if self.on_drift == "repair"
                else "on_drift='repair' would go on from what most ranks have."
            )
            raise DriftError(
                f"{drift} Resume from a checkpoint that is older than the last good check, {self.every} "
                "steps before, and look for a broken device or for code that runs on some ranks only. "
                f"{reason}"
            )
        for i in differing:
            self._copy_from(majorities[i][0], state[names[i]])
        if communicator.rank == 0:
            _log.warning("%s Repaired %s from the majority.", drift, ", ".join(map(repr, drift.names)))
        return drift

    def _first_element(self, array: Array) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[str, ...]]:
        """Find the first element that differs, and what it is on each rank: index, values, bits."""
        data = _bytes_of(array)
        step = 8 * _WORDS_COMPARED
        blocks = [data[start : start + step] for start in range(0, data.size, step)]
        tables = self.communicator.all_gather(fingerprints(blocks)).wait()
        block = int(np.flatnonzero((tables != tables[0]).any(axis=(0, 2)))[0])
        parts = self.communicator.all_gather(np.ascontiguousarray(asnumpy(blocks[block]))).wait()
        elements = parts.reshape(len(parts), -1, array.dtype.itemsize)
        place = int(np.flatnonzero((elements != elements[0]).any(axis=(0, 2)))[0])
        chosen = np.ascontiguousarray(elements[:, place])
        values = tuple(value.item() for value in chosen.view(array.dtype)[:, 0])
        bits = tuple("0x" + bytes(raw[::-1]).hex() for raw in chosen)  # the machine is little-endian
        flat = block * step // array.dtype.itemsize + place
        return tuple(int(n) for n in np.unravel_index(flat, array.shape)), values, bits

    def _copy_from(self, root: int, given: Variable | Array) -> None:
        array = _array(given)
        contiguous = namespace(array).ascontiguousarray(array)
        self.communicator.broadcast(contiguous.reshape(-1), root).wait()
        if not array.flags.c_contiguous:
            array[...] = contiguous.reshape(array.shape)
        if isinstance(given, Variable):
            given.version += 1


def replicated(
    variables: Iterable[Variable],
    optimizer: Optimizer | None = None,
    averages: ExponentialMovingAverage | None = None,
) -> dict[str, Variable]:
    """Return by name what all ranks hold alike: values, what the optimizer keeps, moving averages.

    Args:
        variables: that are trained.
        optimizer: its iterations, slots (unless they are divided among the ranks), loss scale, and what its
            transformers keep.
        averages: of the variables.
    """
    found: dict[str, Variable] = {}
    for variable in _all_of(variables, optimizer, averages):
        name, number = variable.name, 2
        while name in found:  # names of slots of variables that share a name
            name, number = f"{variable.name}#{number}", number + 1
        found[name] = variable
    return found


def _all_of(
    variables: Iterable[Variable], optimizer: Optimizer | None, averages: ExponentialMovingAverage | None
) -> Iterator[Variable]:
    yield from variables
    if optimizer is not None:
        # Divided slots are other ones on each rank.
        yield from [optimizer.iterations] if optimizer.is_divided else optimizer.weights
        for transformer in optimizer.gradient_transformers:
            yield from getattr(transformer, "variables", list[Variable])()
    if averages is not None:
        yield from averages.variables()


def fingerprints(arrays: Iterable[Array]) -> Array:
    """Return uint64 [arrays, 2]: of each its sum of 64-bit words, and the sum weighted by 1, 2, 3, ...

    Both modulo 2**64; an array whose size is no multiple of 8 bytes is taken to end in zeros. Arrays of
    equal bytes have equal fingerprints whatever their shape. One flipped bit always changes the first word;
    two words that changed places leave the first as it is, and change the second unless their distance times
    their difference is a multiple of 2**64. Arrays on a GPU are summed there; the host waits once.
    """
    found = [_sums(_bytes_of(array)) for array in arrays]
    if not found:
        return np.zeros((0, 2), np.uint64)
    xp = namespace(*(word for pair in found for word in pair))
    if xp is np:
        return np.array(found, np.uint64)
    return asnumpy(xp.stack([xp.asarray(word, xp.uint64) for pair in found for word in pair])).reshape(-1, 2)


def _sums(data: Array) -> tuple[Any, Any]:
    """Return both sums over bytes [n]: Python integers for NumPy, arrays without axes for CuPy."""
    xp = namespace(data)
    whole = data.size // 8 * 8
    words = data[:whole].view(np.uint64)
    total: Any = 0
    weighted: Any = 0
    block = _WORDS if xp is np else _WORDS_ON_GPU
    if xp.__name__ not in _weights:
        _weights[xp.__name__] = xp.arange(1, block + 1, dtype=xp.uint64)
    weights = _weights[xp.__name__]
    for start in range(0, words.size, block):
        part = words[start : start + block]
        if xp is np:
            plain, own = int(np.add.reduce(part)), int(np.dot(part, weights[: part.size]))
        else:
            plain, own = part.sum(), (part * weights[: part.size]).sum()
        total, weighted = total + plain, weighted + own + start * plain
    if data.size > whole:
        tail = xp.zeros(8, np.uint8)
        tail[: data.size - whole] = data[whole:]
        last = tail.view(np.uint64)[0]
        last = int(last) if xp is np else last
        total, weighted = total + last, weighted + (words.size + 1) * last
    return (total & _MASK, weighted & _MASK) if xp is np else (total, weighted)


def _bytes_of(array: Array) -> Array:
    """Return an array's memory as bytes [n], at an address that 64-bit words may have; a copy if needed."""
    xp = namespace(array)
    flat = xp.ascontiguousarray(array).reshape(-1).view(np.uint8)
    address = flat.__array_interface__["data"][0] if xp is np else flat.data.ptr
    return flat.copy() if address % 8 else flat


def _array(given: Variable | Array) -> Array:
    return given.value if isinstance(given, Variable) else given


def _majority(words: list[tuple[int, ...]]) -> list[int]:
    """Return the ranks that have what more than half of them have; none where no more than half agree."""
    for one in dict.fromkeys(words):
        ranks = [rank for rank, other in enumerate(words) if other == one]
        if 2 * len(ranks) > len(words):
            return ranks
    return []


def _check_described(everyone: list[Any], step: int) -> None:
    first = everyone[0][1]
    for rank, (host, described) in enumerate(everyone):
        for number in range(max(len(first), len(described))):
            here, there = first[number : number + 1], described[number : number + 1]
            if here != there:
                raise DriftError(
                    f"step {step}: the drift check was given other state on rank {rank} ({host}): entry "
                    f"{number} is {there[0] if there else 'missing'} there and "
                    f"{here[0] if here else 'missing'} on rank 0. Give it the same names, shapes and dtypes "
                    "on every rank, and leave out what is sharded or a rank's own"
                )
