"""Which aggregator the settings of a training ask for."""

from __future__ import annotations

from distopt.aggregators import Aggregator, AllReduce, Sharded
from distopt.communicators import Communicator
from distopt.settings import Settings

__all__ = ["make_aggregator"]


def make_aggregator(settings: Settings, communicator: Communicator) -> Aggregator:
    """Return the aggregator that averages gradients over the global batch as the settings say."""
    if settings.shard_optimizer:
        return Sharded(communicator, "mean", settings.bucket_bytes)
    return AllReduce(communicator, "mean", settings.bucket_bytes)
