"""`GradientTape`: records what is computed inside its `with` block, with TensorFlow's semantics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from distopt.tape import jacobians
from distopt.tape.aggregation import checked_method
from distopt.tape.backward import Walk, backward
from distopt.tape.gates import GATE_OP, checked_gate
from distopt.tape.nested import leaves, rebuilt
from distopt.tape.recording import Recording
from distopt.tape.unconnected import UnconnectedGradients, or_zeros, wants_zeros
from distopt.variables import IndexedSlices, Operand, Variable

__all__ = ["GradientTape"]


class GradientTape(Recording):
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
            Arrays, IndexedSlices or None, nested like `sources`; None for sources of integers and for
            those that this tape doesn't watch. Tensors where an open tape watches what they depend on.

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
        own_memory(found)
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
        that view. Variables that the target does not depend on, or that the tape doesn't watch, come last,
        with None. Gradients are arrays
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
        _check(wanted)
        self._take()
        followed = [source for source in wanted if self.differentiates_by(source)]
        found = jacobians.jacobian(target, followed, Walk(self))
        values = (
            None if x is None else jacobians.or_zeros(found.get(id(x)), target, x, zero)
            for x in leaves(sources)
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
        _check([source])
        jacobians.check_batch(target, source)
        self._take()
        watched = self.differentiates_by(source)
        found = jacobians.batch_jacobian(target, source, Walk(self)) if watched else None
        return jacobians.or_zeros(found, target, source, zero, batch=True)

    def _walk(self, **how: Any) -> Walk:
        checked_method(how["aggregation_method"])  # an unknown method is an error even where nothing is added
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
        _check(sources)
        upstreams = _upstreams(targets, output_gradients)
        self._take()
        followed = [source for source in sources if self.differentiates_by(source)]
        others = {id(source): source for source in sources if not self.differentiates_by(source)}
        unconnected = ((None, source) for source in others.values())
        return itertools.chain(backward(targets, followed, upstreams, walk), unconnected)


def _check(sources: list[Any]) -> None:
    for source in sources:
        if not isinstance(source, Operand):
            raise TypeError(
                f"gradients are taken by Variables and Tensors, got {type(source).__name__}; "
                "wrap an array in Tensor, and watch it before it is used"
            )


def _upstreams(targets: list[Any], given: Any) -> list[Any] | None:
    if given is None:
        return None
    upstreams = list(leaves(given))
    if len(upstreams) != len(targets):
        raise ValueError(
            f"there are {len(targets)} targets, so as many output_gradients are expected, "
            f"got {len(upstreams)}"
        )
    return upstreams


def own_memory(found: dict[int, Any]) -> None:
    """Copy gradients that share memory with another one, or can't be written to.

    An addition passes its upstream on to both inputs, a sum spreads one number over all elements; who
    changes one gradient must not change another.
    """
    seen: set[int] = set()
    for key, gradient in found.items():
        if gradient is None or isinstance(gradient, Operand | IndexedSlices):
            continue
        root = id(gradient if getattr(gradient, "base", None) is None else gradient.base)
        if root in seen or not getattr(gradient.flags, "writeable", True):
            found[key] = gradient.copy()
        seen.add(root)
