"""What one rank computes in a step: forward and backward passes of its pieces of the global batch.

A piece is what goes through a replica at once: usually the replica's whole part; with micro-batches one of N
cuts of it; in canonical mode one canonical shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distopt.aggregators import Aggregator, Canonical, Pair, Ticket, combine_replicas
from distopt.backend import Array, namespace
from distopt.communicators.communicator import Communicator, cut
from distopt.data.sampler import shard
from distopt.metrics import PhaseClock
from distopt.optimizers import LossScaleOptimizer, Optimizer
from distopt.replica import Batch, Replica
from distopt.settings import Settings
from distopt.tape import Tensor
from distopt.variables import IndexedSlices, Variable, concatenated

__all__ = ["Batches", "Piece", "Step", "kernels", "make_pieces"]


class Batches(Protocol):
    """Where the input of the steps comes from, such as a `Prefetcher`."""

    def get(self, step: int) -> list[Batch]:
        """Return a step's batches, one for each piece."""
        ...


@dataclass(frozen=True)
class Piece:
    """A part of the global batch that goes through a replica at once.

    Attributes:
        replica: number of the rank's replica that computes it.
        examples: which of the global batch.
        shard: number of the canonical shard; None where it is none.
        regularized: see `Batch`: of several pieces, the first stands for all.
    """

    replica: int
    examples: slice
    shard: int | None = None
    regularized: int | None = None


def make_pieces(settings: Settings, communicator: Communicator, replicas: int) -> list[Piece]:
    """Return what this rank computes in every step, in order.

    Raises:
        ValueError: the global batch or the number of canonical shards is too small for all replicas.
    """
    batch, rank, ranks = settings.global_batch, communicator.rank, communicator.size
    parts = ranks * replicas
    if batch < parts * settings.micro_batches:
        each = f" x {settings.micro_batches} micro-batches" if settings.micro_batches > 1 else ""
        raise ValueError(
            f"a global batch of {batch} can't be cut for {ranks} ranks x {replicas} replicas{each}: it needs "
            f"at least one example for each of the {parts * settings.micro_batches}"
        )
    if settings.canonical is None:
        owned = [shard(batch, rank * replicas + number, parts) for number in range(replicas)]
        if settings.micro_batches == 1:
            return [Piece(number, own) for number, own in enumerate(owned)]
        return [
            Piece(
                number,
                slice(own.start + part.start, own.start + part.stop),
                regularized=0 if part.start else own.stop - own.start,
            )
            for number, own in enumerate(owned)
            for part in cut(own.stop - own.start, settings.micro_batches)
        ]
    if settings.canonical < parts:
        raise ValueError(
            f"{settings.canonical} canonical shards can't be shared by {ranks} ranks x {replicas} replicas: "
            f"it needs at least one for each of the {parts}. The number of shards is part of the result, so "
            "choose it by the most replicas that you will train on."
        )
    mine = cut(settings.canonical, ranks)[rank]
    return [
        Piece(number, shard(batch, index, settings.canonical), index, 0 if index else batch)
        for number, own in enumerate(cut(mine.stop - mine.start, replicas))
        for index in range(mine.start + own.start, mine.start + own.stop)
    ]


def kernels() -> list[str]:
    """Return which BLAS libraries this process computes with, for which processor, on how many threads.

    On them, beside its shape, depend the bits of a matrix product, and so of a shard's gradient.
    """
    from threadpoolctl import threadpool_info

    found = [lib for lib in threadpool_info() if lib["user_api"] == "blas"]
    names = ("internal_api", "version", "architecture", "num_threads")
    return sorted({" ".join(str(lib.get(name, "?")) for name in names) for lib in found})


class Step:
    """The gradients of a step, from this rank's pieces and all other ranks'.

    Args:
        replicas: of this rank.
        aggregator: of all ranks; a `Canonical` where the pieces are canonical shards.
        optimizer: whose hooks see the gradients before they are aggregated.
        pieces: what `make_pieces` gives.
        clock: the phases "forward", "backward" and "exposed communication" are counted there.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        aggregator: Aggregator,
        optimizer: Optimizer,
        pieces: Sequence[Piece],
        clock: PhaseClock,
    ) -> None:
        self.replicas, self.pieces = list(replicas), list(pieces)
        self.aggregator, self._optimizer, self._clock = aggregator, optimizer, clock
        self._canonical = aggregator if isinstance(aggregator, Canonical) else None
        several = len(self.pieces) > len(self.replicas)
        self._accumulations = [_Accumulation(r) for r in self.replicas] if several else []
        # Where a piece is all of a replica's part, statistics stay as its forward pass leaves them.
        self._statistics = _Statistics(self.replicas) if several or self._canonical else None
        self._looked_for_communication = self._canonical is None
        self._own = Ticket()

    def run(self, batches: Sequence[Batch], own: Ticket) -> tuple[list[Pair], Ticket]:
        """Compute and reduce the gradients. Collective.

        Args:
            batches: one for each piece.
            own: what this rank says beside its examples: whether to stop.

        Returns:
            The global gradients, and this rank's part of the ticket.

        Raises:
            ValueError: batch normalization over ranks in canonical mode.
        """
        self._own = own
        if self._statistics is not None:
            self._statistics.begin()
        if self._canonical is not None:
            pairs = self._canonical.reduce_shards(self._shards(batches, self._canonical), own)
        else:
            stream = combine_replicas(self._streams(batches))
            pairs = self.aggregator.reduce(self._optimizer.before_aggregation(stream), self._own)
        exposed = self.aggregator.exposed_seconds
        self._clock.add("backward", -exposed)
        self._clock.add("exposed communication", exposed)
        return pairs, self._own

    def accept(self) -> None:
        """Bring the models' statistics up to date. Collective in canonical mode."""
        if self._statistics is None:
            for replica in self.replicas:
                replica.run_update_ops()
        else:
            self._statistics.accept(self._canonical)

    def reject(self) -> None:
        """Leave the statistics as they were before the step."""
        if self._statistics is None:
            for replica in self.replicas:
                replica.restore_statistics()
        else:
            self._statistics.reject()

    def _streams(self, batches: Sequence[Batch]) -> list[Iterable[Pair]]:
        """Run all pieces; the first replica's last one is left to the reduction, which it overlaps."""
        streams: list[Iterable[Pair]] = []
        for number in reversed(range(len(self.replicas))):
            own = [b for b, piece in zip(batches, self.pieces, strict=True) if piece.replica == number]
            for batch in own[:-1]:
                self._accumulations[number].add(self._gradients(number, batch))
            stream = self._gradients(number, own[-1])
            streams[:0] = [stream if number == 0 else list(stream)]
            if len(own) > 1:
                streams[1:1] = [self._accumulations[number].take()]
        return streams

    def _shards(
        self, batches: Sequence[Batch], canonical: Canonical
    ) -> Iterator[tuple[int, Iterable[Pair], Ticket]]:
        first = self.replicas[0]
        for number, piece, batch in zip(canonical.own_shards, self.pieces, batches, strict=True):
            before = self._own
            self._own = Ticket()
            stream = self._gradients(piece.replica, batch)
            part, self._own = self._own, before + self._own
            if piece.replica != 0:
                stream = _moved(stream, first.variables)
            yield number, self._optimizer.before_aggregation(stream), part

    def _gradients(self, number: int, batch: Batch) -> Iterable[Pair]:
        """Run a piece's forward pass, and return its gradients, which a backward pass makes as they go."""
        replica = self.replicas[number]
        self._clock.start("forward")
        tape, loss, part = replica.forward(batch)
        self._own = self._own + part
        if not self._looked_for_communication:
            self._looked_for_communication = True
            _refuse_communication(loss)
        self._clock.start("backward")
        scaling = self._optimizer if isinstance(self._optimizer, LossScaleOptimizer) else None
        stream = replica.gradients(tape, loss, 1.0 if scaling is None else scaling.loss_scale)
        del tape, loss  # or a generator that is not done yet would keep the activations
        return stream if self._statistics is None else self._noted(stream, number, len(batch.labels))

    def _noted(self, stream: Iterable[Pair], number: int, examples: int) -> Iterator[Pair]:
        """Pass gradients on, and after the last take note of what the piece made of the statistics."""
        yield from stream
        assert self._statistics is not None
        self._statistics.note(number, examples)


def _moved(stream: Iterable[Pair], variables: Sequence[Variable]) -> Iterator[Pair]:
    """Give another replica's gradients to the first replica's variables of the same names."""
    known = {variable.name: variable for variable in variables}
    for gradient, variable in stream:
        own = known[variable.name]
        if isinstance(gradient, IndexedSlices):
            place = own.device.asarray
            gradient = IndexedSlices(place(gradient.values), place(gradient.indices), gradient.dense_shape)
        elif gradient is not None:
            gradient = own.device.asarray(gradient)
        yield gradient, own


def _refuse_communication(loss: Tensor) -> None:
    """Raise where a loss depends on an operation over ranks: shards are not computed in step.

    Every rank has run one shard's forward pass when it looks, so all raise and none waits for another.
    """
    pending = [loss.node]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.context is not None and node.context.options.get("communicator") is not None:
            raise ValueError(
                f"the model communicates in its forward pass ({node.primitive.name} was given a "
                "communicator), but in canonical mode a rank computes one shard after the other, other ranks "
                "other numbers of them. Make the layer without a communicator: each shard is normalized by "
                "itself, on any number of ranks alike; fewer shards give each more examples."
            )
        pending += [operand.node for operand in node.inputs if isinstance(operand, Tensor)]


class _Accumulation:
    """The sum of a replica's gradients over its micro-batches but the last, beside its arena."""

    def __init__(self, replica: Replica) -> None:
        self._device = replica.device
        self._variables = replica.variables
        self._sums: dict[int, Array] = {}
        self._whole: set[int] = set()
        self._rows: dict[int, list[IndexedSlices]] = {}

    def add(self, pairs: Iterable[Pair]) -> None:
        """Take in a micro-batch's gradients, each as it comes."""
        for gradient, variable in pairs:
            key = id(variable)
            if isinstance(gradient, IndexedSlices):
                self._rows.setdefault(key, []).append(gradient)
            elif gradient is not None:
                with self._device.activate():
                    if key not in self._sums:
                        self._sums[key] = namespace(gradient).empty_like(gradient)
                    if key in self._whole:
                        self._sums[key] += gradient
                    else:
                        self._sums[key][...] = gradient
                self._whole.add(key)

    def take(self) -> list[Pair]:
        """Return the sums, and begin anew; their memory is used again after the step."""
        found: list[Pair] = []
        for variable in self._variables:
            key = id(variable)
            gradient: Any = self._sums[key] if key in self._whole else None
            if key in self._rows:
                rows = concatenated(self._rows[key])
                if gradient is None:
                    gradient = rows
                else:
                    gradient += rows.to_dense()
            found.append((gradient, variable))
        self._whole, self._rows = set(), {}
        return found


class _Statistics:
    """The models' statistics where a step has several pieces: each starts from what the step before left.

    A step's new value is the mean over the pieces, weighted by their examples, of what each made of it: what
    moving averages of the whole batch would be. Of statistics that are no floats, what the first piece made.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._before: list[list[Array]] = []
        self._made: list[tuple[Array, int]] = []

    def begin(self) -> None:
        """Keep the values at the beginning of a step."""
        self._before = [[v.value.copy() for v in replica.statistics] for replica in self._replicas]
        self._made = []

    def note(self, number: int, examples: int) -> None:
        """Keep what a piece of so many examples made of a replica's statistics, and set them back."""
        replica = self._replicas[number]
        replica.run_update_ops()
        if replica.statistics:
            with replica.device.activate():
                xp = namespace(replica.statistics[0].value)
                made = xp.concatenate([v.value.reshape(-1).astype(np.float64) for v in replica.statistics])
            self._made.append((self._replicas[0].device.asarray(made), examples))
        self._restore(number)

    def accept(self, canonical: Canonical | None) -> None:
        """Set the statistics to what the step made of them. Collective in canonical mode."""
        if not self._made:
            return
        floats = self._floats(self._replicas[0])
        xp = namespace(floats)
        parts: list[Array] = []
        for index, (made, examples) in enumerate(self._made):
            is_first = index == 0 if canonical is None else canonical.own_shards[index] == 0
            # What isn't a float is the first piece's: zeros everywhere else.
            part = xp.where(floats, made * examples, made if is_first else 0.0)
            parts.append(xp.concatenate([part, xp.full(1, float(examples))]))
        total = sum(parts[1:], start=parts[0]) if canonical is None else canonical.sum_over_shards(parts)
        values = xp.where(floats, total[:-1] / total[-1], total[:-1])
        for replica in self._replicas:
            start = 0
            for variable in replica.statistics:
                value = values[start : start + variable.size].reshape(variable.shape)
                variable.assign(replica.device.asarray(value, variable.dtype))
                start += variable.size

    def reject(self) -> None:
        """Set the statistics back to what they were."""
        for number in range(len(self._replicas)):
            self._restore(number)

    def _floats(self, replica: Replica) -> Array:
        mask = np.concatenate([np.full(v.size, v.dtype.kind in "fV") for v in replica.statistics])
        return replica.device.asarray(mask)

    def _restore(self, number: int) -> None:
        replica = self._replicas[number]
        with replica.device.activate():
            for variable, before in zip(replica.statistics, self._before[number], strict=True):
                variable.assign(before)
