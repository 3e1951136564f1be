"""Dropout with random numbers that depend on the step and the example, never on the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distopt import ops, scopes
from distopt.layers.layer import Call, GetVariable, Layer, apply_in_scope
from distopt.scopes import VariableScope, add_arg_scope
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["Dropout", "dropout"]


class Dropout(Layer):
    """In training, sets a share of the values to zero and divides the others by 1 - rate.

    Which are kept depends on: the seed; the layer's full name; the number of the open step and the index
    of the example in the global batch (`Graph.step(number, first_example)`); the value's place within the
    example; and how often this layer was called before in the step. It does not depend on the rank, or on
    how a global batch is cut. Outside of steps each call has a number of its own, one more than that of
    the call before.

    Args:
        rate: probability that a value becomes zero.
        noise_shape: shape of the random choice, broadcast to that of the input; see `ops.dropout`.
        seed: None for the graph's.
        name: of the layer.

    Raises:
        ValueError: `rate` is outside of [0, 1).
    """

    default_name = "dropout"

    def __init__(
        self,
        rate: float = 0.5,
        noise_shape: Sequence[int | None] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be a number in the range [0, 1), got {rate}.")
        self.rate, self.noise_shape, self.seed = rate, noise_shape, seed

    def make_variables(self, shape: tuple[int, ...], dtype: Any, get: GetVariable) -> dict[str, Variable]:
        """Return nothing: there are none."""
        return {}

    def compute(self, x: Any, variables: Mapping[str, Variable], call: Call) -> Tensor:
        """Return x with values dropped in training, and as it is otherwise."""
        if not call.training or self.rate == 0:
            return ops.identity(x)
        graph = scopes.get_default_graph()
        step = graph.open_step or graph.outside
        number = step.draws[call.name]
        step.draws[call.name] += 1
        inside = graph.open_step is not None
        return ops.dropout(
            x,
            self.rate,
            seed=graph.seed if self.seed is None else self.seed,
            stream=f"distopt.dropout/{call.name}" + (f"/{number}" if inside and number else ""),
            step=step.number if inside else number,
            first_example=step.first_example,
            noise_shape=self.noise_shape,
        )


@add_arg_scope
def dropout(
    x: Any,
    rate: float = 0.5,
    noise_shape: Sequence[int | None] | None = None,
    seed: int | None = None,
    training: bool = False,
    name: str | VariableScope | None = None,
) -> Tensor:
    """Return x with a share of its values set to zero, where `training`; see `Dropout`.

    Args:
        x: [examples, ...].
        rate: probability that a value becomes zero.
        noise_shape: shape of the random choice, broadcast to that of the input; see `ops.dropout`.
        seed: None for the graph's.
        training: whether to drop; False returns x.
        name: of the layer, which the choice depends on; "dropout", "dropout_1" ... when None.

    Raises:
        ValueError: `rate` is outside of [0, 1), or `noise_shape` doesn't fit.
    """
    return apply_in_scope(Dropout(rate, noise_shape, seed), x, name, training=training)
