"""Local SGD: ranks train by themselves and average their variables every so many steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from distopt.aggregators.aggregator import Aggregator, Pair, begin_step
from distopt.aggregators.agreement import Agreement
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.arguments import whole_number
from distopt.aggregators.averaging import average_over_ranks, settle_others
from distopt.aggregators.divide import divide
from distopt.aggregators.ticket import Ticket
from distopt.backend import Array
from distopt.communicators import Communicator
from distopt.variables import IndexedSlices, Variable

__all__ = ["LocalSGD"]


class LocalSGD(Aggregator):
    """Each rank applies its own mean gradient; every `every` steps the ranks average their variables.

    The average weighs each rank by the examples that it has seen since the last one: the sum over ranks of
    (examples x value), divided by all examples. After it all ranks hold the same bits. Between averagings
    `reduce` gives each rank's own gradients, divided by its own examples; `ready` then is the rank's own
    as well: without examples a rank makes no update, and its value counts nothing. Averagings go by the
    number of `reduce` calls, which all ranks make alike, with or without examples.

    Slots (momentum, Adam's moments) and `iterations` stay each rank's own, as in the papers, until `settle`.

    The time of an averaging is spent in `after_apply`, so it is not in `exposed_seconds`, whereas its bytes
    are in `wire_bytes` until the next step.

    Sources: Stich, "Local SGD converges fast and communicates little" (2019); Lin et al., "Don't use large
    mini-batches, use local SGD" (2020), for `start` (post-local SGD). PyTorch's `PostLocalSGDOptimizer`
    is the same with ranks of equal weight.

    Args:
        communicator: over whose ranks.
        every: steps from one averaging to the next, H.
        start: how many steps exchange gradients as usual before that.
        inner: the aggregator of the first `start` steps; `AllReduce(communicator)` when None.
        agree_every_step: reduce the ticket in each step, so that `ticket` has the totals, and an error or
            a wish to stop is known to all at once. False: only in steps that average; `ticket` is
            the rank's own in between (without stop, preempt and error), and has the totals since the last
            averaging there. Ranks then meet only every `every` steps.

    Raises:
        ValueError: `every` below 1 or `start` below 0; `inner` divides the optimizer's state, as `Sharded`.
        TypeError: `every` or `start` is no whole number.
    """

    reduction = "mean"

    def __init__(
        self,
        communicator: Communicator,
        every: int,
        start: int = 0,
        inner: Aggregator | None = None,
        agree_every_step: bool = True,
    ) -> None:
        super().__init__()
        if inner is not None and inner.ownership is not None:
            raise ValueError(
                f"LocalSGD can't begin with {type(inner).__name__}, which divides the optimizer's slots "
                "among the ranks: a rank that trains by itself needs them all. Use AllReduce(communicator)."
            )
        self.communicator = communicator
        self.every = whole_number(every, "LocalSGD's number of steps between averagings, every,", 1)
        self.start = whole_number(start, "LocalSGD's number of steps before the local ones, start,", 0)
        self.inner = AllReduce(communicator) if inner is None else inner
        self.agree_every_step = agree_every_step
        self._agreement = Agreement(communicator, f"LocalSGD(every={every}, start={start})")
        self._calls = 0
        self._is_local = False  # whether the last call was one of the rank by itself
        self._due = False
        self._compared = False
        self._unsent = Ticket()
        # What each rank has done since variables, and since everything, was last alike on all ranks.
        self._examples = 0.0
        self._steps = 0
        self._examples_of_others = 0.0
        self._steps_of_others = 0

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """Return this rank's own mean gradients; the global ones in the first `start` steps.

        Raises:
            ValueError: no number of examples was given, or `after_apply` was not called after the step that
                had to average.
            CommunicatorError: the ranks gave different variables, are at different steps, or one of them
                reported an error.
        """
        if ticket is None:
            raise ValueError(
                "LocalSGD divides by this rank's examples, but their number was not given: pass "
                "examples=len(batch) to minimize or apply_gradients"
            )
        if self._due:
            raise ValueError(
                f"step {self._calls} had to average the variables, but after_apply was not called; let an "
                "optimizer apply the gradients, or call after_apply(variables) after each update"
            )
        self._is_local = self._calls >= self.start
        self._calls += 1
        if not self._is_local:
            reduced = self.inner.reduce(pairs, ticket)
            self.ticket, self.ready = self.inner.ticket, self.inner.ready
            self.exposed_seconds, self.wire_bytes = self.inner.exposed_seconds, self.inner.wire_bytes
            return reduced
        self._due = (self._calls - self.start) % self.every == 0
        # Ordered, because which gradient comes when depends on which a rank has.
        given = sorted(begin_step(self.communicator, pairs), key=lambda pair: pair[1].number)
        examples = ticket.examples  # some is known only when the pairs were pulled
        began = time.perf_counter()
        self._agree(ticket, given)
        self.exposed_seconds, self.wire_bytes = time.perf_counter() - began, 0
        self._examples += examples
        self._examples_of_others += examples
        self._steps += 1
        self._steps_of_others += 1
        self.ready = examples > 0
        if not self.ready:
            return [(None, variable) for _, variable in given]
        return [(_divided(gradient, variable, examples), variable) for gradient, variable in given]

    def _agree(self, ticket: Ticket, given: list[Pair]) -> None:
        """Reduce the ticket, now or with those of the next steps."""
        # Who has which gradient is each rank's own business, so what is compared is the variables.
        variables = [(variable.value, variable) for _, variable in given]
        if not self._compared:
            self._agreement.start(variables)
            self._compared = True
        if not self.agree_every_step:
            own = Ticket(ticket.examples, ticket.loss, ticket.correct, ticket.not_finite, step=ticket.step)
            ticket = self._unsent = self._unsent + ticket
            if not self._due:
                self.ticket = own
                return
            self._unsent = Ticket()
        self.ticket, _ = self._agreement.total(ticket, variables)
        self._agreement.says_nothing_to_do(self.ticket)

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """Average the variables where it is time to. Collective then."""
        if not self._is_local:
            self.inner.after_apply(variables)
            self.wire_bytes = self.inner.wire_bytes
        elif self._due:
            self._average(variables)
            self._due = False

    def _average(self, variables: Sequence[Variable]) -> None:
        self.wire_bytes += average_over_ranks(self.communicator, variables, self._examples)
        self._examples, self._steps = 0.0, 0

    def settle(self, variables: Sequence[Variable], others: Sequence[Variable] = ()) -> None:
        """Average the variables, and all else that ranks have updated by themselves. Collective.

        Arrays are averaged as the variables are, with the examples since the last `settle`. Counts and
        numbers (`iterations`, powers of betas, a loss scale) belong together: they become those of the rank
        with most examples, the first one of several.

        A rank that never had an example has no slots yet. Those of the others are averaged over the ranks
        that have them; the rank without makes them anew at its first update, from their initial values, until
        the next `settle`; `iterations` too, unless something has read it there. So that it gets the averages,
        and rank 0 has them for a checkpoint, build the optimizer before: `optimizer.build(variables)` of
        `keras_new`, or examples in the first step.

        Args:
            variables: those that are trained.
            others: slots and moving averages, such as `optimizer.weights`; of what a rank lacks see above.

        Raises:
            CommunicatorError: arrays of one name differ in shape or dtype between ranks.
        """
        if self._steps:
            self._average(variables)
        self._due = False
        if self._steps_of_others:
            settle_others(self.communicator, others, self._examples_of_others, variables[0].device)
            self._examples_of_others, self._steps_of_others = 0.0, 0

    def state(self) -> dict[str, Array]:
        """Return the number of steps done.

        Raises:
            ValueError: the ranks' variables differ, so that no checkpoint can hold them.
        """
        if self._steps:
            raise ValueError(
                f"the ranks have trained {self._steps} step(s) by themselves since they last averaged, so "
                "their variables differ; call settle(variables, optimizer.weights) before a checkpoint"
            )
        kept = {f"inner/{name}": array for name, array in self.inner.state().items()}
        return {"calls": np.array(self._calls, np.int64), **kept}

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """Go on counting where `state` was; a state without anything starts anew."""
        left = dict(state)
        calls = left.pop("calls", np.int64(0))
        inner = {name.removeprefix("inner/"): array for name, array in left.items()}
        self.inner.load_state(inner, variables)
        self._calls = int(calls)
        self._due = False


def _divided(gradient: Any, variable: Variable, examples: float) -> Any:
    if gradient is None:
        return None
    if isinstance(gradient, IndexedSlices):
        values = gradient.values.copy()
        divide(values, examples)
        return IndexedSlices(values, gradient.indices, gradient.dense_shape)
    with variable.device.activate():
        if gradient is variable.gradient:
            divide(gradient, examples)  # the arena is ours to change
            return gradient
        dense = variable.device.asarray(gradient, variable.dtype).copy()
        divide(dense, examples)
        return dense
