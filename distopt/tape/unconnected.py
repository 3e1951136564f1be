"""What stands for the gradient of a source that the target does not depend on."""

from __future__ import annotations

import enum
from typing import Any

from distopt.backend import namespace

__all__ = ["UnconnectedGradients", "or_zeros", "wants_zeros"]


class UnconnectedGradients(enum.Enum):
    """What is given for a source that the target does not depend on, as in TensorFlow.

    Attributes:
        NONE: None.
        ZERO: zeros of the source's shape and dtype.
    """

    NONE = "none"
    ZERO = "zero"


def wants_zeros(unconnected_gradients: Any) -> bool:
    """Tell whether zeros are asked for.

    Raises:
        ValueError: it is neither an `UnconnectedGradients` nor the value of one.
    """
    try:
        return UnconnectedGradients(unconnected_gradients) is UnconnectedGradients.ZERO
    except ValueError as error:
        raise ValueError(
            f"Unknown value for unconnected_gradients: {unconnected_gradients!r}. It must be 'none' or 'zero'"
        ) from error


def or_zeros(gradient: Any, source: Any, zero: bool) -> Any:
    """Return the gradient, or zeros like the source's value when it is None and they are asked for."""
    if gradient is None and zero:
        return namespace(source.value).zeros_like(source.value)
    return gradient
