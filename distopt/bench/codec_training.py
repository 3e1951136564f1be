"""One training with a codec, which `bench codecs` starts on each rank: its losses, bytes and errors."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distopt.aggregators import Aggregator, Compressed, Pair, Ticket
from distopt.aggregators.traffic import sent_by_all_reduce
from distopt.backend import Array, Device, asnumpy
from distopt.communicators import Communicator, connect, guard
from distopt.metrics import MetricsFile, Progress
from distopt.models import TASKS
from distopt.trainer import Settings, Trainer
from distopt.variables import IndexedSlices, Variable

__all__ = ["ErrorProbe", "main"]


class ErrorProbe(Aggregator):
    """Passes everything on, and compares some of the reductions with exact ones.

    Args:
        inner: what reduces, to a mean over the global batch; all gradients are dense.
        communicator: its ranks.
        every: steps between two comparisons; these do an all_reduce of all gradients in float64.

    Attributes:
        errors: |g - exact| / |exact| over all variables, of each step that was compared.
        wire: bytes that this rank sent for gradients, of each step.
    """

    def __init__(self, inner: Aggregator, communicator: Communicator, every: int) -> None:
        super().__init__()
        self._inner, self._communicator, self._every = inner, communicator, every
        self._steps = 0
        self.errors: list[float] = []
        self.wire: list[int] = []

    def reduce(self, pairs: Iterable[Pair], ticket: Ticket | None = None) -> list[Pair]:
        """See `Aggregator.reduce`."""
        compares = self._steps % self._every == 0
        self._steps += 1
        exact: dict[str, Array] = {}
        if compares:
            pairs = list(pairs)
            exact = {v.name: _float64(g, v) for g, v in pairs}
        reduced = self._inner.reduce(pairs, ticket)
        self.ticket, self.ready = self._inner.ticket, self._inner.ready
        self.exposed_seconds, self.wire_bytes = self._inner.exposed_seconds, self._inner.wire_bytes
        self.wire.append(self._sent(reduced))
        if compares:
            self.errors.append(self._relative_error(reduced, exact))
        return reduced

    def after_apply(self, variables: Sequence[Variable]) -> None:
        """See `Aggregator.after_apply`."""
        self._inner.after_apply(variables)

    def state(self) -> dict[str, Array]:
        """See `Aggregator.state`."""
        return self._inner.state()

    def load_state(self, state: Mapping[str, Array], variables: Sequence[Variable]) -> None:
        """See `Aggregator.load_state`."""
        self._inner.load_state(state, variables)

    def _sent(self, reduced: list[Pair]) -> int:
        if isinstance(self._inner, Compressed):
            return self._inner.wire_bytes
        nbytes = sum(variable.size * variable.dtype.itemsize for _, variable in reduced)
        return sent_by_all_reduce(nbytes, self._communicator.size)

    def _relative_error(self, reduced: list[Pair], exact: dict[str, Array]) -> float:
        off = size = 0.0
        for gradient, variable in reduced:
            right = self._communicator.all_reduce(exact[variable.name]).wait() / self.ticket.examples
            off += float(((_float64(gradient, variable) - right) ** 2).sum())
            size += float((right**2).sum())
        return float(np.sqrt(off / size))


def _float64(gradient: Any, variable: Variable) -> Array:
    if gradient is None or isinstance(gradient, IndexedSlices):
        raise ValueError(f"the error is measured of dense gradients; {variable.name!r} has {gradient!r:.40}")
    return asnumpy(gradient).astype(np.float64)


def main(arguments: list[str] | None = None) -> None:
    """Train on this rank; rank 0 writes the record."""
    parser = argparse.ArgumentParser(description="One training of `distopt bench codecs`.")
    parser.add_argument("job", help="task, codec, steps, global_batch, seed, learning_rate, data_dir, every")
    parser.add_argument("output", type=Path, help="file for the record, as JSON")
    chosen = parser.parse_args(arguments)
    job: dict[str, Any] = json.loads(chosen.job)
    with connect() as communicator, guard(communicator):
        record = _train(job, communicator, chosen.output.with_name("metrics.jsonl"))
        if communicator.rank == 0:
            chosen.output.write_text(json.dumps(record))


def _train(job: dict[str, Any], communicator: Communicator, metrics_path: Path) -> dict[str, Any]:
    task = TASKS[job["task"]]
    data = task.load("train", data_dir=job["data_dir"], communicator=communicator)
    test = task.load("test", data_dir=job["data_dir"], communicator=communicator)
    settings = Settings(
        job["global_batch"],
        job["steps"],
        seed=job["seed"],
        learning_rate=job["learning_rate"],
        log_every=1,
        codec=job["codec"],
    )
    trainer = Trainer(task, data, communicator, [Device()], settings)
    probe = trainer.aggregator = ErrorProbe(trainer.aggregator, communicator, job["every"])
    metrics = MetricsFile(metrics_path if communicator.rank == 0 else None)
    seconds = trainer.run(Progress(settings.steps, 0, shown=False), metrics)
    raw, averaged = trainer.evaluate(test), trainer.evaluate(test, averaged=True)
    metrics.close()
    sent = communicator.all_gather_object(sum(probe.wire) / len(probe.wire))
    losses: list[float] = []
    if communicator.rank == 0:
        losses = [json.loads(line)["loss"] for line in metrics_path.read_text().splitlines()]
    return {
        "losses": losses,
        "accuracy": raw["accuracy"],
        "accuracy_averaged": averaged["accuracy"],
        "test_loss": raw["loss"],
        "wire_bytes_per_step": max(sent),
        "relative_errors": probe.errors,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
