"""Which aggregator the settings of a training ask for."""

from __future__ import annotations

from distopt.aggregators import Aggregator, AllReduce, Compressed
from distopt.communicators import Communicator
from distopt.settings import Settings

__all__ = ["make_aggregator"]


def make_aggregator(settings: Settings, communicator: Communicator) -> Aggregator:
    """Return the aggregator that averages gradients over the global batch as the settings say."""
    if settings.codec is not None:
        return Compressed(communicator, settings.codec, "mean", settings.bucket_bytes)
    return AllReduce(communicator, "mean", settings.bucket_bytes)
