"""Functions of TensorFlow's `tf.nn` (and `tf.add_n`) with its argument names, for code that is ported.

They are thin: `ops.conv2d`, `ops.max_pool` and so on are the same with sizes as numbers, and with bias
and relu in one primitive, which is faster. Images are NHWC, filters HWIO. `name=` names the result, below
the name scope in force.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distopt.ops.activations import elu, leaky_relu, log_softmax, relu6, selu, softmax, softplus, swish
from distopt.ops.arithmetic import add, tanh
from distopt.ops.dense import relu, sigmoid
from distopt.ops.kernels.convolution import Convolution
from distopt.ops.kernels.geometry import Padding
from distopt.ops.kernels.lrn import LocalResponseNormalization
from distopt.ops.kernels.pooling import AveragePool, MaxPool
from distopt.ops.losses import sigmoid_cross_entropy, softmax_cross_entropy, sparse_softmax_cross_entropy
from distopt.ops.neural import chain
from distopt.ops.normalization import normalize
from distopt.ops.reductions import add_n as add_terms
from distopt.ops.reductions import l2_loss, regularization_loss
from distopt.ops.shaping import identity
from distopt.tape import Tensor
from distopt.variables import value_of

__all__ = [
    "add_n",
    "avg_pool",
    "batch_normalization",
    "bias_add",
    "conv2d",
    "elu",
    "l2_loss",
    "leaky_relu",
    "local_response_normalization",
    "log_softmax",
    "lrn",
    "max_pool",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "sigmoid_cross_entropy_with_logits",
    "softmax",
    "softmax_cross_entropy_with_logits",
    "softplus",
    "sparse_softmax_cross_entropy_with_logits",
    "swish",
    "tanh",
]


def add_n(inputs: Any, *more: Any, name: str | None = None) -> Tensor:
    """Return the sum of Tensors of one shape, given as a list (as in TensorFlow) or as arguments.

    A `RegularizationLoss`, what the collection REGULARIZATION_LOSSES holds, counts as its present value.

    Raises:
        ValueError: there are none, or their shapes differ.
    """
    given: list[Any] = [*inputs, *more] if isinstance(inputs, (list, tuple)) else [inputs, *more]
    terms = [_penalty(term) if hasattr(term, "regularizer") else term for term in given]
    shapes = [tuple(getattr(term, "shape", ())) for term in terms]
    if not terms or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "inputs must be a list of at least one Tensor with the same dtype and shape; got "
            f"{'none' if not terms else f'shapes {shapes}'}."
        )
    return add_terms(*terms, name=name)


def _penalty(loss: Any) -> Tensor:
    return regularization_loss(loss.variable, regularizer=loss.regularizer)


def sigmoid_cross_entropy_with_logits(labels: Any, logits: Any, name: str | None = None) -> Tensor:
    """Return the cross-entropy of each element's sigmoid; see `ops.sigmoid_cross_entropy`.

    Args:
        labels: wanted probabilities, of the shape of `logits`; constants.
        logits: array of any shape.
        name: of the result.
    """
    return sigmoid_cross_entropy(logits, labels=value_of(labels), name=name)


def softmax_cross_entropy_with_logits(labels: Any, logits: Any, name: str | None = None) -> Tensor:
    """Return the cross-entropy of each example's softmax, [examples]; see `ops.softmax_cross_entropy`.

    Args:
        labels: wanted probabilities, [examples, classes]; constants.
        logits: [examples, classes].
        name: of the result.
    """
    return softmax_cross_entropy(logits, labels=value_of(labels), reduction="none", name=name)


def bias_add(value: Any, bias: Any, name: str | None = None) -> Tensor:
    """Return `value + bias`, the bias along the last axis.

    Args:
        value: [..., C].
        bias: [C].
        name: of the result.

    Raises:
        ValueError: `bias` is no vector of C numbers.
    """
    if len(value.shape) < 1 or tuple(bias.shape) != tuple(value.shape[-1:]):
        raise ValueError(
            f"bias_add needs a bias of shape {tuple(value.shape[-1:])} for a value of shape "
            f"{tuple(value.shape)}, got {tuple(bias.shape)}"
        )
    return add(value, bias, name=name)


def conv2d(
    input: Any,  # noqa: A002 (TensorFlow's name)
    filter: Any,  # noqa: A002
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    name: str | None = None,
) -> Tensor:
    """Return the convolution of images with filters.

    Args:
        input: [N, H, W, C].
        filter: [rows, columns, C, K].
        strides: [1, rows, columns, 1], [rows, columns] or one number for both.
        padding: "SAME" (TensorFlow's: the odd pixel after) or "VALID".
        name: of the result.

    Raises:
        ValueError: shapes that don't fit, or strides over examples or channels.
    """
    stage = Convolution(_spatial("strides", strides), padding)
    return chain(input, filter, stages=(stage,), counts=(1,), name=name)


def max_pool(
    value: Any,
    ksize: int | Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    name: str | None = None,
) -> Tensor:
    """Return the largest value of each window.

    Args:
        value: [N, H, W, C].
        ksize: size of the window: [1, rows, columns, 1], [rows, columns] or one number for both.
        strides: distance of neighbouring windows, likewise.
        padding: "SAME" or "VALID".
        name: of the result.

    Raises:
        ValueError: windows or strides over examples or channels, or a window that doesn't fit.
    """
    stage = MaxPool(_spatial("ksize", ksize), _spatial("strides", strides), padding)
    return chain(value, stages=(stage,), name=name)


def avg_pool(
    value: Any,
    ksize: int | Sequence[int],
    strides: int | Sequence[int],
    padding: Padding,
    name: str | None = None,
) -> Tensor:
    """Return the mean of each window, padding not counted; arguments and errors are those of `max_pool`."""
    stage = AveragePool(_spatial("ksize", ksize), _spatial("strides", strides), padding)
    return chain(value, stages=(stage,), name=name)


def local_response_normalization(
    input: Any,  # noqa: A002
    depth_radius: int = 5,
    bias: float = 1.0,
    alpha: float = 1.0,
    beta: float = 0.5,
    name: str | None = None,
) -> Tensor:
    """Return `input / (bias + alpha * sum of squares of 2 * depth_radius + 1 channels) ** beta`."""
    return chain(input, stages=(LocalResponseNormalization(depth_radius, bias, alpha, beta),), name=name)


lrn = local_response_normalization
"""TensorFlow's short name."""


def batch_normalization(
    x: Any,
    mean: Any,
    variance: Any,
    offset: Any,
    scale: Any,
    variance_epsilon: float,
    name: str | None = None,
) -> Tensor:
    """Return `(x - mean) / sqrt(variance + variance_epsilon) * scale + offset`; offset, scale may be None.

    Mean and variance are given; `ops.batch_normalization` takes those of the batch.
    """
    result = normalize(x, mean, variance, offset, scale, variance_epsilon)
    return result if name is None else identity(result, name=name)


def sparse_softmax_cross_entropy_with_logits(*, labels: Any, logits: Any, name: str | None = None) -> Tensor:
    """Return the cross-entropy of each example.

    Args:
        labels: integers [N].
        logits: [N, classes].
        name: of the result.

    Raises:
        ValueError: shapes that don't fit, or a label out of range.
    """
    return sparse_softmax_cross_entropy(logits, labels=labels, reduction="none", name=name)


def _spatial(name: str, value: int | Sequence[int]) -> int | tuple[int, int]:
    """Return rows and columns of TensorFlow's list for all four axes."""
    if isinstance(value, int):
        return value
    sizes = [int(size) for size in value]
    if len(sizes) == 1:
        return sizes[0]
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    if len(sizes) != 4 or sizes[0] != 1 or sizes[3] != 1:
        raise ValueError(
            f"{name} must be [1, rows, columns, 1], [rows, columns] or a number, got {sizes}: windows "
            "over examples or channels are not supported."
        )
    return sizes[1], sizes[2]
