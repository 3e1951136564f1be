"""Compressed: AllReduce with gradients in fewer bytes, by a codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distopt.aggregators import codecs
from distopt.aggregators.aggregator import Pair
from distopt.aggregators.agreement import Agreement
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.arguments import whole_number
from distopt.aggregators.buckets import BucketReduction
from distopt.aggregators.codecs.codec import Codec
from distopt.aggregators.codecs.error_feedback import Compression, ErrorFeedback, split_again
from distopt.aggregators.codecs.groups import Group, make_group
from distopt.aggregators.codecs.powersgd import PowerSGD, matrix_shape
from distopt.aggregators.divide import divide, put, widened
from distopt.aggregators.ticket import Ticket
from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array, asnumpy, namespace
from distopt.communicators import Communicator, Pending
from distopt.variables import IndexedSlices, Slab, Variable

__all__ = ["Compressed"]


class Compressed(AllReduce):
    """Sums or averages gradients over ranks, encoded by a codec.

    What it promises beside what `AllReduce` does: all ranks get the same bits, since all decode the same
    bytes; encoded numbers are summed in float32, in the order of the ranks, and divided before they are
    encoded again; a gradient that is not finite on one rank is not finite on all.

    Variables are encoded together that end in the same bucket; a variable is never cut. Those outside an
    arena are exchanged one by one. Rows of sparse gradients are sent as they are, and so are small
    variables. The codecs work on float32: gradients of other dtypes are cast to it and back, and float64
    beyond its range becomes infinite.

    `wire_bytes` is what this rank sent to others in the last step for dense gradients: payloads for each
    other rank; 2 (size - 1) / size times the bytes of what is all_reduced; 0 on one rank.

    Args:
        communicator: over whose ranks.
        codec: one of `aggregators.codecs`, or its name, as in "ef-topk:0.01".
        reduction: as for `AllReduce`.
        bucket_bytes: as for `AllReduce`, of the gradients before they are encoded.
        min_elements: smaller variables are sent as they are; biases matter more than their bytes.

    Raises:
        ValueError: as `AllReduce`; no codec has this name; `min_elements` below 0.
        TypeError: as `AllReduce`; `codec` is none.

    Example:
        >>> from distopt.aggregators import Compressed
        >>> from distopt.communicators import LocalCommunicator
        >>> Compressed(LocalCommunicator(), "ef-topk:0.01").codec
        <codec ef-topk:0.01>
    """

    def __init__(
        self,
        communicator: Communicator,
        codec: Compression | str,
        reduction: str = "mean",
        bucket_bytes: int = 4 << 20,
        min_elements: int = 1024,
    ) -> None:
        super().__init__(communicator, reduction, bucket_bytes)
        given: Any = codecs.get(codec) if isinstance(codec, str) else codec
        if not isinstance(given, Codec | PowerSGD | ErrorFeedback):
            raise TypeError(
                f"codec must be one of distopt.aggregators.codecs or its name, such as 'fp16', got {given!r}"
            )
        min_elements = whole_number(min_elements, "Compressed's min_elements (0 encodes everything)", 0)
        self.codec: Compression = given
        self.min_elements = min_elements
        self._inner = given.codec if isinstance(given, ErrorFeedback) else given
        self._keeps = isinstance(given, ErrorFeedback) or isinstance(self._inner, PowerSGD)
        self._agreement = Agreement(
            communicator,
            f"Compressed({given.name}, reduction={reduction!r}, {bucket_bytes} bytes, "
            f"min_elements={min_elements})",
        )
        self._step = 0
        self._groups: dict[tuple[int, int], Group] = {}
        self._kept: dict[str, Array] = {}

    def start(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> Callable[[], list[Pair]]:
        """See `AllReduce.start`."""
        finish = super().start(pairs, ticket)

        def finish_and_settle() -> list[Pair]:
            reduced = finish()
            if self._keeps:
                # All ranks have the same ticket and the same bits, so all keep the same steps.
                applied = not self.ticket.not_finite and self.ready and _all_finite(g for g, _ in reduced)
                dense = {v.name for g, v in reduced if g is not None and not isinstance(g, IndexedSlices)}
                for group in self._groups.values():
                    group.settle(dense if applied else ())
            self._step += 1
            return reduced

        return finish_and_settle

    def _start_bucket(self, slab: Slab, part: slice) -> BucketReduction:
        # Everything up to the end of the part is complete, so variables that end there are, wholly.
        ending = [v for v in slab.variables if part.start < slab.end(v) <= part.stop]
        encoded, plain = self._sorted_out(ending)
        group = self._group((slab.number, part.start), encoded) if encoded else None
        return _Bucket(self, group, [v.gradient for v in encoded], [v.gradient for v in plain])

    def _sum_packed(self, packed: Array, divisor: float | None, variables: Sequence[Variable]) -> None:
        encoded, plain = self._sorted_out(variables)
        views: dict[int, Array] = {}
        start = 0
        for variable in variables:
            views[variable.number] = packed[start : start + variable.size]
            start += variable.size
        _Bucket(self, None, [], [views[v.number] for v in plain]).finish(divisor)
        # One by one: which of them have gradients may change, and what is kept must stay with its variable.
        for variable in encoded:
            group = self._group((-1, variable.number), [variable])
            _Bucket(self, group, [views[variable.number]], []).finish(divisor)

    def _sorted_out(self, variables: Sequence[Variable]) -> tuple[list[Variable], list[Variable]]:
        """Return the variables that are encoded, and those that are sent as they are; none that is empty."""
        encoded: list[Variable] = []
        plain: list[Variable] = []
        for variable in variables:
            worth = variable.size >= self.min_elements and (
                not isinstance(self._inner, PowerSGD) or self._inner.saves(variable.shape)
            )
            if variable.size:
                (encoded if worth else plain).append(variable)
        return encoded, plain

    def _group(self, key: tuple[int, int], variables: Sequence[Variable]) -> Group:
        if key not in self._groups:
            members = {v.name for group in self._groups.values() for v in group.variables}
            doubled = [v.name for v in variables if v.name in members]
            if doubled and self._keeps:
                raise ValueError(
                    f"two variables are named {doubled[0]!r}; what {self.codec.name} keeps between "
                    "steps goes by name, so give each its own"
                )
            self._groups[key] = make_group(self.communicator, self.codec, variables, self._kept)
        return self._groups[key]

    @property
    def step(self) -> int:
        """How many steps were reduced, those before a checkpoint included."""
        return self._step

    def state(self) -> dict[str, Array]:
        """Return residuals of all ranks, and what else the codec needs to go on, by variable. Collective."""
        found = dict(self._kept)
        for group in self._groups.values():
            found.update(group.state())
        if self._inner.random:
            found["step"] = np.array(self._step)
        return found

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """Restore what `state` gave; residuals are divided anew among another number of ranks.

        Args:
            state: the same on every rank; none at all starts without residuals.
            variables: all that will be given to `reduce`.

        Raises:
            ValueError: it is the state of another codec or model.
        """
        found = dict(state)
        step = found.pop("step", None)
        members = {variable.name: variable for variable in variables}
        for key, array in found.items():
            self._check_kept(key, array, members)
        ranks = self.communicator.size
        self._kept = {
            key: split_again(asnumpy(array), ranks) if key.startswith("first:") else asnumpy(array)
            for key, array in found.items()
        }
        self._groups = {}
        self._step = 0 if step is None else int(step)

    def _check_kept(self, key: str, array: Array, members: Mapping[str, Variable]) -> None:
        kind, _, name = key.partition(":")
        feedback, inner = isinstance(self.codec, ErrorFeedback), self._inner
        kinds = {
            "first": feedback,
            "second": feedback and isinstance(inner, Codec) and inner.exchange == "slices",
            "q": isinstance(inner, PowerSGD),
        }
        if not kinds.get(kind):
            raise ValueError(
                f"the checkpoint holds {key!r} of an aggregator, for which {self.codec.name} has no "
                "use; go on with the codec it was written with"
            )
        variable = members.get(name)
        if variable is None:
            raise ValueError(f"the checkpoint holds {key!r}, but the model has no variable {name!r}")
        expected = (len(array) if array.ndim else 0, variable.size)
        if kind == "second":
            expected = (variable.size,)
        elif isinstance(inner, PowerSGD) and kind == "q":
            expected = (inner.rank, matrix_shape(variable.shape)[1])
        if array.shape != expected:
            raise ValueError(
                f"the checkpoint's {key!r} has shape {array.shape}, but the codec {self.codec.name} needs "
                f"{expected}; go on with the codec and the model it was written with"
            )


class _Bucket:
    """The reduction of a bucket: some variables encoded, the others packed and all_reduced."""

    def __init__(
        self, aggregator: Compressed, group: Group | None, encoded: list[Any], plain: list[Any]
    ) -> None:
        self._aggregator, self._group, self._plain = aggregator, group, plain
        self._pending: Pending | None = None
        if plain:
            xp = namespace(*plain)
            packed = widened(xp.concatenate([gradient.reshape(-1) for gradient in plain]))
            aggregator.wire_bytes += sent_by_all_reduce(packed.nbytes, aggregator.communicator.size)
            self._pending = aggregator.communicator.all_reduce(packed)
        if group is not None:
            group.start(encoded, aggregator.step)

    def finish(self, divisor: float | None) -> None:
        """See `BucketReduction.finish`."""
        if self._pending is not None:
            packed = self._pending.wait()
            divide(packed, divisor)
            start = 0
            for gradient in self._plain:
                put(packed[start : start + gradient.size].reshape(gradient.shape), gradient, copied=True)
                start += gradient.size
        if self._group is not None:
            self._group.finish(divisor)
            self._aggregator.wire_bytes += self._group.sent


def _all_finite(gradients: Iterable[Any]) -> bool:
    """Say whether all gradients are finite; None is."""
    for gradient in gradients:
        values = gradient.values if isinstance(gradient, IndexedSlices) else gradient
        if values is not None and not bool(namespace(values).isfinite(values).all()):
            return False
    return True
