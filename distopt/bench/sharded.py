"""What dividing the optimizer's state costs and saves: exchange and update of the CIFAR-10 network by Adam.

Run it on as many ranks as wanted: mpirun -n 4 python -m distopt.bench.sharded [--steps N].
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from distopt.aggregators import Aggregator, AllReduce, Sharded, Ticket
from distopt.backend import Device
from distopt.communicators import Communicator, connect, guard
from distopt.models import cifar10
from distopt.optimizers import Adam
from distopt.replica import Replica

__all__ = ["Measured", "measure"]


@dataclass(frozen=True)
class Measured:
    """One way to do a step.

    Attributes:
        name: which.
        milliseconds: the shortest step of the slowest rank, from complete gradients to new values.
        slot_bytes: of each rank.
    """

    name: str
    milliseconds: float
    slot_bytes: list[int]


class _Job:
    """Adam on a replica of its own, with gradients that are there already."""

    def __init__(self, communicator: Communicator, aggregator: Aggregator, looks: bool) -> None:
        self._communicator, self._aggregator = communicator, aggregator
        replica = Replica(cifar10.network, (24, 24, 3), Device(), 0)
        self._variables = replica.variables
        for slab in replica.arena.slabs:
            random = np.random.default_rng(communicator.rank)
            slab.gradients[...] = random.standard_normal(slab.gradients.size, np.float32)
        self._gradients = [np.array(slab.gradients) for slab in replica.arena.slabs]
        self._slabs = replica.arena.slabs
        self._looks = looks  # whether gradients are asked for whole, as the Trainer does
        self.optimizer = Adam(gradient_aggregator=aggregator)

    def step(self) -> float:
        """Do a step that all ranks begin together; return its seconds on this rank."""
        for slab, gradients in zip(self._slabs, self._gradients, strict=True):
            slab.gradients[...] = gradients  # a mean of means would become denormal and slow
        self._communicator.barrier()
        began = time.perf_counter()
        pairs = [(variable.gradient, variable) for variable in self._variables]
        if self._looks:
            reduced = self._aggregator.reduce(pairs, Ticket(examples=1.0))
            self.optimizer.apply_gradients(reduced, experimental_aggregate_gradients=False)
        else:
            self.optimizer.apply_gradients(pairs, examples=1.0)
        return time.perf_counter() - began


def measure(communicator: Communicator, steps: int = 60) -> list[Measured]:
    """Return the step times with slots on every rank and divided, taken in turns. Collective.

    Args:
        communicator: the ranks.
        steps: how many of each kind.
    """
    jobs = {
        "undivided": _Job(communicator, AllReduce(communicator), False),
        "divided": _Job(communicator, Sharded(communicator), False),
        "divided, whole gradients": _Job(communicator, Sharded(communicator), True),
    }
    seconds = {name: np.array([0.0] * steps) for name in jobs}
    for number in range(-3, steps):
        for name, job in jobs.items():
            taken = job.step()
            if number >= 0:
                seconds[name][number] = taken
    found: list[Measured] = []
    for name, job in jobs.items():
        slowest = communicator.all_reduce(seconds[name], "max").wait()
        sizes: list[int] = communicator.all_gather_object(job.optimizer.slot_bytes())
        found.append(Measured(name, 1000 * float(slowest.min()), sizes))
    return found


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of each kind")
    arguments = parser.parse_args()
    with connect() as communicator, guard(communicator):
        found = measure(communicator, arguments.steps)
        if communicator.rank == 0:
            print(f"{communicator.size} ranks, {communicator.description}; Adam, the CIFAR-10 network")
            for one in found:
                sizes = ", ".join(f"{size / 1e6:.2f}" for size in one.slot_bytes)
                print(f"{one.name:26} {one.milliseconds:8.2f} ms   slots by rank: {sizes} MB")


if __name__ == "__main__":
    _main()
