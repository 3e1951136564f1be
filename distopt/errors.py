"""The exceptions of distopt.

    DistoptError
    ├── BackendError           a device, or what it needs, is not there
    ├── CommunicatorError      ranks disagree, or a collective failed
    ├── DataError              a file of a data set is missing, short, altered, or an example is unusable
    ├── CheckpointError        a checkpoint can't be written, or what was read does not fit
    ├── DriftError             replicas that must be alike are not
    ├── LaunchError            the job was started in a way that can't work
    └── NonFiniteError         the loss or a gradient is NaN or infinite, on any rank

A wrong argument raises `ValueError` or `TypeError`, as it does in TensorFlow and NumPy. Every message
says what was wrong (with the value), what was expected, and how to mend it; an error that is raised
because of one rank names the rank and its host.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "CommunicatorError",
    "DataError",
    "DistoptError",
    "DriftError",
    "LaunchError",
    "NonFiniteError",
]


class DistoptError(Exception):
    """Base of every error that distopt raises and that is no wrong argument."""


class BackendError(DistoptError):
    """A device, or a library that it needs, is not usable; the message says which and why."""


class CommunicatorError(DistoptError):
    """Ranks disagree about a collective, or the collective failed."""


class DataError(DistoptError):
    """A data file is missing, short or altered, or an example can't be used."""


class CheckpointError(DistoptError):
    """A checkpoint can't be written, or one that was read does not fit the model."""


class DriftError(DistoptError):
    """Replicas that must hold the same bits don't; every rank raises it, with the place."""


class LaunchError(DistoptError):
    """The job was started in a way that can't work, for instance as N jobs of one rank."""


class NonFiniteError(DistoptError):
    """The loss or a gradient is not finite; every rank raises it at the same step."""
