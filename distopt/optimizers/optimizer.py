"""The base of all optimizers: slots, hyperparameters, and minimize = compute, aggregate, transform, apply.

`Optimizer` has the interface and the order of effects of Keras' OptimizerV2 (TensorFlow 2.4 to 2.10);
`distopt.optimizers.tf1.Optimizer` puts that of `tf.train.Optimizer` on top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from distopt import ops, transforms
from distopt.aggregators import Aggregator, GradientAggregator, Ownership, Pair, Ticket
from distopt.optimizers.hyperparameters import Hyperparameters, check_arguments
from distopt.optimizers.recording import (
    check_examples,
    check_floating,
    check_pairs,
    flattened,
    record,
    with_gradient,
)
from distopt.optimizers.updates import Updates
from distopt.schedules import deserialize
from distopt.schedules.serialization import is_serialized
from distopt.tape import GATE_GRAPH, GATE_NONE, GATE_OP, GradientTape, Tensor
from distopt.tape.gates import checked_gate
from distopt.variables import Variable

__all__ = ["Optimizer"]

_log = logging.getLogger("distopt")

_SEE_GRADIENTS = (
    "_aggregated",
    "_aggregate_gradients",
    "aggregate",
    "_transform_gradients",
    "transform",
    "apply",
    "_apply",
)
"""What a subclass may override to look at global gradients, whole ones."""

_CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")


class Optimizer(Updates):
    """Applies gradients to variables by one elementwise rule.

    To make one of your own, name a `rule`, the initial values of its `slots`, and give its
    hyperparameters; each may then be a number, a schedule or a callable, dense, sparse and arena
    variables work, and on a GPU it is one kernel:

        @elementwise
        def signum(value, gradient, momentum, *, learning_rate, beta):
            momentum = beta * momentum + (1 - beta) * gradient
            value = value - learning_rate * sign(momentum)
            return value, momentum

        class Signum(Optimizer):
            rule, slots = signum, {"momentum": 0.0}

            def __init__(self, learning_rate=0.01, beta=0.9, **options):
                super().__init__(hyperparameters={"learning_rate": learning_rate, "beta": beta}, **options)

    One ported from Keras overrides `_create_slots`, `_resource_apply_dense`, `_resource_apply_sparse`,
    `_prepare_local` and `get_config` instead; see `distopt.optimizers.updates`.

    Args:
        name: for messages, slots and configuration; the class's name when None.
        gradient_aggregator: combines gradients over replicas: an `Aggregator`, or any callable that
            takes and returns a list of (gradient, variable). None: gradients stay as they are.
        gradient_transformers: callables pairs -> pairs, applied in order to the global gradients,
            after the clips.
        hyperparameters: name -> number, schedule, or callable without arguments. They are attributes of
            the optimizer, to be read and set at any time; `lr` is another name of `learning_rate`.
        kwargs: `clipvalue` (largest absolute value of an element), `clipnorm` (largest norm of each
            gradient), `global_clipnorm` (largest norm of all together), applied in this order to the
            global gradients; `decay`: the rate is divided by `1 + decay * iterations`; `lr`: old name of
            `learning_rate`.

    Raises:
        ValueError: a hyperparameter or clip that is out of range, or both `clipnorm` and
            `global_clipnorm`.
        TypeError: an unknown argument, or an aggregator or transformer that can't be called.
    """

    GATE_NONE: ClassVar[int] = GATE_NONE
    GATE_OP: ClassVar[int] = GATE_OP
    GATE_GRAPH: ClassVar[int] = GATE_GRAPH

    settings: ClassVar[tuple[str, ...]] = ()
    """Names of constructor arguments that are attributes but no hyperparameters, for `get_config`."""

    _has_decay: ClassVar[bool] = True

    def __init__(
        self,
        name: str | None = None,
        gradient_aggregator: GradientAggregator | None = None,
        gradient_transformers: Sequence[Callable[[list[Pair]], Iterable[Pair]]] | None = None,
        *,
        hyperparameters: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if name == "":
            raise ValueError("Must specify the optimizer name")
        check_arguments(kwargs, {*_CLIPS, *(("lr", "decay") if self._has_decay else ())})
        for wanted in (gradient_aggregator, *(gradient_transformers or ())):
            if wanted is not None and not callable(wanted):
                raise TypeError(
                    "gradient_aggregator and gradient_transformers must be callables, pairs -> pairs; "
                    f"got {wanted!r}"
                )
        self._hyper = Hyperparameters(self.check)
        super().__init__(name or type(self).__name__)
        self.gradient_aggregator = gradient_aggregator
        self.gradient_transformers = list(gradient_transformers or ())
        self._clip_limits = {key: kwargs.get(key) for key in _CLIPS}
        self._clips = self._clips_for(self._clip_limits)
        self._warned_of: set[str] = set()
        self._looks = 10  # a rank's first part may be a single example, which is its own mean
        self._initial_decay = kwargs.get("decay") or 0.0
        given = dict(hyperparameters or {})
        if kwargs.get("lr") is not None:
            given["learning_rate"] = kwargs["lr"]
        for key, value in given.items():
            self._set_hyper(key, value)
        if self._has_decay:
            self._set_hyper("decay", self._initial_decay)

    def __getattr__(self, key: str) -> Any:
        # Called only for what is no ordinary attribute.
        own: Any = self.__dict__.get("_hyper", ())
        name = "learning_rate" if key == "lr" else key
        if name in own:
            return own.read(name)
        if key in _CLIPS and "_clip_limits" in self.__dict__:
            return self._clip_limits[key]
        raise AttributeError(f"{type(self).__name__} has no attribute or hyperparameter {key!r}")

    def __setattr__(self, key: str, value: Any) -> None:
        name = "learning_rate" if key == "lr" else key
        if name in self.__dict__.get("_hyper", ()):
            self._set_hyper(name, value)
        elif key in _CLIPS:
            limits = {**self._clip_limits, key: value}
            self._clips = self._clips_for(limits)
            self._clip_limits = limits
        else:
            super().__setattr__(key, value)

    def _clips_for(self, limits: Mapping[str, Any]) -> list[Callable[[list[Pair]], Iterable[Pair]]]:
        """Return the clips for `clipvalue`, `clipnorm` and `global_clipnorm`, in the order they run in."""
        return list(transforms.clips(**limits))

    def check(self, key: str, value: float) -> None:
        """Raise ValueError where a hyperparameter is out of range; subclasses extend it."""
        if key in ("learning_rate", "decay") and not value >= 0:
            raise ValueError(f"{key} must not be negative, got {value}")

    def hyperparameter(self, key: str) -> float:
        """Return a hyperparameter's value at this step: schedules and callables are evaluated.

        Raises:
            KeyError: there is none of this name.
            ValueError: what a schedule or callable gave is out of range.
        """
        return self._hyper.value(key, self.step)

    def _set_hyper(self, name: str, value: Any) -> None:
        """Set a hyperparameter; Keras' name."""
        self._hyper.set(name, value)

    def _get_hyper(self, name: str, dtype: Any = None) -> Any:
        """Return a hyperparameter as `getattr` does, rounded to a dtype where one is given; Keras' name."""
        value = self._hyper.read(name)
        return value if dtype is None else np.dtype(dtype).type(value)

    def _serialize_hyperparameter(self, name: str) -> Any:
        """Return a hyperparameter as a plain value for `get_config`; Keras' name."""
        return self._hyper.config(name)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain values that JSON can hold.

        Schedules are serialised and callables evaluated; aggregator and transformers are left out, as in
        Keras. `from_config` makes an optimizer of the same behaviour from it.
        """
        config: dict[str, Any] = {"name": self._name}
        config |= {key: self._serialize_hyperparameter(key) for key in self._hyper}
        config |= {key: getattr(self, key) for key in self.settings}
        return config | {key: limit for key, limit in self._clip_limits.items() if limit is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Make the optimizer that `get_config` described.

        Args:
            config: what `get_config` returned; `lr` is taken for `learning_rate`.
            custom_objects: schedules of your own by the names of their classes.
        """
        arguments = dict(config)
        if "lr" in arguments:
            arguments["learning_rate"] = arguments.pop("lr")
        for key, value in arguments.items():
            if is_serialized(value):
                arguments[key] = deserialize(value, custom_objects)
        return cls(**arguments)

    def minimize(
        self,
        loss: Any,
        var_list: Any,
        grad_loss: Any = None,
        name: str | None = None,
        tape: GradientTape | None = None,
        *,
        examples: float | None = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: int | None = None,
    ) -> int:
        """Compute the gradients of a loss and apply them; reduction overlaps the backward pass.

        Args:
            loss: callable without arguments that returns the loss, or a Tensor recorded on `tape`. For
                an aggregator that averages by global batch: the sum over this rank's examples. A loss
                that isn't scalar is summed.
            var_list: what to train, trainable or not; a callable that returns it is called after the loss,
                and what it returns is trained as far as the loss used it as trainable.
            grad_loss: upstream gradient of the loss; ones when None.
            name: of the operation in TensorFlow; here there is no graph, so it names nothing.
            tape: the tape that recorded a loss given as a Tensor.
            examples: how many examples this rank's loss is a sum over; for averaging aggregators.
            gate_gradients: when gradients may go to the aggregator. GATE_NONE: each as soon as it is
                final; GATE_OP: those of one operation together; GATE_GRAPH: after backward. The values
                are the same.
            aggregation_method: how several contributions to one gradient are summed, an
                `AggregationMethod`.

        Returns:
            `iterations` after the update.

        Raises:
            ValueError: no variables, something else among them, or none has a gradient; a Tensor loss
                without a tape; an unknown `gate_gradients` or `aggregation_method`.
            TypeError: the loss is neither callable nor a Tensor.
        """
        del name
        if var_list is None:
            raise ValueError("`var_list` is required: pass the variables to train, or a callable that does")
        if not callable(var_list):
            var_list = flattened(var_list)
            for wrong in (v for v in var_list if not isinstance(v, Variable)):
                raise ValueError(f"`var_list` must hold variables, got {wrong!r:.60} among them")
        if _overridden(self, "_compute_gradients"):
            stream: Iterable[Pair] = self._compute_gradients(loss, var_list, grad_loss=grad_loss, tape=tape)
        else:
            stream = self._streamed(loss, var_list, grad_loss, tape, gate_gradients, aggregation_method)
        return self.apply_gradients(stream, examples=examples)

    def _streamed(
        self,
        loss: Any,
        var_list: Any,
        grad_loss: Any,
        tape: GradientTape | None,
        gate_gradients: int,
        aggregation_method: int | None,
    ) -> Iterable[Pair]:
        check_floating("grad_loss", grad_loss)
        tape, target, variables = record(loss, var_list, tape)
        self._warn_of_mean(target)
        target = self._transformed(target, tape)
        return tape.gradients(target, variables, grad_loss, gate_gradients, aggregation_method)

    def compute_gradients(
        self,
        loss: Any,
        var_list: Any = None,
        gate_gradients: int = GATE_OP,
        aggregation_method: int | None = None,
        colocate_gradients_with_ops: bool = False,
        grad_loss: Any = None,
        tape: GradientTape | None = None,
    ) -> list[Pair]:
        """Return [(gradient or None, variable)] in the order of `var_list`: this rank's own gradients.

        The gradients are arrays of their own: a later step doesn't change them.

        Args:
            loss: as for `minimize`.
            var_list: as for `minimize`; None for the trainable variables that the loss used.
            gate_gradients: as for `minimize`; all gradients exist when this returns, so it is only checked.
            aggregation_method: as for `minimize`.
            colocate_gradients_with_ops: where TensorFlow places operations; nothing is placed here.
            grad_loss: as for `minimize`.
            tape: as for `minimize`.

        Raises:
            ValueError: no variables; a Tensor loss without a tape; an unknown `gate_gradients` or
                `aggregation_method`.
            TypeError: the loss is neither callable nor a Tensor.
        """
        del colocate_gradients_with_ops
        check_floating("grad_loss", grad_loss)
        tape, target, variables = record(loss, var_list, tape)
        self._warn_of_mean(target)
        checked_gate(gate_gradients)
        found = tape.gradient(
            self._transformed(target, tape), variables, grad_loss, aggregation_method=aggregation_method
        )
        return list(zip(found, variables, strict=True))

    def _compute_gradients(
        self, loss: Any, var_list: Any, grad_loss: Any = None, tape: GradientTape | None = None
    ) -> list[Pair]:
        """Return `compute_gradients`; a hook of Keras. `minimize` calls it where a subclass overrides it.

        Gradients don't stream to the aggregator then, and gates and aggregation methods say nothing.
        """
        return self.compute_gradients(loss, var_list, grad_loss=grad_loss, tape=tape)

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Pair],
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        *,
        examples: float | None = None,
    ) -> int:
        """Aggregate gradients over replicas, transform them, update the variables, apply constraints.

        In this order: variables without a gradient are left out; hyperparameters are read;
        `_transform_unaggregated_gradients`; the aggregator runs; clipvalue, clipnorm, global_clipnorm and
        the transformers see the global gradients (also without aggregation); slots and variables are
        updated; constraints are applied; `iterations` grows by one. An `Aggregator` gets the variables
        without a gradient too, so that all ranks agree on which have one.

        Args:
            grads_and_vars: (gradient, variable). A gradient is an array or number of the variable's shape,
                an `IndexedSlices`, or None. On every rank the same variables. A variable may come
                twice: both updates are applied, one after the other.
            name: of the operation in TensorFlow; here there is no graph, so it names nothing.
            experimental_aggregate_gradients: False skips the aggregator; transformers still run.
            examples: how many examples this rank's gradients are sums over.

        Returns:
            `iterations`, after the update; without any pairs nothing happens, nor where the aggregator has
            nothing to apply in this step (`Aggregator.ready`).

        Raises:
            ValueError: no variable has a gradient, or a shape differs from its variable's.
            TypeError: a pair is no pair, or a gradient is no array.
            RuntimeError: a variable with a constraint has a sparse gradient.
        """
        del name
        check_examples(examples)
        values = self._read_hyperparameters()
        pairs = grads_and_vars
        if experimental_aggregate_gradients:
            ticket = None if examples is None else Ticket(examples=examples)
            pairs = self.before_aggregation(pairs)
            if self._needs_parts_only():
                pairs = self.gradient_aggregator.reduce_parts(pairs, ticket)  # type: ignore[union-attr]
            else:
                pairs = self._aggregated(pairs, ticket)
        given = check_pairs(pairs)
        if not given:
            return self.step
        aggregator = self.gradient_aggregator
        if not isinstance(aggregator, Aggregator) or aggregator.ready:
            kept = with_gradient(given)
            if len(kept) < len(given):
                self._tell_missing(given)
            self.apply(list(self._transform_gradients(kept)), values)
        if isinstance(aggregator, Aggregator):
            aggregator.after_apply([variable for _, variable in given])
        return self.step

    def _ownership(self) -> Ownership | None:
        """Return who shares the slots: the aggregator says it."""
        aggregator = self.gradient_aggregator
        return aggregator.ownership if isinstance(aggregator, Aggregator) else None

    def _needs_parts_only(self) -> bool:
        """Whether nothing looks at more of the global gradients than this rank's part of the update."""
        if self._ownership() is None or self._clips or self.gradient_transformers:
            return False
        if any(_overridden(self, name) for name in _SEE_GRADIENTS):
            return False
        self._divide()
        division = self._slots.division
        return division is not None and division.unit == "elements"

    def _read_hyperparameters(self) -> dict[str, float]:
        """Evaluate every hyperparameter for this step, `decay` worked into the learning rate."""
        step = self.step
        values = {key: self._hyper.value(key, step) for key in self._hyper}
        if "decay" in values and self._has_decay:
            decay = values.pop("decay")
            if decay > 0:
                values["learning_rate"] /= 1.0 + decay * step
        return values

    def before_aggregation(self, pairs: Iterable[Pair]) -> Iterable[Pair]:
        """Apply the hook for unaggregated gradients; without one the stream goes on as it comes."""
        hook = _overridden(self, "_transform_unaggregated_gradients")
        if not hook and (
            self.gradient_aggregator is None or isinstance(self.gradient_aggregator, Aggregator)
        ):
            return pairs
        given = check_pairs(pairs)
        if isinstance(self.gradient_aggregator, Aggregator):
            # The ranks must agree on who has what, so None stays in the list.
            kept = iter(self._transform_unaggregated_gradients([p for p in given if p[0] is not None]))
            return [pair if pair[0] is None else next(kept) for pair in given]
        if not given:
            return given
        kept = with_gradient(given)
        self._tell_missing(given)
        return list(self._transform_unaggregated_gradients(kept))

    def _tell_missing(self, pairs: list[Pair]) -> None:
        missing = [v.name for g, v in pairs if g is None and v.name not in self._warned_of]
        if missing:
            self._warned_of.update(missing)
            _log.warning("Gradients do not exist for variables %s when minimizing the loss.", missing)

    def _warn_of_mean(self, loss: Tensor) -> None:
        """Warn of a loss whose mean the aggregator would take again; look at the first few steps."""
        if self._looks > 0:
            self._looks = 0 if ops.warn_of_mean_of_means(loss, self.gradient_aggregator) else self._looks - 1

    def _transformed(self, target: Any, tape: GradientTape) -> Any:
        """Return what the hook `_transform_loss` makes of a recorded loss, recorded too."""
        if not _overridden(self, "_transform_loss"):
            return target
        with tape:
            return self._transform_loss(target)

    def _transform_loss(self, loss: Any) -> Any:
        """Return the loss to be differentiated; a hook for loss scaling."""
        return loss

    def _transform_unaggregated_gradients(self, grads_and_vars: list[Pair]) -> Iterable[Pair]:
        """Return this rank's gradients changed before they are aggregated; a hook."""
        return grads_and_vars

    def _aggregated(self, pairs: Iterable[Pair], ticket: Ticket | None) -> list[Pair]:
        if _overridden(self, "_aggregate_gradients"):  # one that was ported knows no ticket
            return list(self._aggregate_gradients(list(pairs)))
        return self.aggregate(pairs, ticket)

    def _aggregate_gradients(self, grads_and_vars: list[Pair]) -> Iterable[Pair]:
        """Return the gradients combined over replicas; a hook of Keras, in the place of `aggregate`."""
        return self.aggregate(grads_and_vars, None)

    def aggregate(self, pairs: Iterable[Pair], ticket: Ticket | None) -> list[Pair]:
        """Return the gradients combined over replicas by the `gradient_aggregator`. Collective."""
        if self.gradient_aggregator is None:
            return list(pairs)
        if isinstance(self.gradient_aggregator, Aggregator):
            return self.gradient_aggregator.reduce(pairs, ticket)
        return list(self.gradient_aggregator(list(pairs)))

    def _other_weights(self) -> dict[str, Variable]:
        """Return weights that are no slots, and the variables of transformers that have some."""
        found = super()._other_weights()
        for number, transformer in enumerate(self.gradient_transformers):
            variables: Callable[[], list[Variable]] = getattr(transformer, "variables", list[Variable])
            found |= {f"transformers/{number}/{variable.name}": variable for variable in variables()}
        return found

    def _transform_gradients(self, grads_and_vars: list[Pair]) -> Iterable[Pair]:
        """Return `transform` of the gradients; a hook of Keras."""
        return self.transform(grads_and_vars)

    def transform(self, pairs: list[Pair]) -> list[Pair]:
        """Return the global gradients clipped, and put through the transformers."""
        for transformer in (*self._clips, *self.gradient_transformers):
            pairs = list(transformer(pairs))
        return pairs


def _overridden(optimizer: Optimizer, name: str) -> bool:
    return getattr(type(optimizer), name) is not getattr(Optimizer, name)
