"""Aggregators: local gradient sums in, identical global gradients out."""

from distopt.aggregators.aggregator import Aggregator, GradientAggregator, Pair
from distopt.aggregators.allreduce import AllReduce
from distopt.aggregators.broadcast import broadcast_variables
from distopt.aggregators.join import in_step
from distopt.aggregators.not_finite import NotFinite, first_not_finite, locate_not_finite
from distopt.aggregators.replicas import combine_replicas
from distopt.aggregators.ticket import Ticket

__all__ = [
    "Aggregator",
    "AllReduce",
    "GradientAggregator",
    "NotFinite",
    "Pair",
    "Ticket",
    "broadcast_variables",
    "combine_replicas",
    "first_not_finite",
    "in_step",
    "locate_not_finite",
]
