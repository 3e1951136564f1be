"""A replica: one device and its copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distopt import ops, scopes
from distopt.aggregators import Ticket
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
    """

    images: Array
    labels: Array


class Replica:
    """One device, a copy of the model on it, and the arena that holds the copy's values.

    A rank drives one (usual) or several (the CIFAR towers). Initial values depend on `seed` and the
    variables' names only, so every replica starts from the same.

    Args:
        model: images -> logits; creates its variables on the first call.
        example_shape: (height, width, channels) of the images.
        device: where the copy lives.
        seed: of the initial values.

    Attributes:
        device: where the copy lives.
        variables: its trainable variables, in the order of their creation.
        arena: their memory.
    """

    def __init__(
        self, model: Callable[[Any], Tensor], example_shape: Sequence[int], device: Device, seed: int
    ) -> None:
        self.device = device
        self._model = model
        self._graph = scopes.Graph(seed=seed)
        with self._graph.as_default(), device.activate():
            self._logits(device.zeros((1, *example_shape)))
            self.variables: list[Variable] = scopes.trainable_variables()
            self._regularization = scopes.get_regularization_losses()
        self.arena = Arena(self.variables, device)

    def _logits(self, images: Array) -> Tensor:
        with scopes.variable_scope(scopes.get_variable_scope(), reuse=scopes.AUTO_REUSE):
            return self._model(images)

    def forward(self, batch: Batch) -> tuple[GradientTape, Tensor, Ticket]:
        """Compute the loss of a batch, recorded on a tape.

        The loss to be differentiated is the sum over the batch's examples of (cross-entropy +
        regularisation losses): divided by the global batch, after summing over replicas, weight decay
        counts once, however the batch is cut.

        Returns:
            The tape; the loss; this replica's part of the step's ticket, with the cross-entropy alone.
        """
        labels = self.device.asarray(batch.labels)
        with self._graph.as_default(), self.device.activate(), GradientTape() as tape:
            logits = self._logits(self.device.asarray(batch.images))
            cross_entropy = ops.sparse_softmax_cross_entropy(logits, labels=labels)
            loss = cross_entropy
            if len(batch.labels):
                for record in self._regularization:
                    penalty = ops.regularization_loss(record.variable, regularizer=record.regularizer)
                    loss = loss + penalty * float(len(batch.labels))
        return tape, loss, self._ticket(cross_entropy, logits, labels)

    def evaluate(self, batch: Batch) -> Ticket:
        """Return the number of examples, the sum of their losses and of right answers."""
        labels = self.device.asarray(batch.labels)
        with self._graph.as_default(), self.device.activate():
            logits = self._logits(self.device.asarray(batch.images))
            return self._ticket(ops.sparse_softmax_cross_entropy(logits, labels=labels), logits, labels)

    def regularization(self) -> float:
        """Return the sum of the regularisation losses at the current values."""
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
