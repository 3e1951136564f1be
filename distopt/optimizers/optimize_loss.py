"""`optimize_loss`: from a loss to a training step, after `tf.contrib.layers.optimize_loss`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from distopt.aggregators import GradientAggregator
from distopt.backend import Device
from distopt.optimizers import tf1
from distopt.optimizers.learning_rate import LearningRate
from distopt.optimizers.optimizer import Optimizer
from distopt.optimizers.recording import flattened
from distopt.optimizers.train_op import Steps, SummaryTags, TrainOp
from distopt.scopes.global_step import assert_global_step, get_global_step
from distopt.scopes.graph import GraphKeys, add_to_collection, get_default_graph
from distopt.scopes.variable_scopes import get_variable, variable_scope
from distopt.tape import Tensor
from distopt.transforms import (
    AdaptiveClipping,
    Chain,
    GlobalClipNorm,
    GradientMultipliers,
    GradientNoise,
)
from distopt.variables import Operand, Variable

__all__ = ["OPTIMIZER_CLS_NAMES", "OPTIMIZER_SUMMARIES", "optimize_loss"]

OPTIMIZER_CLS_NAMES: Mapping[str, Callable[[Any], Optimizer]] = {
    "Adagrad": lambda rate: tf1.AdagradOptimizer(learning_rate=rate),
    "Adam": lambda rate: tf1.AdamOptimizer(learning_rate=rate),
    "Ftrl": lambda rate: tf1.FtrlOptimizer(learning_rate=rate),
    "Momentum": lambda rate: tf1.MomentumOptimizer(learning_rate=rate, momentum=0.9),
    "RMSProp": lambda rate: tf1.RMSPropOptimizer(learning_rate=rate),
    "SGD": lambda rate: tf1.GradientDescentOptimizer(learning_rate=rate),
}
"""Names for `optimizer`, each with what makes it from a learning rate."""

OPTIMIZER_SUMMARIES: Sequence[str] = (
    "learning_rate",
    "loss",
    "gradients",
    "gradient_norm",
    "global_gradient_norm",
)
"""What `summaries` may name."""


def optimize_loss(
    loss: Any,
    global_step: Variable | None,
    learning_rate: Any,
    optimizer: Any,
    gradient_noise_scale: Any = None,
    gradient_multipliers: Mapping[Any, Any] | None = None,
    clip_gradients: Any = None,
    learning_rate_decay_fn: Callable[[Any, Any], Any] | None = None,
    update_ops: Iterable[Any] | None = None,
    variables: Any = None,
    name: str | None = None,
    summaries: Sequence[str] | None = None,
    colocate_gradients_with_ops: bool = False,
    increment_global_step: bool = True,
    *,
    examples: float | Callable[..., float] | None = None,
    gradient_aggregator: GradientAggregator | None = None,
) -> TrainOp:
    """Return a callable that does one training step and returns the loss.

        train_op = optimize_loss(loss_fn, step, 0.1, "SGD", clip_gradients=1.0)
        for batch in batches:
            loss = train_op(batch)

    A step computes the loss, runs the update operations, computes gradients, aggregates them over ranks,
    adds noise, multiplies, clips, keeps summaries, updates the variables, and counts the global step. The
    loss is that from before the update. Noise, multipliers and clip see global gradients, and summaries
    hold global values.

    Where nothing else has opened one, each call is a `Graph.step`: model code in the loss that makes
    variables by `get_variable` finds them again.

    Args:
        loss: callable that returns the loss, a Tensor of rank 0; the arguments of the training step are
            passed to it, as TensorFlow is fed. Or a Tensor recorded under a `GradientTape` that has not
            been asked for gradients: its value belongs to one step, so a second call is an error.
        global_step: integer variable that counts steps. None: that of the default graph, if there is one.
        learning_rate: Python float, which becomes a variable "learning_rate" to be assigned to, or a Tensor
            or Variable of rank 0, read at every step. None where the optimizer has its own.
        optimizer: a name in `OPTIMIZER_CLS_NAMES`; a class of optimizers, called with `learning_rate=`; an
            optimizer, used as it is, which ignores `learning_rate`; or a function that returns an optimizer
            and gets a `LearningRate`, or nothing where `learning_rate` is None.
        gradient_noise_scale: scale of truncated normal noise that is added to every gradient; a number, or
            what else `transforms.GradientNoise` takes. Sparse gradients become dense.
        gradient_multipliers: variable or name -> factor; see `transforms.GradientMultipliers`, which takes
            names with and without TensorFlow's ":0".
        clip_gradients: a Python float, the largest global norm; or a callable pairs -> pairs, such as
            `transforms.adaptive_clipping_fn()`.
        learning_rate_decay_fn: callable (learning rate, global step) -> rate, or -> callable without
            arguments that gives the rate, as the functions of `schedules` do. It is called once here and
            then in every step. Ignored where `learning_rate` is None.
        update_ops: callables without arguments that every step runs, in order. None: those in the
            collection UPDATE_OPS at that time. An empty list: none.
        variables: what to train. None: the trainable variables of the default graph, and those that the
            loss uses.
        name: of the variable scope and the name scope; "OptimizeLoss", then "OptimizeLoss_1" ... when None.
        summaries: some of `OPTIMIZER_SUMMARIES`; None: loss, learning_rate and global_gradient_norm.
            Those of gradients read all of them in every step; an empty list spares that.
        colocate_gradients_with_ops: where TensorFlow places operations; nothing is placed here.
        increment_global_step: whether a step counts the global step.
        examples: how many examples this rank's loss is a sum over, for averaging aggregators; a number, or
            a callable that gets the arguments of the step, such as `len`.
        gradient_aggregator: combines the gradients of all ranks. None: the optimizer's own, if it has one.

    Raises:
        ValueError: no loss, or one that is not of rank 0; a learning rate that is negative or of another
            type; unknown summaries, optimizer, or clip; a decay function without a global step; no learning
            rate where the optimizer needs one; no variables.
        TypeError: a global step that is not an integer scalar; a variable that is none; multipliers that
            are no mapping.
        AttributeError: a global step that is to be counted but is no variable.
    """
    del colocate_gradients_with_ops
    _check_loss(loss)
    graph = get_default_graph()
    step = _global_step(global_step, increment_global_step)
    with variable_scope(name, "OptimizeLoss") as scope:
        operations = None if update_ops is None else list(update_ops)
        rate, made_here = _learning_rate(learning_rate)
        wanted = _wanted_summaries(summaries)
        decay = None if rate is None else learning_rate_decay_fn
        if decay is not None and step is None:
            raise ValueError("global_step is required for learning_rate_decay_fn.")
        present = _present_rate(rate, decay, step)
        tags = SummaryTags(
            prefix=scope.original_name_scope,
            learning_rate=_tag("learning_rate", "learning_rate" in wanted and decay is not None),
            gradient_norm=_tag("global_norm/gradient_norm", bool(wanted & _NORMS)),
            loss=_tag("loss", "loss" in wanted),
            gradients="gradients" in wanted,
            gradient_norms="gradient_norm" in wanted,
            clipped_gradient_norm=_tag(
                "global_norm/clipped_gradient_norm", clip_gradients is not None and bool(wanted & _NORMS)
            ),
        )
        made = _make_optimizer(optimizer, present)
        if isinstance(made, tf1.Optimizer):
            # Those that belong to no variable get the scope's name, whenever they are loaded.
            made._create_all_weights([])  # pyright: ignore[reportPrivateUsage]
        trained = _variables(variables)
        train_op = TrainOp(
            loss,
            made,
            Steps(
                global_step=step,
                counts=increment_global_step and step is not None,
                learning_rate=rate if made_here else None,
                rate=present,
                update_ops=operations,
                variables=trained,
                examples=examples,
                aggregator=gradient_aggregator,
                before_clip=_before_clip(gradient_noise_scale, gradient_multipliers, scope.name, graph.seed),
                clip=_clip(clip_gradients, scope.name),
            ),
            tags,
            scope,
            graph,
        )
    add_to_collection(GraphKeys.TRAIN_OP, train_op)
    return train_op


_NORMS = frozenset(("global_gradient_norm", "gradient_norm"))


def _check_loss(loss: Any) -> None:
    if loss is None:
        raise ValueError(
            "None values not supported: the loss is None. Pass a callable that returns it, or a Tensor."
        )
    if isinstance(loss, Tensor):
        if loss.shape != ():
            raise ValueError(f"Shape must be rank 0 but is rank {loss.ndim}: the loss has shape {loss.shape}")
        if loss.node is not None:
            return
    elif callable(loss):
        return
    raise ValueError(
        f"No gradients provided for any variable: the loss is a constant, {loss!r:.60}. Pass a callable that "
        "computes it, or a Tensor computed under an open GradientTape."
    )


def _global_step(given: Any, counts: bool) -> Any:
    if given is None:
        return get_global_step()
    if isinstance(given, Tensor):
        if given.dtype.kind not in "iu":
            raise TypeError(f'Existing "global_step" does not have integer type: {given.dtype}')
        if given.shape != ():
            raise TypeError(f'Existing "global_step" is not scalar: its shape is {given.shape}')
        if counts:
            raise AttributeError(
                "a Tensor has no attribute 'assign_add': the global step must be a Variable to be counted. "
                "Make it with get_or_create_global_step(), or pass increment_global_step=False."
            )
        return given
    assert_global_step(given)
    return given


def _learning_rate(given: Any) -> tuple[Any, bool]:
    """Return what holds the learning rate, and whether it was made here."""
    if given is None:
        return None, False
    if isinstance(given, Operand) and given.value.ndim == 0:
        return given, False
    if not isinstance(given, float):
        raise ValueError(
            f"Learning rate should be 0d Tensor or float. Got {given!r} of type {type(given)}. For a "
            "schedule give a float and learning_rate_decay_fn, or an optimizer that has the schedule."
        )
    if not given >= 0.0:
        raise ValueError(f"Invalid learning_rate {given}; it must be 0 or more.")
    # On the host, whatever the device of the model: it is read there at every step.
    made = get_variable("learning_rate", initializer=float(given), trainable=False, device=Device())
    return made, True


def _present_rate(rate: Any, decay: Callable[[Any, Any], Any] | None, step: Any) -> LearningRate | None:
    if rate is None:
        return None
    if decay is None:
        return LearningRate(lambda: rate)

    def decayed() -> Any:
        found = decay(rate, step)
        return found() if callable(found) else found

    present = LearningRate(decayed)
    present()  # so that what is wrong with the function shows here, as in TensorFlow
    return present


def _wanted_summaries(given: Sequence[str] | None) -> frozenset[str]:
    if given is None:
        return frozenset(("loss", "learning_rate", "global_gradient_norm"))
    for summary in given:
        if summary not in OPTIMIZER_SUMMARIES:
            raise ValueError(
                f"Summaries should be one of [{', '.join(OPTIMIZER_SUMMARIES)}], you provided {summary}."
            )
    return frozenset(given)


def _tag(name: str, wanted: bool) -> str | None:
    return get_default_graph().unique_name(name) if wanted else None


def _make_optimizer(given: Any, rate: LearningRate | None) -> Optimizer:
    if isinstance(given, str):
        if rate is None:
            raise ValueError(
                f"Learning rate is None, but should be specified if optimizer is string ({given})."
            )
        if given not in OPTIMIZER_CLS_NAMES:
            raise ValueError(
                f"Optimizer name should be one of [{', '.join(OPTIMIZER_CLS_NAMES)}], you provided {given}."
            )
        return OPTIMIZER_CLS_NAMES[given](rate)
    if isinstance(given, type) and issubclass(given, Optimizer):
        if rate is None:
            raise ValueError(
                f"Learning rate is None, but should be specified if optimizer is class ({given.__name__})."
            )
        wanted: Any = given
        return wanted(learning_rate=rate)
    if isinstance(given, Optimizer):
        return given
    if callable(given):
        made: Any = given() if rate is None else given(rate)
        if not isinstance(made, Optimizer):
            raise ValueError(
                f"Unrecognized optimizer: function should return subclass of Optimizer. Got {made!r}."
            )
        return made
    raise ValueError(
        "Unrecognized optimizer: should be string, subclass of Optimizer, instance of subclass of Optimizer "
        f"or function with one argument. Got {given!r}."
    )


def _variables(given: Any) -> list[Variable] | None:
    if given is None:
        return None
    variables = flattened(given)
    if not variables:
        raise ValueError("No variables to optimize.")
    for variable in variables:
        if not isinstance(variable, Variable):
            raise TypeError(f"Argument is not a Variable: {variable!r:.60}")
    return variables


def _before_clip(noise: Any, multipliers: Any, scope: str, seed: int) -> Chain:
    parts: list[Any] = []
    if noise is not None:
        # Two training steps of one graph draw from different streams.
        parts.append(GradientNoise(noise, seed=(seed % (1 << 32)) << 32 | zlib.crc32(scope.encode())))
    if multipliers is not None:
        parts.append(GradientMultipliers(multipliers))
    return Chain(parts)


def _clip(given: Any, scope: str) -> Any:
    if given is None:
        return None
    if isinstance(given, float):
        return GlobalClipNorm(given)
    if not callable(given):
        raise ValueError(
            f"Unknown type {type(given)} for clip_gradients: give a float, the largest global norm, or a "
            "callable pairs -> pairs."
        )
    if isinstance(given, AdaptiveClipping):
        # TensorFlow makes the averages when the function is first called, which is in this scope.
        for variable in given.variables():
            if variable.name.startswith("AdaptiveMaxNorm"):  # another training step may have it already
                variable.name = f"{scope}/{variable.name}"
    return given
