"""From losses of examples to one number: Keras' Reduction, and what a rank has to divide by."""

from __future__ import annotations

from typing import Any

import numpy as np

from distopt import ops
from distopt.backend import namespace
from distopt.communicators import Communicator
from distopt.tape import Tensor
from distopt.variables import Operand, value_of

__all__ = ["Reduction", "compute_average_loss", "compute_weighted_loss", "scale_regularization_loss"]


class Reduction:
    """How the losses of a batch become one, with Keras' values.

    - NONE: they stay one loss per example.
    - SUM: their sum.
    - SUM_OVER_BATCH_SIZE: their sum divided by the number of elements of *this replica's* losses; example
      weights don't change the divisor. On several ranks the sum of such means is as many times too large
      as there are ranks, and with unequal parts of the batch it is wrong by more than a factor.
    - AUTO: SUM_OVER_BATCH_SIZE.
    """

    AUTO = "auto"
    NONE = "none"
    SUM = "sum"
    SUM_OVER_BATCH_SIZE = "sum_over_batch_size"

    @classmethod
    def all(cls) -> tuple[str, ...]:
        """Return the four values."""
        return cls.AUTO, cls.NONE, cls.SUM, cls.SUM_OVER_BATCH_SIZE

    @classmethod
    def validate(cls, key: str) -> None:
        """Check a value.

        Raises:
            ValueError: it is none of the four.
        """
        if key not in cls.all():
            raise ValueError(f"Invalid Reduction Key: {key!r}. Expected keys are {cls.all()}.")


def compute_weighted_loss(
    losses: Any,
    sample_weight: Any = None,
    reduction: str = Reduction.SUM_OVER_BATCH_SIZE,
    communicator: Communicator | None = None,
) -> Tensor:
    """Weigh losses and reduce them.

        >>> import numpy as np
        >>> float(compute_weighted_loss(np.array([2.5, 3.0]), np.array([1.0, 0.0])))
        1.25

    Args:
        losses: one for each example, [examples, ...].
        sample_weight: number, [examples], or what broadcasts to the losses; None for no weights.
        reduction: one of `Reduction`.
        communicator: over whose ranks the gradients will be summed, None for a single rank; only to
            refuse a mean over one rank's own examples.

    Returns:
        Tensor of the losses' shape for NONE, a scalar otherwise; 0 for an empty batch.

    Raises:
        ValueError: an unknown reduction; weights that don't fit; AUTO or SUM_OVER_BATCH_SIZE with a
            communicator of several ranks.
    """
    Reduction.validate(reduction)
    _check_ranks(reduction, communicator)
    weighted = _weighted(_operand(losses), sample_weight)
    if reduction == Reduction.NONE:
        return weighted if isinstance(weighted, Tensor) else ops.identity(weighted)
    total = ops.reduce_sum(weighted)
    if reduction == Reduction.SUM:
        return total
    return ops.divide(total, max(1, weighted.value.size))


def compute_average_loss(
    per_example_loss: Any,
    sample_weight: Any = None,
    global_batch_size: int | None = None,
    communicator: Communicator | None = None,
    num_replicas: int | None = None,
) -> Tensor:
    """Return this replica's part of the mean over the global batch: the sum, divided by its size.

    The sum of these over all replicas is the mean, and so is that of their gradients: for aggregators with
    `reduction="sum"`. (With `reduction="mean"` give the sum, and the number of examples.)

    Where `global_batch_size` is not given it is the number of examples here times the number of replicas,
    which is right only if all replicas have equally many. distopt has no strategy in force that could tell
    the number of replicas: it is that of the communicator's ranks, or `num_replicas`, or else 1.

    Args:
        per_example_loss: [examples, ...]; with further axes their elements are summed, not averaged.
        sample_weight: weights as in `compute_weighted_loss`.
        global_batch_size: examples of all replicas together; counted where None.
        communicator: whose `size` is the number of replicas.
        num_replicas: their number, where there are several in a rank.

    Raises:
        ValueError: a scalar loss; a global batch size that is not positive; both a communicator and
            `num_replicas`, or fewer than one replica.
        TypeError: a global batch size that is no integer.
    """
    weighted = _weighted(_operand(per_example_loss), sample_weight)
    if not weighted.value.ndim:
        raise ValueError(
            "per_example_loss must have one loss for each example, got a scalar. "
            "Use reduction=Reduction.NONE; a loss that is a mean already can't be made right."
        )
    replicas = _replicas(communicator, num_replicas)
    if global_batch_size is None:
        # An empty part of the batch has no loss to divide.
        global_batch_size = max(1, len(weighted.value)) * replicas
    _check_batch_size(global_batch_size)
    return ops.divide(ops.reduce_sum(weighted), int(global_batch_size))


def scale_regularization_loss(
    regularization_loss: Any, communicator: Communicator | None = None, num_replicas: int | None = None
) -> Tensor:
    """Return the sum of penalties divided by the number of replicas, so that their sum has it once.

    For aggregators with `reduction="sum"`. The number of replicas is known as in `compute_average_loss`.

    Args:
        regularization_loss: a penalty, an array or a list of them.
        communicator: whose `size` is the number of replicas.
        num_replicas: their number, where there are several in a rank.

    Raises:
        ValueError: both a communicator and `num_replicas`, or fewer than one replica.
    """
    replicas = _replicas(communicator, num_replicas)
    if isinstance(regularization_loss, list | tuple):
        terms = [ops.reduce_sum(_operand(term)) for term in regularization_loss]
        total = ops.add_n(*terms) if terms else ops.identity(np.zeros((), np.float32))
    else:
        total = ops.reduce_sum(_operand(regularization_loss))
    return ops.divide(total, replicas)


def _operand(value: Any) -> Operand:
    """Return a Tensor or Variable as it is, an array or number as a Tensor; Python numbers become float32."""
    if isinstance(value, Operand):
        return value
    value = value_of(value)
    return Tensor(value if hasattr(value, "dtype") else np.asarray(value, np.float32))


def _weighted(losses: Operand, sample_weight: Any) -> Operand:
    if sample_weight is None:
        return losses
    shape = losses.value.shape
    weights = _operand(sample_weight)
    given = weights.value.shape
    # As Keras: a last axis of one too many goes, one too few is added.
    if len(given) == len(shape) + 1 and given[-1] == 1:
        weights = ops.reshape(weights, shape=given[:-1])
    elif len(given) and len(given) == len(shape) - 1:
        weights = ops.reshape(weights, shape=(*given, 1))
    fits = len(weights.value.shape) <= len(shape) and all(
        one in (1, other) for one, other in zip(weights.value.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"weights of shape {given} don't fit losses of shape {shape}; give one for each example."
        )
    if isinstance(sample_weight, Operand):
        return ops.multiply(losses, ops.cast(weights, dtype=losses.value.dtype))
    xp = namespace(losses.value)
    return ops.multiply(losses, xp.asarray(weights.value, dtype=losses.value.dtype))


def _check_ranks(reduction: str, communicator: Communicator | None) -> None:
    over_batch = reduction in (Reduction.AUTO, Reduction.SUM_OVER_BATCH_SIZE)
    if over_batch and communicator is not None and communicator.size > 1:
        raise ValueError(
            "Please use Reduction.SUM or Reduction.NONE for loss reduction when gradients are summed over "
            f"several ranks (there are {communicator.size}), got {reduction!r}: it divides by this rank's "
            "own examples. Use compute_average_loss(per_example_loss, global_batch_size=...), or "
            "Reduction.SUM with an aggregator whose reduction is 'mean'."
        )


def _replicas(communicator: Communicator | None, num_replicas: int | None) -> int:
    if communicator is not None and num_replicas is not None:
        raise ValueError(
            f"give a communicator or num_replicas, not both: got {communicator!r} and {num_replicas}."
        )
    if num_replicas is not None and num_replicas < 1:
        raise ValueError(f"num_replicas must be at least 1, got {num_replicas}.")
    return communicator.size if communicator is not None else num_replicas or 1


def _check_batch_size(global_batch_size: Any) -> None:
    if np.ndim(global_batch_size):
        raise ValueError(f"global_batch_size must be scalar, got {global_batch_size!r}.")
    if isinstance(global_batch_size, bool) or not isinstance(global_batch_size, int | np.integer):
        raise TypeError(f"global_batch_size must be an int, got {global_batch_size!r}.")
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size must be at least 1, got {global_batch_size}.")
