"""Keras' loss objects: a loss function with its reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from distopt.communicators import Communicator
from distopt.losses import functions
from distopt.losses.reduction import Reduction, compute_weighted_loss
from distopt.tape import Tensor

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "Loss",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "SparseCategoricalCrossentropy",
]


class Loss:
    """Base of the losses; one of your own defines `call(y_true, y_pred)`, one loss per example.

    Args:
        reduction: one of `Reduction`.
        name: of the loss.
        communicator: over whose ranks gradients will be summed. With several ranks AUTO and
            SUM_OVER_BATCH_SIZE are refused, as Keras does inside a strategy.

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(
        self,
        reduction: str = Reduction.AUTO,
        name: str | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        Reduction.validate(reduction)
        self.reduction = reduction
        self.name = name
        self.communicator = communicator

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        """Return the reduced loss.

        Args:
            y_true: wanted values.
            y_pred: predictions.
            sample_weight: see `compute_weighted_loss`.

        Raises:
            ValueError: shapes that don't fit; AUTO or SUM_OVER_BATCH_SIZE with several ranks.
        """
        losses = self.call(y_true, y_pred)
        return compute_weighted_loss(losses, sample_weight, self.reduction, self.communicator)

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """Return one loss per example."""
        raise NotImplementedError(
            f"{type(self).__name__} must define call(y_true, y_pred), one loss per example."
        )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values; the communicator is none."""
        return {"reduction": self.reduction, "name": self.name}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the loss that `get_config` described."""
        return cls(**config)


class MeanSquaredError(Loss):
    """`mean_squared_error` with a reduction; arguments are those of `Loss`."""

    def __init__(
        self,
        reduction: str = Reduction.AUTO,
        name: str | None = "mean_squared_error",
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(reduction, name, communicator)

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """See `Loss.call`."""
        return functions.mean_squared_error(y_true, y_pred)


class MeanAbsoluteError(Loss):
    """`mean_absolute_error` with a reduction; arguments are those of `Loss`."""

    def __init__(
        self,
        reduction: str = Reduction.AUTO,
        name: str | None = "mean_absolute_error",
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(reduction, name, communicator)

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """See `Loss.call`."""
        return functions.mean_absolute_error(y_true, y_pred)


class BinaryCrossentropy(Loss):
    """`binary_crossentropy` with a reduction.

    Args:
        from_logits: see `binary_crossentropy`.
        label_smoothing: see `binary_crossentropy`.
        reduction: see `Loss`.
        name: see `Loss`.
        communicator: see `Loss`.
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = Reduction.AUTO,
        name: str | None = "binary_crossentropy",
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(reduction, name, communicator)
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """See `Loss.call`."""
        return functions.binary_crossentropy(y_true, y_pred, self.from_logits, self.label_smoothing)

    def get_config(self) -> dict[str, Any]:
        """See `Loss.get_config`."""
        own = {"from_logits": self.from_logits, "label_smoothing": self.label_smoothing}
        return {**super().get_config(), **own}


class CategoricalCrossentropy(Loss):
    """`categorical_crossentropy` with a reduction.

    Args:
        from_logits: see `categorical_crossentropy`.
        label_smoothing: see `categorical_crossentropy`.
        reduction: see `Loss`.
        name: see `Loss`.
        communicator: see `Loss`.
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = Reduction.AUTO,
        name: str | None = "categorical_crossentropy",
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(reduction, name, communicator)
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """See `Loss.call`."""
        return functions.categorical_crossentropy(y_true, y_pred, self.from_logits, self.label_smoothing)

    def get_config(self) -> dict[str, Any]:
        """See `Loss.get_config`."""
        own = {"from_logits": self.from_logits, "label_smoothing": self.label_smoothing}
        return {**super().get_config(), **own}


class SparseCategoricalCrossentropy(Loss):
    """`sparse_categorical_crossentropy` with a reduction.

    Args:
        from_logits: see `sparse_categorical_crossentropy`.
        reduction: see `Loss`.
        name: see `Loss`.
        communicator: see `Loss`.
    """

    def __init__(
        self,
        from_logits: bool = False,
        reduction: str = Reduction.AUTO,
        name: str | None = "sparse_categorical_crossentropy",
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__(reduction, name, communicator)
        self.from_logits = from_logits

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """See `Loss.call`."""
        return functions.sparse_categorical_crossentropy(y_true, y_pred, self.from_logits)

    def get_config(self) -> dict[str, Any]:
        """See `Loss.get_config`."""
        return {**super().get_config(), "from_logits": self.from_logits}
