"""Convolutions of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt import initializers, ops
from distopt.layers.activations import Activation, activate, activation_of
from distopt.layers.checks import check_floating, check_positive
from distopt.layers.layer import MODEL_COLLECTIONS, Call, GetVariable, Initializer, Layer, apply_in_scope
from distopt.ops.kernels import convolution
from distopt.ops.kernels.geometry import Padding, pair
from distopt.ops.kernels.stages import Stage
from distopt.scopes import VariableScope, add_arg_scope
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["Conv2D", "conv2d"]


class Conv2D(Layer):
    """A convolution of images [N, H, W, C]; biases and relu are computed with it.

    Its variables are "name/weights" [rows, columns, C, filters] and "name/biases" [filters].

    Args:
        filters: number of output channels.
        kernel_size: rows and columns of the filter; a number stands for both.
        strides: distance of neighbouring windows, likewise.
        padding: "SAME" (TensorFlow's: the odd pixel after) or "VALID".
        activation: name or function; see `layers.ACTIVATIONS`.
        use_bias: whether there are biases.
        kernel_initializer: of the weights; None for the scope's, or else `GlorotUniform`.
        bias_initializer: of the biases; None for zeros.
        kernel_regularizer: penalty on the weights; None for the scope's.
        bias_regularizer: penalty on the biases.
        kernel_constraint: applied to the weights after each update.
        bias_constraint: applied to the biases after each update.
        trainable: whether the variables are trained.
        name: of the layer.

    Raises:
        ValueError: a size below 1, or an unknown activation.
        TypeError: an activation that is neither a name nor callable.
    """

    default_name = "conv2d"

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int],
        *,
        strides: int | tuple[int, int] = 1,
        padding: Padding = "SAME",
        activation: Activation = None,
        use_bias: bool = True,
        kernel_initializer: Initializer | None = None,
        bias_initializer: Initializer | None = None,
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        trainable: bool = True,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        check_positive("filters", filters)
        self.filters = filters
        self.kernel_size = pair(kernel_size)
        for size in self.kernel_size:
            check_positive("kernel_size", size)
        self.use_bias = use_bias
        self._activation = activation_of(activation)
        self._stage = convolution.Convolution(strides, padding, self._activation is ops.relu)
        self._kernel = {
            "initializer": kernel_initializer,
            "regularizer": kernel_regularizer,
            "constraint": kernel_constraint,
            "trainable": trainable,
        }
        self._bias = {
            "initializer": bias_initializer or initializers.Zeros(),
            "regularizer": bias_regularizer,
            "constraint": bias_constraint,
            "trainable": trainable,
        }

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return weights and biases.

        Raises:
            ValueError: the input is not [N, H, W, C].
        """
        check_floating(self.default_name, dtype)
        if len(shape) != 4:
            raise ValueError(f"conv2d needs images [N, H, W, C], got shape {shape}")
        whole = (*self.kernel_size, shape[3], self.filters)
        weights = get("weights", whole, dtype, collections=MODEL_COLLECTIONS, **self._kernel)
        if not self.use_bias:
            return {"weights": weights}
        biases = get("biases", (self.filters,), dtype, collections=MODEL_COLLECTIONS, **self._bias)
        return {"weights": weights, "biases": biases}

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the convolution, with biases and activation."""
        y = ops.chain(x, *variables.values(), stages=(self._stage,), counts=(len(variables),))
        return y if self._activation is ops.relu else activate(y, self._activation)

    def stage(self) -> Stage | None:
        """Return it as a stage, unless its activation is one that can't be fused."""
        return self._stage if self._activation in (None, ops.relu) else None


@add_arg_scope
def conv2d(
    x: Any,
    filters: int,
    kernel_size: int | tuple[int, int],
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    activation: Activation = None,
    use_bias: bool = True,
    kernel_initializer: Initializer | None = None,
    bias_initializer: Initializer | None = None,
    kernel_regularizer: Any = None,
    bias_regularizer: Any = None,
    kernel_constraint: Any = None,
    bias_constraint: Any = None,
    trainable: bool = True,
    relu: bool = False,
    name: str | VariableScope | None = None,
    reuse: Any = None,
) -> Tensor:
    """Return a convolution of images [N, H, W, C].

    Arguments are those of `Conv2D`, and: `relu` is the same as activation="relu"; `name` is that of the
    variable scope (or the scope), "conv2d", "conv2d_1" ... when None; `reuse` is the variable scope's.

    Raises:
        ValueError: `x` are no images; what `Conv2D`, `variable_scope` and `get_variable` raise.
    """
    layer = Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding=padding,
        activation=activation_of(activation, relu),
        use_bias=use_bias,
        kernel_initializer=kernel_initializer,
        bias_initializer=bias_initializer,
        kernel_regularizer=kernel_regularizer,
        bias_regularizer=bias_regularizer,
        kernel_constraint=kernel_constraint,
        bias_constraint=bias_constraint,
        trainable=trainable,
    )
    return apply_in_scope(layer, x, name, reuse)
