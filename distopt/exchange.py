"""Which aggregator the settings of a training ask for."""

from __future__ import annotations

from distopt.aggregators import (
    Adasum,
    Aggregator,
    AllReduce,
    Canonical,
    Compressed,
    Delayed,
    LocalSGD,
    Sharded,
)
from distopt.aggregators.bucket_size import DEFAULT_BUCKET_BYTES
from distopt.communicators import Communicator
from distopt.settings import Settings

__all__ = ["make_aggregator"]


def make_aggregator(settings: Settings, communicator: Communicator) -> Aggregator:
    """Return the aggregator that averages gradients over the global batch as the settings say."""
    bucket_bytes = settings.bucket_bytes or DEFAULT_BUCKET_BYTES
    if settings.canonical is not None:
        return Canonical(communicator, settings.canonical, "mean", bucket_bytes)
    if settings.adasum:
        return Adasum(communicator)
    if settings.shard_optimizer:
        return Sharded(communicator, "mean", bucket_bytes)
    if settings.codec is not None:
        plain: AllReduce = Compressed(communicator, settings.codec, "mean", bucket_bytes)
    else:
        plain = AllReduce(communicator, "mean", settings.bucket_bytes)  # None: measured
    if settings.local_steps > 1:
        return LocalSGD(communicator, settings.local_steps, settings.local_start, plain)
    return Delayed(plain) if settings.delayed else plain
