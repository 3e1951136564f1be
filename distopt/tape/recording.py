"""What a tape records, and when: the half of `GradientTape` that runs before any gradient is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Self

from distopt.tape.nested import leaves
from distopt.tape.record import Node, Tensor, active, next_sequence
from distopt.variables import Operand, Variable

__all__ = ["Recording"]


class Recording:
    """Records what is computed from watched operands inside its `with` block.

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

    def __enter__(self) -> Self:
        """Begin to record. A tape that is not persistent and was used begins anew.

        Raises:
            ValueError: it is recording already.
        """
        if self in active.tapes:
            raise ValueError(
                "Tape is still recording, This can happen if you try to re-enter an already-active tape."
            )
        self._open(len(active.tapes))
        return self

    def __exit__(self, *exception: object) -> None:
        if self in active.tapes:
            active.tapes.remove(self)

    def watch(self, tensor: Any) -> None:
        """Watch a tensor, a variable that isn't trainable, or a nested list, tuple or dict of them.

        What has no floating dtype is accepted, and gets no gradient.

        Raises:
            ValueError: it is neither (a NumPy array has no identity to follow: wrap it in `Tensor`).
        """
        for leaf in leaves(tensor):
            if not isinstance(leaf, Operand):
                raise ValueError(
                    f"Passed in object of type {type(leaf)}, not a Tensor or Variable, which is what a tape "
                    "can watch; wrap an array in Tensor"
                )
            self._watched[id(leaf)] = leaf

    def watched_variables(self) -> tuple[Variable, ...]:
        """Return the variables that were used or watched, in the order of their first use."""
        explicit = {i: v for i, v in self._watched.items() if isinstance(v, Variable)}
        return tuple((self._accessed | explicit).values())

    def watches(self, operand: Any) -> bool:
        """Tell whether a call on `operand` is to be recorded; a variable counts as accessed then."""
        if isinstance(operand, Variable):
            if operand.dtype.kind not in "fV":
                return False
            if self._watch_variables and operand.trainable:
                self._accessed.setdefault(id(operand), operand)
                return True
            return id(operand) in self._watched
        if isinstance(operand, Tensor):
            node = operand.node  # what follows is holds(node), without the call: this runs for every operand
            recorded = node is not None and self in node.tapes and node.sequence >= self._since
            return recorded or id(operand) in self._watched
        return False

    def differentiates_by(self, operand: Operand) -> bool:
        """Tell whether the tape gives gradients by `operand`: it watches it, and its dtype is floating."""
        if operand.value.dtype.kind not in "fV":
            return False
        if isinstance(operand, Variable):
            return (self._watch_variables and operand.trainable) or id(operand) in self._watched
        return self.watches(operand)

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
                self._open(place)

    def reset(self) -> None:
        """Forget everything recorded and watched so far, inside the tape's block.

        Raises:
            ValueError: the tape isn't recording.
        """
        if self not in active.tapes:
            raise ValueError("Tape is not recording. Call reset() inside the tape's `with` block")
        self._forget()

    def _open(self, place: int) -> None:
        if self._used and not self._persistent:
            self._forget()
        active.tapes.insert(place, self)

    def _take(self) -> None:
        """Note that gradients are asked for.

        Raises:
            RuntimeError: they were before, and the tape is not persistent.
        """
        if self._used and not self._persistent:
            raise RuntimeError(
                "A non-persistent GradientTape can only be used to compute one set of gradients (or "
                "jacobians); make it with GradientTape(persistent=True)"
            )
        if self in active.tapes and not self._persistent:
            active.tapes.remove(self)  # what follows inside the block can't be asked of it any more
        self._used = True

    def _forget(self) -> None:
        self._watched.clear()
        self._accessed.clear()
        self._used = False
        self._since = next_sequence()
