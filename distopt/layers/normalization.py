"""Batch normalization with moving averages, which objects update at once and functions by UPDATE_OPS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from distopt import initializers, ops, scopes
from distopt.communicators.communicator import Communicator
from distopt.layers.activations import Activation, activate, activation_of
from distopt.layers.layer import MODEL_COLLECTIONS, Call, GetVariable, Initializer, Layer, apply_in_scope
from distopt.ops import Moments
from distopt.scopes import GraphKeys, UpdateOp, VariableScope, add_arg_scope
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["BatchNormalization", "batch_norm", "batch_normalization"]


class BatchNormalization(Layer):
    """Brings each channel to mean 0 and variance 1, then scales and shifts it.

    In training mean and variance are the batch's; otherwise moving averages of them. A call with
    `training=True` brings these up to date at once, as in Keras; the functions `batch_normalization` and
    `batch_norm` leave that to UPDATE_OPS. A batch without examples changes nothing.

    Without a communicator the moments are those of this replica's own part of the batch, and so are the
    moving averages: they differ between ranks, and training depends on how the batch is cut. With one,
    batches of all ranks are normalized as one, forward and backward, and N ranks do what one would.

    Its variables are "name/gamma", "name/beta" (both [C], trained), "name/moving_mean" and
    "name/moving_variance" (not trained), in MODEL_VARIABLES like those of all layers; float32 for inputs of
    16 bits.

    Args:
        momentum: what of a moving average stays in an update; the rest comes from the batch.
        epsilon: added to the variance.
        center: whether there is a beta.
        scale: whether there is a gamma.
        beta_initializer: None for zeros.
        gamma_initializer: None for ones.
        moving_mean_initializer: None for zeros.
        moving_variance_initializer: None for ones.
        beta_regularizer: penalty on beta.
        gamma_regularizer: penalty on gamma.
        trainable: whether gamma and beta are trained.
        activation: name or function; see `layers.ACTIVATIONS`.
        updates_collection: None updates at once. A name: an `UpdateOp` goes to this collection instead;
            UPDATE_OPS is run by `optimize_loss`, the Trainer and `run_update_ops()`, and by nobody else.
        unbiased_moving_variance: whether the moving variance takes the batch's variance times n / (n - 1).
            None does what TensorFlow does: for images [N, H, W, C], which its fused kernel computes, but
            not for matrices.
        communicator: whose ranks' batches are taken as one. Every rank must call the layer then, and go
            back through it, with or without examples, the same number of times. (Of several replicas on
            a rank, each is normalized with those in its place on the other ranks.)
        name: of the layer.

    Raises:
        ValueError: momentum outside of [0, 1], epsilon not above 0, or an unknown activation.
    """

    default_name = "batch_normalization"

    def __init__(
        self,
        *,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer | None = None,
        gamma_initializer: Initializer | None = None,
        moving_mean_initializer: Initializer | None = None,
        moving_variance_initializer: Initializer | None = None,
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        trainable: bool = True,
        activation: Activation = None,
        updates_collection: str | None = None,
        unbiased_moving_variance: bool | None = None,
        communicator: Communicator | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be above 0, got {epsilon}: a channel may have variance 0")
        self.momentum, self.epsilon = momentum, epsilon
        self._activation = activation_of(activation)
        self._updates_collection = updates_collection
        self._unbiased = unbiased_moving_variance
        self._communicator = communicator
        zeros, ones = initializers.Zeros(), initializers.Ones()
        options: dict[str, dict[str, Any]] = {}
        if scale:
            options["gamma"] = {"initializer": gamma_initializer or ones, "regularizer": gamma_regularizer}
        if center:
            options["beta"] = {"initializer": beta_initializer or zeros, "regularizer": beta_regularizer}
        for parameter in options.values():
            parameter["trainable"] = trainable
        options["moving_mean"] = {"initializer": moving_mean_initializer or zeros, "trainable": False}
        options["moving_variance"] = {"initializer": moving_variance_initializer or ones, "trainable": False}
        self._options = options

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return gamma, beta and the moving averages.

        Raises:
            ValueError: the input has no axis beside its channels.
        """
        if len(shape) < 2:
            raise ValueError(f"batch_normalization needs [examples, ..., channels], got shape {shape}")
        wide = np.promote_types(dtype, np.float32)
        return {
            name: get(name, (shape[-1],), wide, collections=MODEL_COLLECTIONS, **options)
            for name, options in self._options.items()
        }

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return the normalized values."""
        gamma, beta = variables.get("gamma"), variables.get("beta")
        mean, variance = variables["moving_mean"], variables["moving_variance"]
        if not call.training:
            y = ops.normalize(x, mean, variance, beta, gamma, self.epsilon)
            return activate(y if y.dtype == x.dtype else ops.cast(y, dtype=x.dtype), self._activation)
        moments = ops.batch_moments(x, self._communicator)
        y = ops.batch_normalization(
            x, gamma, beta, epsilon=self.epsilon, moments=moments, communicator=self._communicator
        )
        unbiased = len(x.shape) == 4 if self._unbiased is None else self._unbiased
        self._update(mean, variance, moments, unbiased)
        return activate(y, self._activation)

    def _update(self, mean: Variable, variance: Variable, moments: Moments, unbiased: bool) -> None:
        """Bring the moving averages up to date, or leave that to a collection."""

        def update() -> None:
            update_moving_averages(mean, variance, moments, self.momentum, unbiased)

        if self._updates_collection is None:
            update()
            return
        graph = scopes.get_default_graph()
        operation = UpdateOp(update, graph.unique_name("AssignMovingAvg"))
        graph.add_to_collection(self._updates_collection, operation)


def update_moving_averages(
    mean: Variable, variance: Variable, moments: Moments, momentum: float, unbiased: bool
) -> None:
    """Move averages towards a batch's moments; where the batch has no values, not at all."""
    count: Any = moments.count
    batch_variance = moments.variance
    if isinstance(count, int):
        if not count:
            return
        if unbiased:
            batch_variance = batch_variance * (count / max(count - 1, 1))
        share: Any = 1 - momentum
    else:  # on the device: 0 without any values, and the host doesn't look
        if unbiased:
            batch_variance = batch_variance * (count / (count - 1).clip(1.0))
        share = (1 - momentum) * count.clip(0.0, 1.0)
    for average, value in ((mean, moments.mean), (variance, batch_variance)):
        average.assign_sub((average.value - value) * share)


@add_arg_scope
def batch_normalization(
    x: Any,
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Initializer | None = None,
    gamma_initializer: Initializer | None = None,
    moving_mean_initializer: Initializer | None = None,
    moving_variance_initializer: Initializer | None = None,
    beta_regularizer: Any = None,
    gamma_regularizer: Any = None,
    training: bool = False,
    trainable: bool = True,
    activation: Activation = None,
    updates_collection: str | None = GraphKeys.UPDATE_OPS,
    unbiased_moving_variance: bool | None = None,
    communicator: Communicator | None = None,
    name: str | VariableScope | None = None,
    reuse: Any = None,
) -> Tensor:
    """Return `x` [N, ..., C] with each channel brought to mean 0 and variance 1, scaled and shifted.

    Arguments are those of `BatchNormalization` (and of `tf.layers.batch_normalization`), and: `training`
    says whether to take the batch's moments, and leave an update of the moving averages in
    `updates_collection`, by default UPDATE_OPS (with `minimize`, call `run_update_ops()` in the step);
    `name` is that of the variable scope (or the scope), "batch_normalization", made unique, when None;
    `reuse` is the variable scope's.
    """
    layer = BatchNormalization(
        momentum=momentum,
        epsilon=epsilon,
        center=center,
        scale=scale,
        beta_initializer=beta_initializer,
        gamma_initializer=gamma_initializer,
        moving_mean_initializer=moving_mean_initializer,
        moving_variance_initializer=moving_variance_initializer,
        beta_regularizer=beta_regularizer,
        gamma_regularizer=gamma_regularizer,
        trainable=trainable,
        activation=activation,
        updates_collection=updates_collection,
        unbiased_moving_variance=unbiased_moving_variance,
        communicator=communicator,
    )
    return apply_in_scope(layer, x, name, reuse, training)


@add_arg_scope
def batch_norm(
    inputs: Any,
    decay: float = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: Callable[[Any], Tensor] | None = None,
    updates_collections: str | None = GraphKeys.UPDATE_OPS,
    is_training: bool = True,
    reuse: Any = None,
    trainable: bool = True,
    scope: str | VariableScope | None = None,
) -> Tensor:
    """Return batch normalization with the arguments and defaults of slim's function of this name.

    What differs from `batch_normalization`: slower averages (0.999), no gamma, training by default, and
    the variable scope "BatchNorm".

    Args:
        inputs: [N, ..., C].
        decay: what of a moving average stays in an update.
        center: whether there is a beta.
        scale: whether there is a gamma.
        epsilon: added to the variance.
        activation_fn: function of a Tensor, or None.
        updates_collections: where the update goes; None updates at once.
        is_training: whether to take the batch's moments.
        reuse: of the variable scope.
        trainable: whether gamma and beta are trained.
        scope: of the variable scope; "BatchNorm", made unique, when None.
    """
    layer = _SlimBatchNorm(
        momentum=decay,
        center=center,
        scale=scale,
        epsilon=epsilon,
        activation=activation_fn,
        updates_collection=updates_collections,
        trainable=trainable,
    )
    return apply_in_scope(layer, inputs, scope, reuse, is_training)


class _SlimBatchNorm(BatchNormalization):
    default_name = "BatchNorm"
