"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distopt import initializers, ops
from distopt.layers.activations import Activation, activate, activation_of
from distopt.layers.checks import check_floating, check_positive
from distopt.layers.layer import MODEL_COLLECTIONS, Call, GetVariable, Initializer, Layer, apply_in_scope
from distopt.layers.shaping import flatten
from distopt.scopes import VariableScope, add_arg_scope
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["Dense", "dense", "fully_connected"]


class Dense(Layer):
    """`activation(x @ weights + biases)` for x [N, inputs]; bias and relu are computed in one primitive.

    Its variables are "name/weights" [inputs, units] and "name/biases" [units].

    Args:
        units: length of the result's second axis.
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
        ValueError: `units` is below 1, or an unknown activation.
        TypeError: an activation that is neither a name nor callable.
    """

    default_name = "dense"

    def __init__(
        self,
        units: int,
        *,
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
        check_positive("units", units)
        self.units = units
        self.use_bias = use_bias
        self._activation = activation_of(activation)
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
            ValueError: the input is no matrix.
        """
        check_floating(self.default_name, dtype)
        if len(shape) != 2:
            raise ValueError(f"dense needs [examples, inputs], got shape {shape}; use flatten before")
        weights = get("weights", (shape[1], self.units), dtype, collections=MODEL_COLLECTIONS, **self._kernel)
        if not self.use_bias:
            return {"weights": weights}
        biases = get("biases", (self.units,), dtype, collections=MODEL_COLLECTIONS, **self._bias)
        return {"weights": weights, "biases": biases}

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the product, with biases and activation."""
        if not self.use_bias:
            return activate(ops.matmul(x, variables["weights"]), self._activation)
        fused = self._activation is ops.relu
        y = ops.dense(x, variables["weights"], variables["biases"], relu=fused)
        return y if fused else activate(y, self._activation)


@add_arg_scope
def dense(
    x: Any,
    units: int,
    *,
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
    """Return `activation(x @ weights + biases)` for `x` [N, inputs].

    Arguments are those of `Dense`, and: `relu` is the same as activation="relu"; `name` is that of the
    variable scope (or the scope), "dense", "dense_1" ... when None; `reuse` is the variable scope's.

    Raises:
        ValueError: `x` is no matrix; what `Dense`, `variable_scope` and `get_variable` raise.
    """
    layer = Dense(
        units,
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


@add_arg_scope
def fully_connected(
    inputs: Any,
    num_outputs: int,
    activation_fn: Callable[[Any], Tensor] | None = ops.relu,
    normalizer_fn: Callable[..., Tensor] | None = None,
    normalizer_params: Mapping[str, Any] | None = None,
    weights_initializer: Initializer | None = None,
    weights_regularizer: Any = None,
    biases_initializer: Initializer | None = initializers.Zeros(),  # noqa: B008 (it has no state)
    biases_regularizer: Any = None,
    reuse: Any = None,
    trainable: bool = True,
    scope: str | VariableScope | None = None,
) -> Tensor:
    """Return a fully connected layer with the arguments and defaults of slim's function of this name.

    What differs from `dense`: the activation is relu unless another (or None) is given, inputs of a higher
    rank are flattened, a `normalizer_fn` takes the place of the biases, and `biases_initializer=None`
    leaves the biases out.

    Args:
        inputs: [N, ...].
        num_outputs: length of the result's second axis.
        activation_fn: function of a Tensor, or None.
        normalizer_fn: for instance `batch_norm`; called on the product, in the layer's scope.
        normalizer_params: keyword arguments of `normalizer_fn`.
        weights_initializer: of the weights.
        weights_regularizer: penalty on the weights.
        biases_initializer: of the biases; None for no biases.
        biases_regularizer: penalty on the biases.
        reuse: of the variable scope.
        trainable: whether the variables are trained.
        scope: of the variable scope; "fully_connected", made unique, when None.
    """
    layer = _FullyConnected(
        num_outputs,
        activation=None,
        use_bias=normalizer_fn is None and biases_initializer is not None,
        kernel_initializer=weights_initializer,
        bias_initializer=biases_initializer,
        kernel_regularizer=weights_regularizer,
        bias_regularizer=biases_regularizer,
        trainable=trainable,
    )
    layer.finish = (activation_fn, normalizer_fn, dict(normalizer_params or {}))
    return apply_in_scope(layer, inputs if len(inputs.shape) == 2 else flatten(inputs), scope, reuse)


class _FullyConnected(Dense):
    """slim's order: product, normalizer in the layer's scope, activation."""

    default_name = "fully_connected"
    finish: tuple[Any, Any, dict[str, Any]]

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        activation, normalizer, options = self.finish
        y = super().compute(x, variables, call)
        return activate(y if normalizer is None else normalizer(y, **options), activation)
