"""A replica: one device and its copy of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt import layers, ops, scopes
from distopt.aggregators import Pair, Ticket
from distopt.backend import Array, Device, asnumpy, namespace
from distopt.tape import GradientTape, Tensor
from distopt.variables import Arena, Variable

__all__ = ["Batch", "Replica"]


@dataclass(frozen=True)
class Batch:
    """What one replica gets of a step's global batch.

    Attributes:
        images: float32 [n, height, width, channels], already augmented; n may be 0.
        labels: integers [n].
        step: number of the step, and
        first_example: index of the first example in the global batch: what dropout's choice depends on.
        regularized: how many examples the regularisation losses of variables count for; None: its own. Where
            several batches go through a model in a step, one can stand for all: they are equal.
    """

    images: Array
    labels: Array
    step: int = 0
    first_example: int = 0
    regularized: int | None = None


class Replica:
    """One device, a copy of the model on it, and the arena that holds the copy's values.

    A rank drives one (usual) or several (the CIFAR towers). Initial values depend on `seed` and the
    variables' names only, so every replica starts from the same.

    Args:
        model: images -> logits; creates its variables on the first call. Where it has an argument
            `training`, it is told. What it adds to the collection LOSSES counts once for each example,
            like the regularisation losses: a mean over the examples, or a number that doesn't depend on
            them. What it adds to UPDATE_OPS runs after the forward pass, in order.
        example_shape: (height, width, channels) of the images.
        device: where the copy lives.
        seed: of the initial values.
        allocate: makes the arena's memory where the device is a CPU; see `Arena`.
        agree: called with the trainable variables before they get their memory, which `allocate` may make
            together with other ranks.

    Attributes:
        device: where the copy lives.
        variables: its trainable variables, in the order of their creation.
        statistics: its other variables, like the moving averages of batch normalization.
        arena: their memory.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        example_shape: Sequence[int],
        device: Device,
        seed: int,
        allocate: Callable[[int, np.dtype[Any]], Array] | None = None,
        agree: Callable[[Sequence[Variable]], None] | None = None,
    ) -> None:
        self.device = device
        self._model = model
        self._told_of_training = "training" in inspect.signature(model).parameters
        self._graph = scopes.Graph(seed=seed)
        with self._graph.as_default(), self._graph.step(), device.activate():
            self._run_model(device.zeros((1, *example_shape)), training=False)
            self.variables: list[Variable] = scopes.trainable_variables()
            self.statistics = [v for v in scopes.global_variables() if not v.trainable]
            self._regularization = scopes.get_regularization_losses()
        if agree is not None:
            agree(self.variables)
        self.arena = Arena(self.variables, device, allocate if device.kind == "cpu" else None)
        self._statistics_before: list[Array] = []

    def _run_model(self, images: Array, training: bool) -> Tensor:
        return self._model(images, training=training) if self._told_of_training else self._model(images)

    def logits(self, images: Array) -> Tensor:
        """Return the logits of images outside of training; nothing is recorded."""
        with self._graph.as_default(), self._graph.step(), self.device.activate():
            return self._run_model(self.device.asarray(images), training=False)

    def forward(self, batch: Batch) -> tuple[GradientTape, Tensor, Ticket]:
        """Compute the loss of a batch, recorded on a tape.

        The loss to be differentiated is the sum over the batch's examples of (cross-entropy + losses the
        model collected + regularisation losses): divided by the global batch, after summing over replicas,
        weight decay counts once, however the batch is cut.

        Layer objects update `statistics` on the way; `restore_statistics` takes that back.

        Returns:
            The tape; the loss; this replica's part of the step's ticket, with the cross-entropy alone.
        """
        with self.device.activate():
            self._statistics_before = [variable.value.copy() for variable in self.statistics]
        labels = self.device.asarray(batch.labels)
        step = self._graph.step(batch.step, batch.first_example)
        with self._graph.as_default(), step, self.device.activate(), GradientTape() as tape:
            logits = self._run_model(self.device.asarray(batch.images), training=True)
            cross_entropy = ops.sparse_softmax_cross_entropy(logits, labels=labels)
            loss = cross_entropy
            if len(batch.labels):
                for penalty, examples in self._penalties(batch):
                    loss = loss + penalty * float(examples)
        return tape, loss, self._ticket(cross_entropy, logits, labels)

    def _penalties(self, batch: Batch) -> Iterator[tuple[Tensor, int]]:
        """Yield the model's other losses, and how many examples each counts for."""
        own = len(batch.labels)
        regularized = own if batch.regularized is None else batch.regularized
        for loss in layers.get_losses():
            yield loss, own
        for loss in scopes.get_collection(scopes.GraphKeys.REGULARIZATION_LOSSES):
            if not isinstance(loss, scopes.RegularizationLoss):
                yield loss, own  # the model's own, perhaps of the examples
            elif regularized:
                yield ops.regularization_loss(loss.variable, regularizer=loss.regularizer), regularized

    def run_update_ops(self) -> None:
        """Run what the last `forward` left in UPDATE_OPS, such as the averages of batch normalization.

        Apart from `forward`, so that a step which is not done leaves them as they were.
        """
        with self._graph.as_default(), self.device.activate():
            scopes.run_update_ops()

    def restore_statistics(self) -> None:
        """Set `statistics` to what they were before the last `forward`, for a step which is not done."""
        with self.device.activate():
            for variable, before in zip(self.statistics, self._statistics_before, strict=False):
                variable.assign(before)

    def gradients(self, tape: GradientTape, loss: Tensor, scale: float = 1.0) -> Iterator[Pair]:
        """Yield `(gradient, variable)` as each becomes final; the gradients lie in the arena.

        Args:
            tape: what `forward` gave.
            loss: what `forward` gave.
            scale: by which gradients are multiplied, from the loss on.
        """
        upstream = None if scale == 1.0 else self.device.asarray(scale, loss.dtype)
        stream = tape.gradients(loss, self.variables, upstream)
        while True:
            with self.device.activate():  # not across the yield: the consumer has devices of its own
                pair = next(stream, None)
            if pair is None:
                return
            yield pair

    def evaluate(self, batch: Batch) -> Ticket:
        """Return the number of examples, the sum of their losses and of right answers."""
        labels = self.device.asarray(batch.labels)
        logits = self.logits(batch.images)
        with self.device.activate():
            return self._ticket(ops.sparse_softmax_cross_entropy(logits, labels=labels), logits, labels)

    def regularization(self) -> float:
        """Return the sum of the regularisation losses of its variables at their current values."""
        losses = [record.regularizer.loss(record.variable.value) for record in self._regularization]
        return float(sum(float(asnumpy(loss)) for loss in losses))

    def _ticket(self, cross_entropy: Tensor, logits: Tensor, labels: Array) -> Ticket:
        xp = namespace(logits.value)
        right = xp.count_nonzero(logits.value.argmax(axis=1) == labels) if len(labels) else 0
        loss = float(cross_entropy)  # host sync: the ticket needs it
        return Ticket(
            examples=len(labels),
            loss=loss,
            correct=float(right),
            not_finite=float(not np.isfinite(loss)),
        )
