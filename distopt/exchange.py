"""Which aggregator the settings of a training ask for."""

from __future__ import annotations

from distopt.aggregators import Adasum, Aggregator, AllReduce, Canonical, Delayed, LocalSGD
from distopt.communicators import Communicator
from distopt.settings import Settings

__all__ = ["make_aggregator"]


def make_aggregator(settings: Settings, communicator: Communicator) -> Aggregator:
    """Return the aggregator that averages gradients over the global batch as the settings say."""
    if settings.canonical is not None:
        return Canonical(communicator, settings.canonical, "mean", settings.bucket_bytes)
    plain = AllReduce(communicator, "mean", settings.bucket_bytes)
    if settings.local_steps > 1:
        return LocalSGD(communicator, settings.local_steps, settings.local_start, plain)
    if settings.delayed:
        return Delayed(plain)
    return Adasum(communicator) if settings.adasum else plain
