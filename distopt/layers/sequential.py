"""Layers one after the other, as one object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from distopt import ops, scopes
from distopt.layers.layer import Layer
from distopt.ops.kernels.stages import Stage
from distopt.tape import Tensor
from distopt.variables import Variable

__all__ = ["Part", "Sequential"]

Part: TypeAlias = "Layer | Sequential | Stage"


class Sequential:
    """A model of layers computed one after the other.

    Convolutions, poolings and local response normalizations that follow each other are computed as one
    chain, a few images at a time, which gives the same values and is faster.

    Args:
        layers: `Layer`s, `Sequential`s, and the stages `MaxPool`, `AveragePool` and
            `LocalResponseNormalization`.
        name: variable scope around the names of the layers; None for none.

    Raises:
        TypeError: something in `layers` is no layer.

    Example:
        >>> model = Sequential([Conv2D(8, 3, activation="relu"), MaxPool2D(2), Flatten(), Dense(10)])
        >>> logits = model(images, training=True)
    """

    def __init__(self, layers: Iterable[Part], name: str | None = None) -> None:
        self.layers: list[Part] = []
        self._scope = name
        for layer in layers:
            self.add(layer)

    def add(self, layer: Part) -> None:
        """Append a layer.

        Raises:
            TypeError: it is none.
        """
        if not isinstance(layer, (Layer, Sequential)) and not hasattr(layer, "bind"):
            raise TypeError(f"Sequential takes layers, got {layer!r}")
        self.layers.append(layer)

    def __call__(self, x: Any, training: bool = False) -> Tensor:
        """Compute; the first call in a graph makes the variables.

        Args:
            x: the input.
            training: passed to the layers.
        """
        result: Any = x
        with self._named():
            for layer, stages in _runs(self.layers):
                result = _chain(result, stages) if layer is None else layer(result, training=training)
        return ops.identity(x) if result is x else result

    def _named(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._scope is None else scopes.variable_scope(self._scope)

    @property
    def variables(self) -> list[Variable]:
        """The variables of all layers in the default graph, trainable ones first."""
        return [*self.trainable_variables, *self.non_trainable_variables]

    @property
    def weights(self) -> list[Variable]:
        """The same as `variables`, by Keras' name."""
        return self.variables

    @property
    def trainable_variables(self) -> list[Variable]:
        """Those that are trained, layer by layer; each once."""
        return _unique(v for layer in self._objects() for v in layer.trainable_variables)

    @property
    def non_trainable_variables(self) -> list[Variable]:
        """Those that are not trained, layer by layer; each once."""
        return _unique(v for layer in self._objects() for v in layer.non_trainable_variables)

    def _objects(self) -> list[Layer | Sequential]:
        return [layer for layer in self.layers if isinstance(layer, (Layer, Sequential))]


def _stage_of(layer: Part) -> Stage | None:
    if isinstance(layer, Sequential):
        return None
    return layer.stage() if isinstance(layer, Layer) else layer


def _runs(layers: list[Part]) -> Iterator[tuple[Layer | Sequential | None, list[Part]]]:
    """Yield (layer, []), or (None, layers that are computed as one chain)."""
    run: list[Part] = []
    for layer in layers:
        if _stage_of(layer) is not None:
            run.append(layer)
            continue
        if run:
            yield None, run
            run = []
        assert isinstance(layer, (Layer, Sequential))
        yield layer, []
    if run:
        yield None, run


def _chain(x: Any, layers: list[Part]) -> Tensor:
    """Compute layers as one chain; the shapes between them matter by their channels alone."""
    shape, dtype = tuple(x.shape), x.dtype
    stages: list[Stage] = []
    counts: list[int] = []
    parameters: list[Variable] = []
    for layer in layers:
        own: list[Variable] = []
        if isinstance(layer, Layer):
            own = list(layer.build(shape, dtype).variables.values())
        if own:
            shape = (*shape[:3], own[0].shape[-1])
        stage = _stage_of(layer)
        assert stage is not None
        stages.append(stage)
        counts.append(len(own))
        parameters.extend(own)
    return ops.chain(x, *parameters, stages=tuple(stages), counts=tuple(counts))


def _unique(variables: Iterable[Variable]) -> list[Variable]:
    return list({id(variable): variable for variable in variables}.values())
