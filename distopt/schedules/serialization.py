"""Schedules as plain values and back: `{"class_name": ..., "config": ...}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from distopt.schedules.schedule import LearningRateSchedule

__all__ = ["deserialize", "is_serialized", "serializable", "serialize"]

_Class = TypeVar("_Class", bound=type[LearningRateSchedule])

_known: dict[str, type[LearningRateSchedule]] = {}


def serializable(schedule_class: _Class) -> _Class:
    """Let `deserialize` find a class by its name; the decorator of this package's own schedules.

    Classes of others go into `custom_objects`, so that a file cannot mean another class by accident.
    """
    _known[schedule_class.__name__] = schedule_class
    return schedule_class


def serialize(schedule: LearningRateSchedule) -> dict[str, Any]:
    """Return `{"class_name": ..., "config": ...}`, plain values that JSON can hold."""
    return {"class_name": type(schedule).__name__, "config": schedule.get_config()}


def deserialize(
    config: Mapping[str, Any],
    custom_objects: Mapping[str, type[LearningRateSchedule]] | None = None,
) -> LearningRateSchedule:
    """Make the schedule that `serialize` described.

    Args:
        config: what `serialize` returned, here or in Keras; "module" and "registered_name", which are in
            those of Keras 2.11 and later, say nothing.
        custom_objects: classes of your own by name; they come before those of this package, for
            schedules within the schedule too.

    Raises:
        ValueError: `config` has other keys, or a class is not known.
    """
    if not is_serialized(config):
        raise ValueError(
            f"a serialised schedule has the keys 'class_name' and 'config', got {sorted(config)}."
        )
    known = {**_known, **(custom_objects or {})}
    name = config["class_name"]
    if name not in known:
        raise ValueError(
            f"unknown schedule {name!r}; known are {', '.join(sorted(known))}. "
            "Pass your own classes in custom_objects."
        )
    arguments = {
        key: deserialize(value, custom_objects) if is_serialized(value) else value
        for key, value in config["config"].items()
    }
    return known[name].from_config(arguments)


def is_serialized(value: Any) -> bool:
    """Tell whether a value has the form that `serialize` gives, here or in Keras 2.11 and later."""
    needed = {"class_name", "config"}
    return isinstance(value, Mapping) and needed <= set(value) <= needed | {"module", "registered_name"}
