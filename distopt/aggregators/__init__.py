"""Aggregators: local gradient sums in, identical global gradients out."""

from distopt.aggregators.accumulate import Accumulate
from distopt.aggregators.adasum import Adasum
from distopt.aggregators.aggregator import Aggregator, GradientAggregator, Pair
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.broadcast import broadcast_variables
from distopt.aggregators.canonical import Canonical
from distopt.aggregators.compressed import Compressed
from distopt.aggregators.delayed import Delayed
from distopt.aggregators.grouped import Grouped
from distopt.aggregators.join import in_step
from distopt.aggregators.local_sgd import LocalSGD
from distopt.aggregators.not_finite import NotFinite, first_not_finite, locate_not_finite
from distopt.aggregators.ownership import Division, Ownership
from distopt.aggregators.replicas import combine_replicas
from distopt.aggregators.sharded import Sharded
from distopt.aggregators.statistics import average_statistics
from distopt.aggregators.ticket import Ticket

__all__ = [
    "Accumulate",
    "Adasum",
    "Aggregator",
    "AllReduce",
    "Delayed",
    "Canonical",
    "Compressed",
    "GradientAggregator",
    "NotFinite",
    "Grouped",
    "LocalSGD",
    "Division",
    "Ownership",
    "Pair",
    "Sharded",
    "Ticket",
    "average_statistics",
    "broadcast_variables",
    "combine_replicas",
    "first_not_finite",
    "in_step",
    "locate_not_finite",
]
