"""Optimizers by name: `get`, `serialize` and `deserialize`, after `tf.keras.optimizers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.optimizers.optimizer import Optimizer
from distopt.schedules.serialization import is_serialized

__all__ = ["deserialize", "get", "serialize"]


def serialize(optimizer: Optimizer) -> dict[str, Any]:
    """Return `{"class_name": ..., "config": ...}`, plain values that JSON can hold.

    An optimizer of a dialect has its module before its name, as in "tf1.AdamOptimizer".
    """
    known = {cls: name for name, cls in reversed(_classes().items())}  # the first of several names
    name = known.get(type(optimizer), type(optimizer).__name__)
    return {"class_name": name, "config": optimizer.get_config()}


def deserialize(config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Optimizer:
    """Make the optimizer that `serialize` described; upper and lower case of its name don't matter.

    Args:
        config: with the keys "class_name" and "config", and from Keras perhaps "module", which tells its
            two dialects apart: of "keras.optimizers" are those in `keras_new`.
        custom_objects: optimizers and schedules of your own by the names of their classes.

    Raises:
        ValueError: `config` has other keys, or the class is not known.
    """
    if not is_serialized(config):
        raise ValueError(
            f"a serialised optimizer has the keys 'class_name' and 'config', got {sorted(config)}."
        )
    name, own = config["class_name"], dict(custom_objects or {})
    prefix = "keras_new." if config.get("module") == "keras.optimizers" else ""
    cls = own.get(name) or _by_name().get(f"{prefix}{name}".lower())
    if cls is None:
        raise ValueError(
            f"Unknown optimizer: {name}. Known are {', '.join(sorted(_classes()))}; pass custom_objects for "
            "one of your own."
        )
    return cls.from_config(config["config"], own)


def get(identifier: Any, **arguments: Any) -> Optimizer:
    """Return an optimizer.

    Args:
        identifier: a name as in `distopt.optimizers`, in upper or lower case ("adam", "tf1.AdamOptimizer");
            what `serialize` gave; or an optimizer, which is returned as it is.
        arguments: of the constructor, for a name: learning_rate, gradient_aggregator ...

    Raises:
        ValueError: it is none of these, or the name is not known.
        TypeError: arguments beside something else than a name.
    """
    if isinstance(identifier, str):
        return deserialize({"class_name": identifier, "config": arguments})
    if arguments:
        raise TypeError(
            f"arguments ({', '.join(arguments)}) go with an optimizer's name, not with {identifier!r}"
        )
    if isinstance(identifier, Optimizer):
        return identifier
    if isinstance(identifier, Mapping):
        return deserialize(identifier)
    raise ValueError(
        f"Could not interpret optimizer identifier: {identifier!r}; expected a name, what serialize() gave, "
        "or an Optimizer."
    )


def _classes() -> dict[str, type[Optimizer]]:
    """Return every public class by its name behind `distopt.optimizers`."""
    from distopt import optimizers

    found: dict[str, type[Optimizer]] = {}
    for prefix, module in (
        ("", optimizers),
        ("tf1.", optimizers.tf1),
        ("contrib.", optimizers.contrib),
        ("keras_new.", optimizers.keras_new),
    ):
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, type) and issubclass(thing, Optimizer) and name != "Optimizer":
                found[prefix + name] = thing
    return found


def _by_name() -> dict[str, type[Optimizer]]:
    return {name.lower(): cls for name, cls in _classes().items()}
