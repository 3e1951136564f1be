"""Who talks to whom: ranks, and the collectives between them.

`connect()` gives the communicator of this process: one rank by itself, or MPI under a launcher.
"""

from distopt.communicators.communicator import Communicator, Pending, ReduceOp
from distopt.communicators.connect import connect
from distopt.communicators.gathering import GatheringCommunicator
from distopt.communicators.guard import guard
from distopt.communicators.local import LocalCommunicator
from distopt.communicators.sum_order import SumOrder

__all__ = [
    "Communicator",
    "GatheringCommunicator",
    "LocalCommunicator",
    "Pending",
    "ReduceOp",
    "SumOrder",
    "connect",
    "guard",
]
