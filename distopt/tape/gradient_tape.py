"""`GradientTape`: records what is computed inside its `with` block, with TensorFlow's semantics."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from distopt.tape import jacobians
from distopt.tape.aggregation import total_kind
from distopt.tape.backward import Walk, backward
from distopt.tape.gates import GATE_OP, checked_gate
from distopt.tape.nested import leaves, rebuilt
from distopt.tape.record import Node, Tensor, active, next_sequence
from distopt.tape.unconnected import UnconnectedGradients, or_zeros, wants_zeros
from distopt.variables import Operand, Variable

__all__ = ["GradientTape"]


class GradientTape:
    """Records what is computed inside its `with` block, for differentiation.

    Gradients are arrays or IndexedSlices. While another tape is open that watches what a gradient depends
    on, the gradient is a Tensor recorded there, so that it can be differentiated in its turn (slices hold
    such a Tensor as their `values`):

        with GradientTape() as outer:
            with GradientTape() as inner:
                y = x**3
            dy = inner.gradient(y, x)
        d2y = outer.gradient(dy, x)

    The same goes for a persistent tape that is asked inside its own block. That costs time and memory:
    ask outside the block, or inside `stop_recording()`, where second derivatives aren't wanted.

    Args:
        persistent: allow more than one call of `gradient` or `gradients`; keeps the record in memory.
        watch_accessed_variables: watch every trainable `Variable` of a floating dtype that is used.
    """

    def __init__(self, persistent: bool = False, watch_accessed_variables: bool = True) -> None:
        self._persistent = persistent
        self._watch_variables = watch_accessed_variables
        self._watched: dict[int, Any] = {}
        self._accessed: dict[int, Variable] = {}
        self._used = False
        self._since = 0

    def __enter__(self) -> GradientTape:
        """Begin to record. A tape that is not persistent and was used begins anew.

        Raises:
            ValueError: it is recording already.
        """
        if self in active.tapes:
            raise ValueError(
                "Tape is still recording, This can happen if you try to re-enter an already-active tape."
            )
        if self._used and not self._persistent:
            self._forget()
        active.tapes.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self in active.tapes:
            active.tapes.remove(self)

    def watch(self, tensor: Any) -> None:
        """Watch a tensor, a variable that isn't trainable, or a nested list, tuple or dict of them.

        What has no floating dtype is accepted, and gets no gradient.

        Raises:
            TypeError: it is neither (a NumPy array has no identity to follow: wrap it in `Tensor`).
        """
        for leaf in leaves(tensor):
            if not isinstance(leaf, Operand):
                raise TypeError(f"a tape watches Tensors and Variables, got {type(leaf).__name__}")
            self._watched[id(leaf)] = leaf

    def watched_variables(self) -> tuple[Variable, ...]:
        """Return the variables that were used or watched, in the order of their first use."""
        explicit = {i: v for i, v in self._watched.items() if isinstance(v, Variable)}
        return tuple((self._accessed | explicit).values())

    def watches(self, operand: Any) -> bool:
        """Tell whether a call on `operand` is to be recorded."""
        if isinstance(operand, Variable):
            if operand.dtype.kind not in "fV":
                return False
            if self._watch_variables and operand.trainable:
                self._accessed.setdefault(id(operand), operand)
                return True
            return id(operand) in self._watched
        if isinstance(operand, Tensor):
            recorded = operand.node is not None and self.holds(operand.node)
            return recorded or id(operand) in self._watched
        return False

    def holds(self, node: Node) -> bool:
        """Tell whether a call was recorded here since the last `reset`."""
        return self in node.tapes and node.sequence >= self._since

    @contextlib.contextmanager
    def stop_recording(self) -> Generator[None]:
        """Return a context manager in which this tape doesn't record.

        Inside, `with tape:` records again for its own block.

        Raises:
            RuntimeError: on entering: the tape isn't recording.
        """
        if self not in active.tapes:
            raise RuntimeError(
                "Trying to stop recording a tape which is not recording. Its block has not begun, is over, "
                "or gradient() ended it (GradientTape(persistent=True) records on)"
            )
        place = active.tapes.index(self)
        active.tapes.remove(self)
        try:
            yield
        finally:
            if self not in active.tapes:
                active.tapes.insert(place, self)

    def reset(self) -> None:
        """Forget everything recorded and watched so far, inside the tape's block.

        Raises:
            ValueError: the tape isn't recording.
        """
        if self not in active.tapes:
            raise ValueError("Tape is not recording. Call reset() inside the tape's `with` block")
        self._forget()

    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        unconnected_gradients: Any = UnconnectedGradients.NONE,
        aggregation_method: int | None = None,
    ) -> Any:
        """Return the gradient of `target` (summed, when several or not scalar) by each source.

        Args:
            target: a Tensor, or a nested list, tuple or dict of them. Of IndexedSlices the values count;
                integers and plain arrays are constants.
            sources: a Variable or watched Tensor, or a nested list, tuple or dict of them; None is left
                as it is.
            output_gradients: upstream gradient for each target, nested likewise; ones for None.
            unconnected_gradients: `UnconnectedGradients` or its "none" and "zero": what to give for a source
                that the target does not depend on.
            aggregation_method: how contributions of several paths are added; see `AggregationMethod`.

        Returns:
            Arrays, IndexedSlices or None, nested like `sources`; None for sources of integers. Tensors
            where an open tape watches what they depend on.

        Raises:
            RuntimeError: second call on a tape that is not persistent.
            ValueError: unknown `unconnected_gradients` or `aggregation_method`, or lengths that differ.
            TypeError: a target is None, or a source is neither Variable nor Tensor.
        """
        zero = wants_zeros(unconnected_gradients)
        wanted = [leaf for leaf in leaves(sources) if leaf is not None]
        walk = self._walk(aggregation_method=aggregation_method)
        stream = self._start(target, wanted, output_gradients, walk)
        found = {id(source): gradient for gradient, source in stream}
        values = (None if x is None else or_zeros(found[id(x)], x, zero) for x in leaves(sources))
        return rebuilt(sources, values)

    def gradients(
        self,
        target: Any,
        variables: Iterable[Variable],
        output_gradients: Any = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: int | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield `(gradient, variable)` at the moment the gradient is final; runs backward on demand.

        The gradient of a variable in an arena is written into the arena (`variable.gradient`), and is
        that view. Variables that the target does not depend on come last, with None. Gradients are arrays
        or IndexedSlices, also while another tape is open; use `gradient` for second derivatives.

        Args:
            target: as for `gradient`.
            variables: by what to differentiate; one that is given twice is yielded once.
            output_gradients: as for `gradient`.
            gate_gradients: `GATE_NONE`: each at the moment it is final. `GATE_OP`: those of one primitive
                together. `GATE_GRAPH`: none before all are final. The values are the same.
            aggregation_method: how contributions of several paths are added; see `AggregationMethod`.

        Raises:
            RuntimeError: second call on a tape that is not persistent.
            ValueError: unknown `gate_gradients` or `aggregation_method`, or lengths that differ.
            TypeError: a target is None, or one of `variables` is neither Variable nor Tensor.
        """
        walk = self._walk(
            into_arena=True, gate=checked_gate(gate_gradients), aggregation_method=aggregation_method
        )
        return self._start(target, list(variables), output_gradients, walk)

    def jacobian(
        self,
        target: Any,
        sources: Any,
        unconnected_gradients: Any = UnconnectedGradients.NONE,
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
    ) -> Any:
        """Return the derivative of every element of `target` by every element of each source.

        Args:
            target: a Tensor.
            sources: as for `gradient`.
            unconnected_gradients: as for `gradient`.
            parallel_iterations: for code written for TensorFlow; rows are computed one by one here.
            experimental_use_pfor: for code written for TensorFlow; likewise.

        Returns:
            Arrays of shape `target.shape + source.shape`, nested like `sources`.

        Raises:
            RuntimeError: second call on a tape that is not persistent.
            TypeError: the target is no Tensor of a floating dtype.

        Cost: one backward pass for each element of `target`.
        """
        zero = wants_zeros(unconnected_gradients)
        wanted = [leaf for leaf in leaves(sources) if leaf is not None]
        self._check(wanted)
        self._close()
        found = jacobians.jacobian(target, wanted, Walk(self))
        values = (
            None if x is None else jacobians.or_zeros(found[id(x)], target, x, zero) for x in leaves(sources)
        )
        return rebuilt(sources, values)

    def batch_jacobian(
        self,
        target: Any,
        source: Any,
        unconnected_gradients: Any = UnconnectedGradients.NONE,
        parallel_iterations: int | None = None,
        experimental_use_pfor: bool = True,
    ) -> Any:
        """Return, for every example, the derivative of its part of `target` by its part of `source`.

        Row `i` of `target` [b, ...] must depend on row `i` of `source` [b, ...] alone; what it owes to other
        rows is summed in without notice.

        Args:
            target: a Tensor [b, ...].
            source: a Variable or watched Tensor [b, ...].
            unconnected_gradients: as for `gradient`.
            parallel_iterations: for code written for TensorFlow; see `jacobian`.
            experimental_use_pfor: for code written for TensorFlow; likewise.

        Returns:
            An array of shape `target.shape + source.shape[1:]`.

        Raises:
            RuntimeError: second call on a tape that is not persistent.
            TypeError: the target is no Tensor of a floating dtype.
            ValueError: the first axes differ.

        Cost: one backward pass for each element that `target` has per example.
        """
        zero = wants_zeros(unconnected_gradients)
        self._check([source])
        jacobians.check_batch(target, source)
        self._close()
        found = jacobians.batch_jacobian(target, source, Walk(self))
        return jacobians.or_zeros(found, target, source, zero, batch=True)

    def _walk(self, **how: Any) -> Walk:
        total_kind(how["aggregation_method"])  # an unknown method is an error even where nothing is added
        return Walk(self, release=not self._persistent, **how)

    def _start(
        self, target: Any, sources: list[Any], output_gradients: Any, walk: Walk
    ) -> Iterator[tuple[Any, Any]]:
        targets = list(leaves(target))
        for leaf in targets:
            if leaf is None:
                raise TypeError(
                    "a target is None, perhaps an unconnected gradient; "
                    'ask for it with unconnected_gradients="zero", or leave it out'
                )
        self._check(sources)
        upstreams = _upstreams(targets, output_gradients)
        self._close()
        return backward(targets, sources, upstreams, walk)

    def _check(self, sources: list[Any]) -> None:
        for source in sources:
            if not isinstance(source, Operand):
                raise TypeError(
                    f"gradients are taken by Variables and Tensors, got {type(source).__name__}; "
                    "wrap an array in Tensor, and watch it before it is used"
                )
        if self._used and not self._persistent:
            raise RuntimeError(
                "A non-persistent GradientTape can only be used to compute one set of gradients (or "
                "jacobians); make it with GradientTape(persistent=True)"
            )

    def _close(self) -> None:
        if self in active.tapes and not self._persistent:
            active.tapes.remove(self)  # what follows inside the block can't be asked of it any more
        self._used = True

    def _forget(self) -> None:
        self._watched.clear()
        self._accessed.clear()
        self._used = False
        self._since = next_sequence()


def _upstreams(targets: list[Any], given: Any) -> list[Any] | None:
    if given is None:
        return None
    upstreams = [leaf for leaf in leaves(given)]
    if len(upstreams) != len(targets):
        raise ValueError(
            f"there are {len(targets)} targets, so as many output_gradients are expected, "
            f"got {len(upstreams)}"
        )
    return upstreams
