"""Aggregators: local gradient sums in, identical global gradients out."""

from distopt.aggregators.aggregator import Aggregator, GradientAggregator, Pair
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.broadcast import broadcast_variables
from distopt.aggregators.ownership import Division, Ownership
from distopt.aggregators.replicas import combine_replicas
from distopt.aggregators.sharded import Sharded
from distopt.aggregators.ticket import Ticket

__all__ = [
    "Aggregator",
    "AllReduce",
    "Division",
    "GradientAggregator",
    "Ownership",
    "Pair",
    "Sharded",
    "Ticket",
    "broadcast_variables",
    "combine_replicas",
]
