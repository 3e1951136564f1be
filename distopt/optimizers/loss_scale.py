"""Loss scaling, which keeps small float16 gradients from becoming zero; after Keras' mixed_precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from distopt.aggregators import Ownership, Pair, Ticket
from distopt.backend import Array, Device, namespace
from distopt.optimizers import tf1
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.registry import deserialize, serialize
from distopt.tape import GradientTape
from distopt.transforms.pairs import values_of
from distopt.variables import IndexedSlices, Variable

__all__ = ["LossScaleOptimizer", "all_finite"]

_INITIAL_SCALE = 2.0**15
_GROWTH_STEPS = 2000
_SHARED = ("gradient_aggregator", "gradient_transformers", "clipvalue", "clipnorm", "global_clipnorm")


class LossScaleOptimizer(Optimizer):
    """Multiplies the loss by a scale, divides the gradients by it, and leaves out steps that overflow.

    The scale is a power of two, so that nothing but the range of the numbers changes. A dynamic one is
    halved (down to 1) when a gradient is not finite, and the step is left out; it is doubled after
    `dynamic_growth_steps` finite steps in a row. A fixed one is never checked.

    The check looks at the gradients after they were aggregated: an infinity or NaN of one rank survives
    sum and mean (inf - inf is NaN), so every rank sees it, leaves out the step and halves its scale alike.
    Without an aggregator each process decides for itself. On a GPU the check makes the host wait for one
    value in every step.

    `minimize` and `optimize_loss` scale and unscale by themselves; around a tape it is

        with GradientTape() as tape:
            loss = optimizer.get_scaled_loss(compute_loss())
        gradients = optimizer.get_unscaled_gradients(tape.gradient(loss, variables))
        optimizer.apply_gradients(zip(gradients, variables))

    Hyperparameters, clips, slots, `iterations`, aggregator and transformers are those of the inner
    optimizer, by the same names. A step that is left out doesn't count in `iterations`, so schedules and
    Adam's bias correction go by updates (in Keras 2 it counts). The Trainer scales and leaves out steps
    likewise; a loss that is itself not finite stops it.

    Args:
        inner_optimizer: what updates the variables, an optimizer of Keras' kind.
        dynamic: whether the scale changes.
        initial_scale: the scale at first, and of a fixed one; 2 ** 15 when None.
        dynamic_growth_steps: after how many finite steps the scale is doubled; 2000 when None.

    Raises:
        TypeError: `inner_optimizer` is no such optimizer or has a loss scale already, or `dynamic` is no
            bool.
        ValueError: a fixed scale without `initial_scale` or with `dynamic_growth_steps`, or numbers that
            are not positive.
    """

    _has_decay: ClassVar[bool] = False

    def __init__(
        self,
        inner_optimizer: Optimizer,
        dynamic: bool = True,
        initial_scale: float | None = None,
        dynamic_growth_steps: int | None = None,
    ) -> None:
        _check_arguments(inner_optimizer, dynamic, initial_scale, dynamic_growth_steps)
        self.inner_optimizer = inner_optimizer
        super().__init__(
            inner_optimizer.get_name(),
            inner_optimizer.gradient_aggregator,
            inner_optimizer.gradient_transformers,
        )
        self._dynamic = dynamic
        self._initial_scale = float(_INITIAL_SCALE if initial_scale is None else initial_scale)
        self._growth_steps = int(_GROWTH_STEPS if dynamic_growth_steps is None else dynamic_growth_steps)
        # On the host, where the loss is multiplied by a number.
        self._scale = _host_variable(np.float32(self._initial_scale), "current_loss_scale")
        self._counter = _host_variable(np.int64(0), "good_steps") if dynamic else None
        self._accepted = True

    # The scale.

    @property
    def dynamic(self) -> bool:
        """Whether the scale changes."""
        return self._dynamic

    @property
    def loss_scale(self) -> float:
        """The present scale."""
        return float(self._scale.value)

    @property
    def dynamic_counter(self) -> Variable | None:
        """How many finite steps there were since the scale last changed; None for a fixed scale."""
        return self._counter

    @property
    def initial_scale(self) -> float:
        """The scale at first."""
        return self._initial_scale

    @property
    def dynamic_growth_steps(self) -> int | None:
        """After how many finite steps the scale is doubled; None for a fixed one."""
        return self._growth_steps if self._dynamic else None

    def get_scaled_loss(self, loss: Any) -> Any:
        """Return the loss times the scale.

        Args:
            loss: a Tensor, or a callable that returns one, for which a callable is returned.
        """
        if callable(loss):
            return lambda: self.get_scaled_loss(loss())
        with np.errstate(over="ignore"):  # a scale beyond float16 is infinite, and falls at the check
            return loss * loss.dtype.type(self.loss_scale)

    def get_unscaled_gradients(self, grads: Iterable[Any]) -> list[Any]:
        """Return gradients divided by the scale; None stays None. What is given is not changed."""
        factor = 1.0 / self.loss_scale
        return [None if gradient is None else _times(gradient, factor) for gradient in grads]

    def unscaled(self, pairs: Iterable[Pair]) -> list[Pair]:
        """Return pairs with gradients divided by the scale; those that lie in an arena are divided there."""
        factor = 1.0 / self.loss_scale
        return [(_unscaled(gradient, variable, factor), variable) for gradient, variable in pairs]

    # The step.

    def _transform_loss(self, loss: Any) -> Any:
        return self.get_scaled_loss(loss)

    def _streamed(
        self,
        loss: Any,
        var_list: Any,
        grad_loss: Any,
        tape: GradientTape | None,
        gate_gradients: int,
        aggregation_method: int | None,
    ) -> Iterable[Pair]:
        factor = 1.0 / self.loss_scale
        stream = super()._streamed(loss, var_list, grad_loss, tape, gate_gradients, aggregation_method)
        return ((_unscaled(gradient, variable, factor), variable) for gradient, variable in stream)

    def compute_gradients(self, *args: Any, **kwargs: Any) -> list[Pair]:
        """Return [(gradient or None, variable)], unscaled; see `Optimizer.compute_gradients`."""
        gradients, variables = zip(*super().compute_gradients(*args, **kwargs), strict=True)
        return list(zip(self.get_unscaled_gradients(gradients), variables, strict=True))

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Pair],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        *,
        examples: float | None = None,
    ) -> int:
        """Aggregate unscaled gradients, adapt the scale, and update the variables if all are finite.

        See `Optimizer.apply_gradients`.
        """
        return super().apply_gradients(
            grads_and_vars, name, experimental_aggregate_gradients, examples=examples
        )

    def accepts(self, pairs: Iterable[Pair]) -> bool:
        """Return whether a step with these global gradients would be done (waits for the GPU)."""
        return not self._dynamic or all_finite(pairs)

    def _transform_gradients(self, grads_and_vars: list[Pair]) -> Iterable[Pair]:
        self._accepted = self.accepts(grads_and_vars)
        self._adapt(self._accepted)
        if not self._accepted:
            return grads_and_vars
        return self.inner_optimizer._transform_gradients(grads_and_vars)

    def apply(self, pairs: Sequence[Pair], values: Mapping[str, float] | None = None) -> None:
        """Update by global gradients, unless the check before found the step to be left out."""
        accepted, self._accepted = self._accepted, True  # the finding was about this step only
        if accepted:
            self.inner_optimizer.apply(pairs, values)

    def _adapt(self, finite: bool) -> None:
        if self._counter is None:
            return
        scale = self.loss_scale
        if not finite:
            self._scale.assign(np.float32(max(scale / 2.0, 1.0)))
            self._counter.assign(0)
        elif int(self._counter.value) + 1 >= self._growth_steps:
            if scale * 2.0 <= float(np.finfo(np.float32).max):
                self._scale.assign(np.float32(scale * 2.0))
            self._counter.assign(0)
        else:
            self._counter.assign_add(1)

    def _read_hyperparameters(self) -> dict[str, float]:
        return self.inner_optimizer._read_hyperparameters()

    def before_aggregation(self, pairs: Iterable[Pair]) -> Iterable[Pair]:
        """See `Optimizer.before_aggregation`."""
        return self.inner_optimizer.before_aggregation(pairs)

    def _aggregated(self, pairs: Iterable[Pair], ticket: Ticket | None) -> list[Pair]:
        return self.inner_optimizer._aggregated(pairs, ticket)

    # What is the inner optimizer's.

    def __getattr__(self, key: str) -> Any:
        inner = self.__dict__.get("inner_optimizer")
        if inner is not None and (key in self._shared_with(inner) or not key.startswith("_")):
            return getattr(inner, key)
        raise AttributeError(f"{type(self).__name__} has no attribute or hyperparameter {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        inner = self.__dict__.get("inner_optimizer")
        if inner is not None and key in self._shared_with(inner):
            setattr(inner, key, value)
        else:
            object.__setattr__(self, key, value)

    @staticmethod
    def _shared_with(inner: Optimizer) -> set[str]:
        """Return the names of attributes that are the inner optimizer's."""
        return {"lr", *_SHARED, *inner.settings, *inner._hyper}

    def hyperparameter(self, key: str) -> float:
        """See `Optimizer.hyperparameter`."""
        return self.inner_optimizer.hyperparameter(key)

    @property
    def step(self) -> int:
        """How many updates are done, those left out not counted."""
        return self.inner_optimizer.step

    @property
    def iterations(self) -> Variable:
        """See `Optimizer.iterations`."""
        return self.inner_optimizer.iterations

    @iterations.setter
    def iterations(self, value: int | Variable) -> None:
        self.inner_optimizer.iterations = value

    @property
    def weights(self) -> list[Variable]:
        """Scale and counter, then the weights of the inner optimizer."""
        return [*self._own_weights(), *self.inner_optimizer.weights]

    def _own_weights(self) -> list[Variable]:
        return [self._scale] if self._counter is None else [self._scale, self._counter]

    def get_slot(self, var: Variable, slot_name: str) -> Variable | None:
        """See `Optimizer.get_slot`."""
        return self.inner_optimizer.get_slot(var, slot_name)

    def get_slot_names(self) -> list[str]:
        """See `Optimizer.get_slot_names`."""
        return self.inner_optimizer.get_slot_names()

    def add_slot(
        self, var: Variable, slot_name: str, initializer: Any = "zeros", shape: Sequence[int] | None = None
    ) -> Variable:
        """See `Optimizer.add_slot`."""
        return self.inner_optimizer.add_slot(var, slot_name, initializer, shape)

    @property
    def is_divided(self) -> bool:
        """See `Optimizer.is_divided`."""
        return self.inner_optimizer.is_divided

    def slot_bytes(self) -> int:
        """See `Optimizer.slot_bytes`."""
        return self.inner_optimizer.slot_bytes()

    def _ownership(self) -> Ownership | None:
        return None  # the slots are the inner optimizer's

    def get_weights(self) -> list[Array]:
        """See `Optimizer.get_weights`."""
        return [*(weight.numpy() for weight in self._own_weights()), *self.inner_optimizer.get_weights()]

    def set_weights(self, weights: Sequence[Any]) -> None:
        """See `Optimizer.set_weights`."""
        own = self._own_weights()
        self.inner_optimizer.set_weights(weights[len(own) :])
        for weight, value in zip(own, weights, strict=False):
            weight.assign(value)

    def state(self) -> dict[str, Array]:
        """Return what a checkpoint needs: that of the inner optimizer, the scale and the counter."""
        return self.inner_optimizer.state() | {weight.name: weight.numpy() for weight in self._own_weights()}

    def load_state(self, state: Mapping[str, Array], variables: Iterable[Variable]) -> None:
        """Restore what `state` gave; see `Optimizer.load_state`."""
        left = dict(state)
        own = self._own_weights()
        for weight in own:
            if weight.name not in left:
                raise ValueError(
                    f"the saved state has no {weight.name!r}: it was saved without a loss scale of this kind"
                )
        values = [left.pop(weight.name) for weight in own]
        self.inner_optimizer.load_state(left, variables)
        for weight, value in zip(own, values, strict=True):
            weight.assign(value)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values that JSON can hold."""
        return {
            "inner_optimizer": serialize(self.inner_optimizer),
            "dynamic": self.dynamic,
            "initial_scale": self.initial_scale,
            "dynamic_growth_steps": self.dynamic_growth_steps,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Make the optimizer that `get_config` described.

        Args:
            config: what `get_config` returned.
            custom_objects: optimizers and schedules of your own by the names of their classes.

        Raises:
            ValueError: the class of the inner optimizer is not known.
        """
        arguments = dict(config)
        inner = deserialize(arguments.pop("inner_optimizer"), custom_objects)
        return cls(inner, **arguments)


def all_finite(pairs: Iterable[Pair]) -> bool:
    """Return whether no gradient has an infinity or NaN; those that are None have not.

    On a GPU the host waits, once.
    """
    found: Any = True
    for gradient, _ in pairs:
        if gradient is None:
            continue
        found = _finite(values_of(gradient)) & found
    return bool(found)


def _finite(values: Array) -> Any:
    xp = namespace(values)
    if values.dtype == np.float64:
        return xp.isfinite(values).all()
    # One pass without a temporary: a sum of float32 can't overflow in float64.
    with np.errstate(invalid="ignore"):
        return xp.isfinite(values.sum(dtype=np.float64))


def _times(gradient: Any, factor: float) -> Any:
    if isinstance(gradient, IndexedSlices):
        return IndexedSlices(_times(gradient.values, factor), gradient.indices, gradient.dense_shape)
    return gradient * values_of(gradient).dtype.type(factor)


def _unscaled(gradient: Any, variable: Variable, factor: float) -> Any:
    if gradient is not None and gradient is variable.gradient:
        gradient *= gradient.dtype.type(factor)  # in the arena, where the aggregator finds it
        return gradient
    return None if gradient is None else _times(gradient, factor)


def _host_variable(value: Any, name: str) -> Variable:
    return Variable(value, trainable=False, name=name, device=Device())


def _check_arguments(inner: Any, dynamic: Any, initial_scale: Any, growth_steps: Any) -> None:
    if isinstance(inner, LossScaleOptimizer):
        raise TypeError(f"LossScaleOptimizer cannot wrap another LossScaleOptimizer, but got: {inner!r}")
    if not isinstance(inner, Optimizer) or isinstance(inner, tf1.Optimizer):
        raise TypeError(
            '"inner_optimizer" must be an instance of distopt.optimizers.Optimizer of Keras\' kind, but got: '
            f"{inner!r}. Use Adam instead of tf1.AdamOptimizer, for example."
        )
    if not isinstance(dynamic, bool):
        raise TypeError(
            f'"dynamic" argument to LossScaleOptimizer.__init__ must be a bool, but got: {dynamic!r}'
        )
    if not dynamic and initial_scale is None:
        raise ValueError('"initial_scale" must be specified if "dynamic" is False')
    if not dynamic and growth_steps is not None:
        raise ValueError(
            f'"dynamic_growth_steps" must be None if "dynamic" is False, but got: {growth_steps}'
        )
    if initial_scale is not None and not 0.0 < initial_scale < float("inf"):
        raise ValueError(f'"initial_scale" must be a positive number, got {initial_scale}')
    if growth_steps is not None and growth_steps < 1:
        raise ValueError(f'"dynamic_growth_steps" must be 1 or more, got {growth_steps}')
