"""Groups of variables that are encoded and exchanged together, and what is kept of them between steps."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np

from distopt.aggregators.codecs.codec import Codec, Place
from distopt.aggregators.codecs.error_feedback import Compression, ErrorFeedback
from distopt.aggregators.codecs.powersgd import PowerSGD, matrix_shape, next_start, orthonormal, product
from distopt.aggregators.divide import put
from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array, asnumpy, namespace
from distopt.communicators import Communicator, Pending
from distopt.communicators.communicator import cut
from distopt.variables import Variable

__all__ = ["Group", "make_group"]


def make_group(
    communicator: Communicator, codec: Compression, variables: Sequence[Variable], kept: dict[str, Array]
) -> Group:
    """Return the group of some variables, with what a checkpoint had of them.

    Args:
        communicator: over whose ranks.
        codec: with or without error feedback.
        variables: in the order in which they are laid one behind the other.
        kept: of a checkpoint; what belongs to the group is taken out.
    """
    inner = codec.codec if isinstance(codec, ErrorFeedback) else codec
    feedback = isinstance(codec, ErrorFeedback)
    if isinstance(inner, PowerSGD):
        return _LowRank(communicator, inner, feedback, variables, kept)
    kind = _Slices if inner.exchange == "slices" else _Gathered
    return kind(communicator, inner, feedback, variables, kept)


class Group(ABC):
    """Variables that are exchanged together, in each step: `start`, `finish`, and `settle` at its end.

    Attributes:
        variables: its members.
        sent: bytes that this rank sent to others in the last step.
    """

    def __init__(
        self,
        communicator: Communicator,
        feedback: bool,
        variables: Sequence[Variable],
        kept: dict[str, Array],
    ) -> None:
        self.communicator = communicator
        self.variables = list(variables)
        self.sent = 0
        ends = [0, *itertools.accumulate(variable.size for variable in variables)]
        self._places = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self._size = ends[-1]
        self._label = variables[0].name
        self._gradients: list[Array] = []
        self._residual: Array | None = None
        self._next_residual: Array | None = None
        if feedback:
            parts = [kept.pop(f"first:{v.name}", None) for v in variables]
            device = variables[0].device
            self._residual = device.zeros(self._size)
            for place, part in zip(self._places, parts, strict=True):
                if part is not None:
                    self._residual[place] = device.asarray(part[communicator.rank])

    @abstractmethod
    def start(self, gradients: Sequence[Array], step: int) -> None:
        """Encode this rank's gradients, one for each variable, which `finish` overwrites."""

    @abstractmethod
    def finish(self, divisor: float | None) -> None:
        """Exchange, and write the sums over ranks, divided where there is a divisor. Collective."""

    def settle(self, applied: Collection[str]) -> None:
        """Keep what was left out of the variables that are applied; the others stay as they were."""
        if self._residual is not None and self._next_residual is not None:
            for variable, place in zip(self.variables, self._places, strict=True):
                if variable.name in applied:
                    self._residual[place] = self._next_residual[place]
        self._next_residual = None

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint must hold, on the host. Collective."""
        if self._residual is None:
            return {}
        every = asnumpy(self.communicator.all_gather(self._residual).wait())
        return {
            f"first:{variable.name}": np.ascontiguousarray(every[:, place])
            for variable, place in zip(self.variables, self._places, strict=True)
        }

    def _packed(self, gradients: Sequence[Array]) -> Array:
        """Return the gradients one behind the other, float32, with what was left out before."""
        self._gradients = list(gradients)
        self._next_residual = None
        xp = namespace(*gradients)
        with np.errstate(over="ignore"):  # of float64; infinite it is seen
            parts = [gradient.reshape(-1).astype(np.float32, copy=False) for gradient in gradients]
        packed: Array = parts[0] if len(parts) == 1 else xp.concatenate(parts)
        if self._residual is None:
            return packed
        with np.errstate(over="ignore", invalid="ignore"):
            return packed + self._residual

    def _remember(self, given: Array, decoded: Array) -> None:
        if self._residual is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                self._next_residual = given - decoded

    def _write(self, total: Array) -> None:
        for gradient, place in zip(self._gradients, self._places, strict=True):
            put(total[place].reshape(gradient.shape), gradient, copied=True)
        self._gradients = []


class _Slices(Group):
    """Every rank sums a slice of what all encoded, in float32, and encodes the result for everybody."""

    def __init__(
        self,
        communicator: Communicator,
        codec: Codec,
        feedback: bool,
        variables: Sequence[Variable],
        kept: dict[str, Array],
    ) -> None:
        super().__init__(communicator, feedback, variables, kept)
        self._codec = codec
        self._cuts = cut(self._size, communicator.size)
        self._own = self._cuts[communicator.rank]
        self._payloads: list[Array] = []
        self._step = 0
        self._sum_residual: Array | None = None
        self._next_sum_residual: Array | None = None
        if feedback:
            device = variables[0].device
            whole = np.zeros(self._size, np.float32)
            for variable, place in zip(variables, self._places, strict=True):
                part = kept.pop(f"second:{variable.name}", None)
                if part is not None:
                    whole[place] = part
            self._sum_residual = device.asarray(whole[self._own])

    def start(self, gradients: Sequence[Array], step: int) -> None:
        """See `Group.start`."""
        self._step = step
        given = self._packed(gradients)
        self._payloads = [self._at(number, 0).encode(given[part]) for number, part in enumerate(self._cuts)]
        if self._residual is not None:
            self._remember(given, self._decoded(self._payloads))

    def finish(self, divisor: float | None) -> None:
        """See `Group.finish`."""
        received = self.communicator.all_to_all(self._payloads)
        self.sent = sum(p.size for p in self._payloads) - self._payloads[self.communicator.rank].size
        self._payloads = []
        length = self._own.stop - self._own.start
        with np.errstate(over="ignore", invalid="ignore"):
            total = self._codec.decode(received[0], length)
            for payload in received[1:]:
                self._codec.add_decoded(payload, total)
            if divisor is not None:
                total /= np.float32(divisor)
            if self._sum_residual is not None:
                total += self._sum_residual
            payload = self._at(self.communicator.rank, 1).encode(total)
            if self._sum_residual is not None:
                self._next_sum_residual = total - self._codec.decode(payload, length)
        self.sent += payload.size * (self.communicator.size - 1)
        self._write(self._decoded(self.communicator.all_gather_rows(payload)))

    def settle(self, applied: Collection[str]) -> None:
        """See `Group.settle`."""
        super().settle(applied)
        if self._sum_residual is not None and self._next_sum_residual is not None:
            for variable, place in zip(self.variables, self._places, strict=True):
                first, last = max(place.start, self._own.start), min(place.stop, self._own.stop)
                if variable.name in applied and first < last:
                    mine = slice(first - self._own.start, last - self._own.start)
                    self._sum_residual[mine] = self._next_sum_residual[mine]
        self._next_sum_residual = None

    def state(self) -> dict[str, Array]:
        """See `Group.state`."""
        found = super().state()
        if self._sum_residual is None:
            return found
        whole = self.variables[0].device.zeros(self._size)
        whole[self._own] = self._sum_residual
        whole = asnumpy(self.communicator.all_gather_parts(whole).wait())
        return found | {
            f"second:{variable.name}": whole[place].copy()
            for variable, place in zip(self.variables, self._places, strict=True)
        }

    def _at(self, part: int, stage: int) -> Codec:
        return self._codec.at(Place(self._step, self.communicator.rank, self._label, part, stage))

    def _decoded(self, payloads: Sequence[Array]) -> Array:
        decoded = [
            self._codec.decode(payload, part.stop - part.start)
            for payload, part in zip(payloads, self._cuts, strict=True)
        ]
        whole: Array = decoded[0] if len(decoded) == 1 else namespace(*decoded).concatenate(decoded)
        return whole


class _Gathered(Group):
    """Every rank gets all ranks' payloads, and sums what they say in rank order, in float32."""

    def __init__(
        self,
        communicator: Communicator,
        codec: Codec,
        feedback: bool,
        variables: Sequence[Variable],
        kept: dict[str, Array],
    ) -> None:
        super().__init__(communicator, feedback, variables, kept)
        self._codec = codec
        self._payload: Array | None = None

    def start(self, gradients: Sequence[Array], step: int) -> None:
        """See `Group.start`."""
        given = self._packed(gradients)
        codec = self._codec.at(Place(step, self.communicator.rank, self._label, 0, 0))
        self._payload = codec.encode(given)
        if self._residual is not None:
            self._remember(given, codec.decode(self._payload, self._size))

    def finish(self, divisor: float | None) -> None:
        """See `Group.finish`."""
        assert self._payload is not None
        self.sent = self._payload.size * (self.communicator.size - 1)
        total = self.variables[0].device.zeros(self._size)
        with np.errstate(over="ignore", invalid="ignore"):
            for payload in self.communicator.all_gather_rows(self._payload):
                self._codec.add_decoded(payload, total)
            if divisor is not None:
                total /= np.float32(divisor)
        self._payload = None
        self._write(total)


class _LowRank(Group):
    """Each variable as a product of two thin matrices, whose sums over ranks are all_reduced."""

    def __init__(
        self,
        communicator: Communicator,
        codec: PowerSGD,
        feedback: bool,
        variables: Sequence[Variable],
        kept: dict[str, Array],
    ) -> None:
        super().__init__(communicator, feedback, variables, kept)
        self._rank = codec.rank
        self._shapes = [matrix_shape(variable.shape) for variable in variables]
        device = variables[0].device
        self._fresh = [device.asarray(codec.first_q(v.name, v.shape)) for v in variables]
        self._q = [
            device.asarray(kept.pop(f"q:{variable.name}", first))
            for variable, first in zip(variables, self._fresh, strict=True)
        ]
        self._next_q: list[Array] | None = None
        self._matrices: list[Array] = []
        self._pending: Pending | None = None

    def start(self, gradients: Sequence[Array], step: int) -> None:
        """See `Group.start`."""
        del step
        given = self._packed(gradients)
        self._matrices = [
            given[place].reshape(shape) for place, shape in zip(self._places, self._shapes, strict=True)
        ]
        with np.errstate(over="ignore", invalid="ignore"):
            found = [q @ m.T for q, m in zip(self._q, self._matrices, strict=True)]
        packed = namespace(given).concatenate([p.reshape(-1) for p in found])
        self.sent = sent_by_all_reduce(packed.nbytes, self.communicator.size)
        self._pending = self.communicator.all_reduce(packed)

    def finish(self, divisor: float | None) -> None:
        """See `Group.finish`."""
        assert self._pending is not None
        xp = namespace(*self._matrices)
        summed = self._pending.wait()
        self._pending = None
        p = [orthonormal(part) for part in self._cut(summed, [m for m, _ in self._shapes])]
        with np.errstate(over="ignore", invalid="ignore"):
            own_q = [left @ m for left, m in zip(p, self._matrices, strict=True)]
            packed = xp.concatenate([q.reshape(-1) for q in own_q])
            self.sent += sent_by_all_reduce(packed.nbytes, self.communicator.size)
            self.communicator.all_reduce(packed).wait()
            q = self._cut(packed, [k for _, k in self._shapes])
            if self._residual is not None:
                given = xp.concatenate([m.reshape(-1) for m in self._matrices])
                own = [product(left, right).reshape(-1) for left, right in zip(p, own_q, strict=True)]
                self._remember(given, xp.concatenate(own))
            total = xp.concatenate([product(a, b).reshape(-1) for a, b in zip(p, q, strict=True)])
            if divisor is not None:
                total /= np.float32(divisor)
        self._next_q = [next_start(found, fresh) for found, fresh in zip(q, self._fresh, strict=True)]
        self._matrices = []
        self._write(total)

    def settle(self, applied: Collection[str]) -> None:
        """See `Group.settle`."""
        super().settle(applied)
        if self._next_q is not None:
            for number, variable in enumerate(self.variables):
                if variable.name in applied:
                    self._q[number] = self._next_q[number]
        self._next_q = None

    def state(self) -> dict[str, Array]:
        """See `Group.state`."""
        kept = {f"q:{v.name}": asnumpy(q) for v, q in zip(self.variables, self._q, strict=True)}
        return super().state() | kept

    def _cut(self, packed: Array, lengths: Sequence[int]) -> list[Array]:
        ends = [0, *itertools.accumulate(self._rank * length for length in lengths)]
        parts = [packed[a:b] for a, b in itertools.pairwise(ends)]
        return [part.reshape(self._rank, length) for part, length in zip(parts, lengths, strict=True)]
