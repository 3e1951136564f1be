"""TrainOp: the training step that `optimize_loss` makes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt.aggregators import Aggregator, GradientAggregator, Pair, Ticket
from distopt.backend import Array
from distopt.optimizers.learning_rate import LearningRate
from distopt.optimizers.loss_scale import LossScaleOptimizer
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.recording import check_pairs, with_gradient
from distopt.scopes.dependencies import control_dependencies, run_update_ops
from distopt.scopes.graph import Graph, trainable_variables
from distopt.scopes.summaries import keep_summary
from distopt.scopes.variable_scopes import VariableScope, variable_scope
from distopt.tape import GradientTape, Tensor
from distopt.transforms import Chain, global_norm
from distopt.variables import Operand, Variable

__all__ = ["Steps", "SummaryTags", "TrainOp"]


@dataclass(frozen=True)
class SummaryTags:
    """Under which tags a training step keeps its summaries; None for those that it doesn't keep.

    Attributes:
        prefix: name scope of the training step, with a "/" at its end.
        learning_rate: of the decayed rate.
        gradient_norm: of the global norm before the clip.
        loss: of the loss.
        gradients: whether a histogram is kept of each gradient.
        gradient_norms: whether the norm of each gradient is kept.
        clipped_gradient_norm: of the global norm after the clip.
    """

    prefix: str
    learning_rate: str | None
    gradient_norm: str | None
    loss: str | None
    gradients: bool
    gradient_norms: bool
    clipped_gradient_norm: str | None


@dataclass(frozen=True)
class Steps:
    """What every step of a `TrainOp` is made of; see `optimize_loss` for what the parts are.

    Attributes:
        global_step: counts steps; None where there is none.
        counts: whether a step counts it.
        learning_rate: the variable that was made for it, if one was.
        rate: the present learning rate.
        update_ops: what to run in each step; None: the collection UPDATE_OPS.
        variables: what to train; None: the trainable variables.
        examples: how many examples a loss is a sum over, or what tells it.
        aggregator: combines gradients; None: the optimizer's own.
        before_clip: noise and multipliers.
        clip: pairs -> pairs, or None.
    """

    global_step: Any
    counts: bool
    learning_rate: Variable | None
    rate: LearningRate | None
    update_ops: list[Any] | None
    variables: list[Variable] | None
    examples: float | Callable[..., float] | None
    aggregator: GradientAggregator | None
    before_clip: Chain
    clip: Callable[[list[Pair]], Iterable[Pair]] | None


class TrainOp:
    """A training step: call it with the arguments of the loss, get the loss. Made by `optimize_loss`.

    Attributes:
        name: full name.
        optimizer: what updates the variables.
        global_step: counts the steps; None where there is none.
        learning_rate: the variable that was made from a number, to be assigned to; None where none was.
    """

    def __init__(
        self,
        loss: Any,
        optimizer: Optimizer,
        steps: Steps,
        tags: SummaryTags,
        scope: VariableScope,
        graph: Graph,
    ) -> None:
        self.name = f"{scope.name}/train"
        self.optimizer = optimizer
        self.global_step = steps.global_step
        self.learning_rate = steps.learning_rate
        self._loss = loss
        self._steps = steps
        self._tags = tags
        self._scope = scope
        self._graph = graph
        self._tensor_used = False

    def variables(self) -> list[Variable]:
        """Return what is kept between steps besides model and global step: rate, noise, clip, optimizer."""
        return [*self._own_variables(), *self.optimizer.variables()]

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint needs besides model and global step, as NumPy arrays by name."""
        return {v.name: v.numpy() for v in self._own_variables()} | self.optimizer.state()

    def load_state(self, state: Mapping[str, Array], variables: Iterable[Variable]) -> None:
        """Restore what `state` gave.

        Args:
            state: the arrays.
            variables: those that the optimizer's slots belong to, found by their names.

        Raises:
            ValueError: an array is missing, has another shape, or belongs to nothing.
        """
        left, own = dict(state), self._own_variables()
        for variable in own:
            saved = left.get(variable.name)
            if saved is None or np.shape(saved) != variable.shape:
                raise ValueError(
                    f"the saved state should have {variable.name!r} of shape {variable.shape}; it has "
                    f"{sorted(left)}. Was it saved from a training step with other arguments?"
                )
        values = [left.pop(variable.name) for variable in own]
        with self._graph.as_default(), variable_scope(self._scope):
            self.optimizer.load_state(left, variables)
        for variable, value in zip(own, values, strict=True):
            variable.assign(value)

    def _own_variables(self) -> list[Variable]:
        made = [] if self.learning_rate is None else [self.learning_rate]
        clip: Any = self._steps.clip
        return [*made, *self._steps.before_clip.variables(), *getattr(clip, "variables", list[Variable])()]

    def __call__(self, *arguments: Any, **named: Any) -> Array:
        """Do one step.

        Args:
            arguments: for the loss.
            named: for the loss.

        Returns:
            The loss before the update, an array of rank 0. With an `Aggregator` the global loss (their sum,
            or with the reduction "mean" that divided by the global number of examples), on the host; else
            this process' loss, on its device, for which the host doesn't wait.

        Raises:
            ValueError: the loss is None or not of rank 0; no variable has a gradient; or the loss makes a
                variable of a name that another training step's loss made one of, without reuse.
            RuntimeError: a loss that was given as a Tensor is used again.
        """
        with self._graph.as_default(), self._opened_step():
            return self._run(arguments, named)

    def _opened_step(self) -> contextlib.AbstractContextManager[Any]:
        if self._graph.open_step is not None or isinstance(self._loss, Tensor):
            # The operations that a Tensor's computation left in UPDATE_OPS would be dropped by a new step.
            return contextlib.nullcontext()
        return self._graph.step()

    def _run(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Array:
        steps, optimizer = self._steps, self.optimizer
        own, before = optimizer.gradient_aggregator, optimizer.step
        aggregator = own if steps.aggregator is None else steps.aggregator
        try:
            optimizer.gradient_aggregator = aggregator
            loss, stream = self._recorded(arguments, named)
            if self._tags.learning_rate is not None and steps.rate is not None:
                keep_summary(self._tags.learning_rate, "scalar", steps.rate())
            optimizer.gradient_aggregator = pipeline = _Pipeline(self, aggregator, loss)
            with variable_scope(self._scope):
                optimizer.apply_gradients(stream, examples=self._examples(arguments, named))
        finally:
            optimizer.gradient_aggregator = own
        if self._tags.loss is not None:
            keep_summary(self._tags.loss, "scalar", pipeline.loss)
        if steps.counts and optimizer.step != before:  # a loss scale may have skipped the step
            steps.global_step.assign_add(1)
        return pipeline.loss

    def run_update_ops(self) -> None:
        """Run the update operations, which may change what the loss has read: after the backward pass."""
        if self._steps.update_ops is None:
            run_update_ops()
        else:
            with control_dependencies(self._steps.update_ops):
                pass

    def _examples(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> float | None:
        given = self._steps.examples
        return given(*arguments, **named) if callable(given) else given

    def _recorded(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, Iterable[Pair]]:
        """Compute the loss; return it and the stream of its gradients."""
        steps = self._steps
        given: Any = self._loss
        found: list[Any] = [given]
        if isinstance(given, Tensor):
            if self._tensor_used:
                raise RuntimeError(
                    "the loss of this training step is a Tensor, which was computed once and served its one "
                    "step. To do several, pass a callable that computes it: optimize_loss(lambda x: ..., ...)"
                )
            self._tensor_used = True
            tape: Any = given.node.tapes[0] if given.node is not None else GradientTape()
        else:
            tape = GradientTape()

        def computed() -> Any:
            function: Any = given
            with self._graph.part(function, self.name):
                found[0] = _checked(function(*arguments, **named))
            return found[0]

        def used() -> list[Variable]:
            seen = [v for v in tape.watched_variables() if v.trainable]
            return list({id(v): v for v in [*trainable_variables(), *seen]}.values())

        variables = used if steps.variables is None else steps.variables
        # The step's own front half, with its hooks.
        stream = self.optimizer._streamed(  # pyright: ignore[reportPrivateUsage]
            given if isinstance(given, Tensor) else computed,
            variables,
            None,
            tape,
            Optimizer.GATE_OP,
            None,
        )
        return found[0], stream

    def finished(self, pairs: list[Pair]) -> list[Pair]:
        """Return global gradients with noise, multiplied and clipped; keep their summaries."""
        # Backward's order depends on which gradients a rank has; noise goes by places.
        pairs = sorted(check_pairs(pairs), key=lambda pair: pair[1].number)
        if isinstance(self.optimizer, LossScaleOptimizer) and not self.optimizer.accepts(pairs):
            return pairs  # the step will be skipped; what is infinite must not enter moving averages
        tags, clip = self._tags, self._steps.clip
        pairs = self._steps.before_clip(pairs)
        if tags.gradient_norm is not None:
            keep_summary(tags.gradient_norm, "scalar", global_norm(pairs))
        if clip is not None:
            pairs = Chain([clip])(pairs)
        for gradient, variable in pairs:
            if gradient is not None and tags.gradients:
                keep_summary(f"{tags.prefix}gradients/{_part(variable)}", "histogram", gradient)
            if gradient is not None and tags.gradient_norms:
                norm = global_norm([(gradient, variable)])
                keep_summary(f"{tags.prefix}gradient_norm/{_part(variable)}", "scalar", norm)
        if tags.clipped_gradient_norm is not None:
            keep_summary(tags.clipped_gradient_norm, "scalar", global_norm(pairs))
        return pairs

    def __repr__(self) -> str:
        return f"<TrainOp {self.name!r} {self.optimizer.get_name()}>"


class _Pipeline(Aggregator):
    """The aggregator of one step: reduces gradients and loss, then does what `optimize_loss` was asked for.

    It stands where the aggregator does, so that an optimizer's own clips come after.
    """

    def __init__(self, train_op: TrainOp, inner: GradientAggregator | None, loss: Tensor) -> None:
        super().__init__()
        self._train_op = train_op
        self._inner = inner
        self.ownership = inner.ownership if isinstance(inner, Aggregator) else None
        self._own = loss
        # A copy: the value may be that of a variable, which the step changes.
        self.loss: Array = loss.value.copy()

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`."""
        inner = self._inner
        if inner is None:
            reduced = list(pairs)
        elif not isinstance(inner, Aggregator):
            reduced = list(inner(with_gradient(check_pairs(pairs))))
        else:
            averages = getattr(inner, "reduction", "sum") == "mean"
            if ticket is None and not averages:
                ticket = Ticket()
            reduced = inner.reduce(self._noting_loss(pairs, ticket), ticket)
            self.ticket, self.ready = inner.ticket, inner.ready
            # Gradients may be late, or accumulate: the loss is known when they are not ready, or there may
            # be none when they are.
            divisor = self.ticket.examples if averages else 1.0
            if divisor:
                self.loss = np.asarray(self.ticket.loss / divisor, self._own.dtype)
            if not self.ready:
                return reduced
        self._train_op.run_update_ops()
        return self._train_op.finished(reduced)

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """See `Aggregator.after_apply`."""
        if isinstance(self._inner, Aggregator):
            self._inner.after_apply(variables)

    def _noting_loss(self, pairs: Iterable[Pair], ticket: Ticket | None) -> Iterator[Pair]:
        """Pass pairs on; then enter the loss, by when a GPU has all of the backward pass to do."""
        yield from pairs
        if ticket is not None:
            ticket.loss = float(self._own)


def _checked(loss: Any) -> Any:
    if loss is None:
        raise ValueError("None values not supported: the function that computes the loss returned None")
    if isinstance(loss, Operand) and loss.value.ndim:
        raise ValueError(
            f"Shape must be rank 0 but is rank {loss.value.ndim}: the loss has shape {loss.value.shape}. "
            "Sum it over the examples."
        )
    return loss


def _part(variable: Variable) -> str:
    """Return a variable's name in tags, with the number that TensorFlow's names have at their end."""
    return f"{variable.name}_0"
