"""The base of the TensorFlow 1 optimizers: the interface of `tf.train.Optimizer` on our engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from distopt.aggregators import Aggregator, Pair
from distopt.optimizers import optimizer as engine
from distopt.optimizers.recording import NoGradientsError, check_floating, flattened
from distopt.optimizers.tf1.hooks import Hooks, in_scope
from distopt.scopes.graph import trainable_variables
from distopt.tape import Tensor, gradients
from distopt.tape.gates import checked_gate
from distopt.variables import Variable

__all__ = ["Optimizer"]


class Optimizer(Hooks):
    """An optimizer with the interface of `tf.train.Optimizer` (TensorFlow 1.15).

    What differs from `distopt.optimizers.Optimizer`: names and order of arguments; `global_step` is a
    variable of the caller's that grows with each update; `get_slot` gives None for what is not there;
    `get_slot_names` and `variables` are sorted; slots are named "w/Adam", "w/Adam_1"; applying an empty
    list is an error.

    One of your own, written for TensorFlow 1, overrides the hooks that `distopt.optimizers.tf1.hooks.Hooks`
    tells of, and may override `compute_gradients`, which `minimize` then calls: nothing streams any more.

    Code for graphs that built an operation once and ran it many times calls `minimize` once per step
    here; what it built at first is the loss function.

    Args:
        use_locking: kept for code from TensorFlow. There it serialises concurrent writers of a
            variable; here a variable has one writer.
        name: for messages and slots.
        hyperparameters: name -> number, schedule, or callable without arguments.
        options: `gradient_aggregator`, `gradient_transformers`, `clipvalue`, `clipnorm` and
            `global_clipnorm` of `distopt.optimizers.Optimizer`, which TensorFlow 1 did not have.

    Raises:
        ValueError: no name, or a hyperparameter out of range.
    """

    _has_decay: ClassVar[bool] = False

    def __init__(
        self,
        use_locking: bool,
        name: str,
        hyperparameters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not name:
            raise ValueError("Must specify the optimizer name")
        self._use_locking = use_locking
        super().__init__(name, hyperparameters=hyperparameters, **options)

    def minimize(  # type: ignore[override]  # the order of TensorFlow 1
        self,
        loss: Any,
        global_step: Variable | None = None,
        var_list: Any = None,
        gate_gradients: int = engine.Optimizer.GATE_OP,
        aggregation_method: int | None = None,
        colocate_gradients_with_ops: bool = False,
        name: str | None = None,
        grad_loss: Any = None,
        *,
        examples: float | None = None,
    ) -> Variable | None:
        """Compute the gradients of a loss and apply them; reduction overlaps the backward pass.

        Args:
            loss: callable without arguments that returns the loss, or a Tensor computed under an open
                `GradientTape`. One that isn't scalar is summed.
            global_step: variable that grows by one after the update.
            var_list: what to train, trainable or not. None: the trainable variables that the loss used, and
                for a Tensor those of the default graph as well.
            gate_gradients: when gradients may go to the aggregator: GATE_NONE, each as soon as it is
                final; GATE_OP, those of one operation together; GATE_GRAPH, after backward.
            aggregation_method: how several contributions to one gradient are summed, an
                `AggregationMethod`.
            colocate_gradients_with_ops: where TensorFlow places operations; nothing is placed here.
            name: of TensorFlow's operation; here there is none.
            grad_loss: upstream gradient of the loss; ones when None.
            examples: how many examples this rank's loss is a sum over; for averaging aggregators.

        Returns:
            `global_step`, None where none was given.

        Raises:
            ValueError: no variables, none has a gradient, a loss that isn't of a floating dtype, an
                unknown `gate_gradients` or `aggregation_method`.
            RuntimeError: a loss that is neither callable nor recorded.
        """
        del colocate_gradients_with_ops, name
        if callable(loss) and type(self).compute_gradients is Optimizer.compute_gradients:
            stream: Iterable[Pair] = self._streamed(
                loss, var_list, grad_loss, None, gate_gradients, aggregation_method
            )
        else:
            stream = self.compute_gradients(
                loss, var_list, gate_gradients, aggregation_method, grad_loss=grad_loss
            )
        try:
            return self.apply_gradients(stream, global_step, examples=examples)
        except NoGradientsError as error:
            raise ValueError(
                "No gradients provided for any variable, check your graph for operations without gradients "
                f"between the loss and the variables {error.hint}"
            ) from None

    def compute_gradients(  # type: ignore[override]
        self,
        loss: Any,
        var_list: Any = None,
        gate_gradients: int = engine.Optimizer.GATE_OP,
        aggregation_method: int | None = None,
        colocate_gradients_with_ops: bool = False,
        grad_loss: Any = None,
    ) -> list[Pair]:
        """Return [(gradient or None, variable)] in the order of `var_list`: this rank's own gradients.

        Arguments and errors are those of `minimize`, but for a variable without a gradient, which is no
        error here.
        """
        if callable(loss):
            return super().compute_gradients(
                loss,
                var_list,
                gate_gradients,
                aggregation_method,
                colocate_gradients_with_ops,
                grad_loss,
            )
        if not isinstance(loss, Tensor) or loss.node is None:
            raise RuntimeError(
                "`loss` passed to Optimizer.compute_gradients should be a function when eager execution is "
                "enabled, or a Tensor computed under an open GradientTape from what it watches; got "
                f"{loss!r:.60}"
            )
        check_floating("the loss", loss)
        check_floating("grad_loss", grad_loss)
        if var_list is None:
            variables: list[Any] = list({id(v): v for v in [*trainable_variables(), *_used(loss)]}.values())
        else:
            variables = flattened(var_list)
        if not variables:
            raise ValueError("No variables to optimize.")
        self._warn_of_mean(loss)
        checked_gate(gate_gradients)
        found = gradients(
            self._transform_loss(loss),
            variables,
            None if grad_loss is None else [grad_loss],
            aggregation_method=aggregation_method,
        )
        return list(zip(found, variables, strict=True))

    def apply_gradients(  # type: ignore[override]
        self,
        grads_and_vars: Iterable[Pair],
        global_step: Variable | None = None,
        name: str | None = None,
        *,
        examples: float | None = None,
    ) -> Variable | None:
        """Aggregate gradients over replicas, transform them, update the variables, apply constraints.

        The order is that of `distopt.optimizers.Optimizer.apply_gradients`; `global_step` grows last.

        Args:
            grads_and_vars: (gradient, variable); a gradient may be None.
            global_step: variable that grows by one after the update, whatever its dtype.
            name: of TensorFlow's operation; here there is none.
            examples: how many examples this rank's gradients are sums over.

        Returns:
            `global_step`, None where none was given.

        Raises:
            ValueError: no pairs, no variable with a gradient, or a shape that differs from its variable's.
            NotImplementedError: a Tensor or something else where a variable should be.
            TypeError: a pair is no pair, or a gradient is no array.
            RuntimeError: a variable with a constraint has a sparse gradient.
        """
        counted = _Counted(grads_and_vars)
        before = self.step
        super().apply_gradients(counted, name, examples=examples)
        if not counted.count or (self.step == before and not self._left_out()):
            raise ValueError("No variables provided.")
        if global_step is not None and self.step != before:
            global_step.assign_add(1)
        return global_step

    def _left_out(self) -> bool:
        """Whether the aggregator had nothing to apply in this step, such as no example on any rank."""
        return isinstance(self.gradient_aggregator, Aggregator) and not self.gradient_aggregator.ready

    def get_slot(self, var: Variable, slot_name: str) -> Variable | None:
        """Return a slot of a variable, None if there is none: of another name, or without a gradient yet."""
        found = self._slots.find(var, slot_name)
        if found is not None:
            self._check_whole(var, slot_name)
        return found

    def get_slot_names(self) -> list[str]:
        """Return the names of the slots made so far, sorted."""
        return sorted(self._slots.names)

    def variables(self) -> list[Variable]:
        """Return everything that is kept between steps, sorted by name."""
        return sorted((w for w in self.weights if w is not self._iterations), key=lambda weight: weight.name)

    def add_weight(
        self, name: str, shape: Sequence[int] = (), dtype: Any = None, initializer: Any = "zeros"
    ) -> Variable:
        """See `State.add_weight`; the variable scope in force goes before the name."""
        return super().add_weight(in_scope(name), shape, dtype, initializer)


class _Counted:
    """Pairs that are counted, and checked for what is no variable, while they stream by."""

    def __init__(self, pairs: Iterable[Any]) -> None:
        self._pairs = pairs
        self.count = 0

    def __iter__(self) -> Any:
        for pair in self._pairs:
            self.count += 1
            if isinstance(pair, tuple | list) and len(pair) == 2 and not isinstance(pair[1], Variable):
                what = "update a Tensor" if isinstance(pair[1], Tensor) else "optimize unsupported type"
                raise NotImplementedError(f"Trying to {what} {pair[1]!r:.60}; pass (gradient, variable)")
            yield pair


def _used(loss: Tensor) -> list[Variable]:
    """Return the trainable variables that a recorded loss depends on, in the order of their creation."""
    found: dict[int, Variable] = {}
    seen: set[int] = set()
    pending = [loss.node]
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        for operand in node.inputs:
            if isinstance(operand, Variable) and operand.trainable:
                found[operand.number] = operand
            elif isinstance(operand, Tensor):
                pending.append(operand.node)
    return [found[number] for number in sorted(found)]
