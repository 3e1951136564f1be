"""The loop: input, forward, backward with reduction, apply; logging, evaluation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distopt import checkpoint
from distopt.aggregators import (
    Aggregator,
    Pair,
    Ticket,
    average_statistics,
    first_not_finite,
    locate_not_finite,
)
from distopt.backend import Array, Device
from distopt.communicators import Communicator
from distopt.data.dataset import Dataset
from distopt.data.prefetch import Prefetcher
from distopt.data.sampler import Sampler, shard
from distopt.decisions import StopSignals, failed_input, places_not_finite
from distopt.drift import DriftCheck, replicated
from distopt.errors import CheckpointError, NonFiniteError
from distopt.evaluation import evaluate, load_weights
from distopt.exchange import make_aggregator
from distopt.manifest import WAYS, check_manifest
from distopt.metrics import MetricsFile, PhaseClock, Progress
from distopt.models import Task
from distopt.optimizers import ExponentialMovingAverage, LossScaleOptimizer
from distopt.optimizers.loss_scale import all_finite
from distopt.ranks import check_started_alike, from_rank_0
from distopt.replica import Batch, Replica
from distopt.settings import Settings
from distopt.step import Batches, Step, kernels, make_pieces
from distopt.variables import Variable

__all__ = ["Settings", "Trainer"]

WEIGHTS_FILE = "weights.safetensors"
METRICS_FILE = "metrics.jsonl"


class Trainer:
    """Trains a task data-parallel. Every rank makes one, with the same arguments but for the devices.

    Args:
        task: model, data handling and optimizer.
        data: the training examples, whole on every rank.
        communicator: the ranks that train together.
        devices: this rank's devices, one replica on each; the same number on every rank.
        settings: the rest.

    Attributes:
        step: how many steps are done.
        stopped: whether `run` ended because a rank was asked to stop.
        stop_reason: which ranks were asked to, and why.
        drift: the check that all ranks hold the same bits; None where there is none.

    Raises:
        ValueError: the global batch, or the number of canonical shards, is smaller than the number of
            replicas.
        CommunicatorError: ranks have different models or settings; in canonical mode, different processors,
            libraries or numbers of threads for matrix products.
    """

    def __init__(
        self,
        task: Task,
        data: Dataset,
        communicator: Communicator,
        devices: list[Device],
        settings: Settings,
    ) -> None:
        self.task, self.data, self.communicator, self.settings = task, data, communicator, settings
        self._devices = devices
        self._parts = communicator.size * len(devices)
        pieces = make_pieces(settings, communicator, len(devices))
        shape = task.augmentation.output_shape(tuple(data.images.shape[1:]))  # type: ignore[arg-type]
        # What is reduced lies where the ranks of a host can reduce it without a copy.
        memory, agree = communicator.allocate, self._agree_on_start
        self.replicas = [Replica(task.model, shape, devices[0], settings.seed, memory, agree)]
        self.replicas += [Replica(task.model, shape, device, settings.seed) for device in devices[1:]]
        aggregator = make_aggregator(settings, communicator)
        self.optimizer = task.optimizer(
            settings.learning_rate,
            len(data.labels),
            settings.global_batch,
            gradient_aggregator=aggregator,
        )
        if settings.delayed and isinstance(self.optimizer, LossScaleOptimizer) and self.optimizer.dynamic:
            raise ValueError(
                "delayed gradients come a step after the loss scale that they were made with, which a "
                "dynamic one may have changed; use a fixed scale (dynamic=False), or leave `delayed` out"
            )
        self.averages = ExponentialMovingAverage(task.average_decay, num_updates=lambda: self.optimizer.step)
        self.clock = PhaseClock()
        self._work = Step(self.replicas, aggregator, self.optimizer, pieces, self.clock)
        self.step = 0
        self.stopped = False
        self.stop_reason = ""
        # In local steps ranks go their own ways.
        every = settings.drift_check_every if settings.local_steps == 1 else 0
        self.drift = DriftCheck(communicator, every, settings.on_drift) if every else None
        self._sampler = Sampler(len(data.labels), settings.global_batch, settings.seed)
        self._signals = StopSignals()
        for slab in self.replicas[0].arena.slabs:
            communicator.broadcast(slab.values).wait()
        self._copy_to_other_replicas()
        self.averages.track(self.replicas[0].variables)

    @property
    def aggregator(self) -> Aggregator:
        """What combines gradients; may be replaced by one that passes on to it."""
        return self._work.aggregator

    @aggregator.setter
    def aggregator(self, aggregator: Aggregator) -> None:
        if self.settings.canonical is not None:
            raise TypeError("in canonical mode the aggregator is given shards; another can't take its place")
        self._work.aggregator = aggregator

    def _agree_on_start(self, variables: Sequence[Variable]) -> None:
        """Check that all ranks train the same model in the same way."""
        own = {
            "settings": {**asdict(self.settings), "output": None, "replicas": len(self._devices)},
            "devices": [device.kind for device in self._devices],
            "variables": [(v.name, v.shape, str(v.dtype)) for v in variables],
            "data": (self.data.name, self.data.images.shape),
            "matrix products": None if self.settings.canonical is None else kernels(),
        }
        check_started_alike(self.communicator, own)

    def _copy_to_other_replicas(self) -> None:
        first = self.replicas[0]
        for other in self.replicas[1:]:
            with other.device.activate():
                for source, target in zip(first.arena.slabs, other.arena.slabs, strict=True):
                    target.values[...] = other.device.asarray(source.values)

    def run(self, progress: Progress, metrics: MetricsFile) -> float:
        """Train up to `settings.steps`, or until a rank is asked to stop by SIGUSR1, SIGTERM or SIGINT.

        SIGUSR1 counts as preemption in the ticket; all three end the run alike, after a whole step.

        Returns:
            Seconds spent in steps.

        Raises:
            NonFiniteError: the loss is NaN or infinite on some rank; every rank raises it, before the
                variables are touched.
            DriftError: the ranks no longer hold the same bits; every rank raises it.
            CommunicatorError: the input of a rank failed; every rank raises it.
        """
        began = last_logged = time.perf_counter()
        logged_step = self.step
        with (
            self._signals.listening(),
            progress,
            Prefetcher(self._make_batches, self.step, self.settings.prefetch) as batches,
        ):
            while self.step < self.settings.steps:
                rate = self.optimizer.hyperparameter("learning_rate")
                ticket = self.train_step(batches)
                progress.step(self.step)
                if self.step % self.settings.log_every == 0 or self.step == self.settings.steps:
                    now = time.perf_counter()
                    steps = self.step - logged_step
                    self._log(progress, metrics, ticket, rate, steps, now - last_logged)
                    last_logged, logged_step = now, self.step
                if self.drift is not None and self.drift.due(self.step):
                    state = replicated(self.replicas[0].variables, self.optimizer, self.averages)
                    if self.drift.check(self.step, state) is not None:  # it was repaired
                        self._copy_to_other_replicas()
                if ticket.stop or ticket.preempt:
                    self.stopped = True
                    self.stop_reason = self._signals.reasons(self.communicator)
                    break
                if self.step % self.settings.checkpoint_every == 0 and self.step < self.settings.steps:
                    self.save_checkpoint()
        seconds = time.perf_counter() - began
        self.save_checkpoint()
        return seconds

    def train_step(self, batches: Batches) -> Ticket:
        """Do one step; returns the totals of the global batch, the loss with regularisation included."""
        with self.replicas[0].device.activate():
            return self._train_step(batches)

    def _train_step(self, batches: Batches) -> Ticket:
        clock = self.clock
        clock.start("input")
        parts, own = self._input(batches)
        penalty = self.replicas[0].regularization() if self._logs_next() else 0.0
        pairs, own = self._work.run(parts, own)
        clock.start("apply")
        if isinstance(self.optimizer, LossScaleOptimizer):
            pairs = self.optimizer.unscaled(pairs)
        if self._check_finite(own, parts, pairs):
            self._work.accept()
        else:
            self._work.reject()  # the optimizer leaves this step out as well
        self._apply(pairs)
        clock.start(None)
        self.step += 1
        total = self.aggregator.ticket
        loss = total.loss / total.examples + penalty
        return Ticket(total.examples, loss, total.correct, stop=total.stop, preempt=total.preempt)

    def _input(self, batches: Batches) -> tuple[list[Batch], Ticket]:
        """Return this rank's part of the step, and its ticket: empty with an error where input failed."""
        try:
            return batches.get(self.step), self._signals.ticket()
        except Exception as error:
            ticket = failed_input(error, self.communicator)
            shape = self.task.augmentation.output_shape(tuple(self.data.images.shape[1:]))  # type: ignore[arg-type]
            nothing = Batch(np.zeros((0, *shape), np.float32), self.data.labels[:0], self.step)
            return [nothing] * len(self._work.pieces), ticket

    def _apply(self, pairs: list[Pair]) -> None:
        self.optimizer.apply_gradients(pairs, experimental_aggregate_gradients=False)
        if self.aggregator.ready:
            self._copy_to_other_replicas()
            self.averages.apply(self.replicas[0].variables)

    def _logs_next(self) -> bool:
        number = self.step + 1
        return number % self.settings.log_every == 0 or number == self.settings.steps

    def _make_batches(self, step: int) -> list[Batch]:
        """Make this rank's part of a global batch, cut into its pieces. Runs in the input thread."""
        epochs, indices = self._sampler.batch(step)
        batches: list[Batch] = []
        for piece in self._work.pieces:
            chosen = indices[piece.examples]
            images = self.task.augmentation.train(
                self.data.images[chosen], epochs[piece.examples], chosen, self.settings.seed
            )
            labels = self.data.labels[chosen]
            batches.append(Batch(images, labels, step, piece.examples.start, piece.regularized))
        return batches

    def _check_finite(self, own: Ticket, parts: list[Batch], pairs: list[Pair]) -> bool:
        """Raise on every rank when a loss or a global gradient is not finite, and say where.

        Returns:
            False for gradients that are not finite because their scale was too large.
        """
        if not self.aggregator.ticket.not_finite:
            # Every rank has the same gradients, so all decide alike without asking each other.
            bad = [v.name for g, v in pairs if g is not None and not all_finite([(g, v)])]
            if isinstance(self.optimizer, LossScaleOptimizer) and self.optimizer.dynamic:
                return not bad
            somewhere = bool(bad)
            if self.settings.local_steps > 1:  # each has its own
                flag = np.array([float(somewhere)])
                somewhere = bool(self.communicator.all_reduce(flag).wait()[0])
            if somewhere:
                names = ", ".join(bad) or "another rank"
                raise NonFiniteError(
                    f"the loss is finite at step {self.step + 1}, but the gradients of {names} are "
                    f"not: {self._places(parts, pairs)}. The variables were left as they were. Lower the "
                    "learning rate, or look at the data."
                )
            return True
        reason = ""
        if own.not_finite:
            wrong = sum(int(np.sum(~np.isfinite(b.images).all(axis=(1, 2, 3)))) for b in parts)
            cause = f"{wrong} of its images are not finite" if wrong else "its images are finite"
            reason = f"rank {self.communicator.rank} on {self.communicator.host}: loss {own.loss}, {cause}"
        reasons = [r for r in self.communicator.all_gather_object(reason) if r]
        raise NonFiniteError(
            f"the loss is not finite at step {self.step + 1}: {'; '.join(reasons)}. In the backward pass: "
            f"{self._places(parts, pairs) or 'all gradients are finite'}. The variables were left as they "
            f"were. Lower the learning rate (now {self.optimizer.hyperparameter('learning_rate'):g}), clip "
            "gradients, or look at the data."
        )

    def _places(self, parts: list[Batch], pairs: list[Pair]) -> str:
        """Return where the gradients of this step are not finite, statistics set back. Collective."""
        self._work.reject()
        if self.settings.local_steps > 1 and self.step >= self.settings.local_start:  # not reduced: here
            return "; ".join(map(str, locate_not_finite(pairs, self.communicator)))
        if self.settings.delayed:
            late = first_not_finite(pairs)
            return "these are of the step before" + (f": {late.what}" if late is not None else "")
        scaling = self.optimizer if isinstance(self.optimizer, LossScaleOptimizer) else None
        pieces = zip(self._work.pieces, parts, strict=True)
        work = [(self.replicas[piece.replica], batch) for piece, batch in pieces]
        scale = 1.0 if scaling is None else scaling.loss_scale
        return places_not_finite(self.communicator, work, scale, first_not_finite(pairs))

    def _log(
        self,
        progress: Progress,
        metrics: MetricsFile,
        ticket: Ticket,
        rate: float,
        steps: int,
        seconds: float,
    ) -> None:
        phases = self.clock.take()
        examples = steps * self.settings.global_batch / seconds
        step_ms = 1000 * seconds / steps
        exposed_ms = 1000 * phases.get("exposed communication", 0.0) / steps
        progress.log(self.step, ticket.loss, rate, examples, step_ms, exposed_ms)
        metrics.write(
            step=self.step,
            examples=self.step * self.settings.global_batch,
            loss=ticket.loss,
            accuracy=ticket.correct / ticket.examples,
            learning_rate=rate,
            examples_per_second=examples,
            ms_per_step=step_ms,
            phases_ms={name: 1000 * value / steps for name, value in phases.items()},
        )

    def evaluate(self, data: Dataset, averaged: bool = False) -> dict[str, float]:
        """Return loss and accuracy over a data set, every example counted once over all ranks. Collective.

        Args:
            data: the examples, whole on every rank.
            averaged: use the moving averages of the weights instead of the weights.
        """
        self._settle()
        weights = self.averages.averaged_weights() if averaged else nullcontext()
        with self.replicas[0].device.activate(), weights:
            return evaluate(self.replicas[0], self.task, data, self.communicator)

    def _settle(self) -> None:
        """Make one model of those of all replicas of all ranks. Collective."""
        self._agree_on_statistics()
        others = [*self.optimizer.weights, *self.averages.variables()]
        self.aggregator.settle(self.replicas[0].variables, others)
        self._copy_to_other_replicas()

    def _agree_on_statistics(self) -> None:
        """Give all replicas of all ranks the mean of their statistics, weighted by examples. Collective.

        Each replica's batch normalization follows its own batches; the model that is evaluated and saved is
        one.
        """
        if self._parts == 1 or self.settings.canonical is not None:  # one, or equal already
            return
        batch, first = self.settings.global_batch, self.communicator.rank * len(self.replicas)
        parts = [shard(batch, first + number, self._parts) for number in range(len(self.replicas))]
        average_statistics(
            [replica.statistics for replica in self.replicas],
            self.communicator,
            [part.stop - part.start for part in parts],
        )

    def weights(self) -> dict[str, Array]:
        """Return the weights and their moving averages, and this rank's statistics, by name."""
        found = {variable.name: variable.numpy() for variable in self.replicas[0].statistics}
        for variable in self.replicas[0].variables:
            found[variable.name] = variable.numpy()
            average = self.averages.average(variable)
            if average is not None:
                found[self.averages.average_name(variable)] = average.numpy()
        return found

    def _manifest(self) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "step": self.step,
            "examples": self.step * self.settings.global_batch,
            "global_batch": self.settings.global_batch,
            "seed": self.settings.seed,
            "data": f"{self.data.name}, {len(self.data.labels)} examples",
            "optimizer": self.optimizer.get_name(),
            "canonical": self.settings.canonical,
            **{name: getattr(self.settings, name) for name in WAYS},
        }

    def save_checkpoint(self) -> None:
        """Write weights, moving averages and slots on rank 0; nothing where there is no output folder.

        Collective where the model has statistics, the aggregator keeps something or lets ranks differ, or
        slots are divided.
        """
        self._settle()
        kept = self.aggregator.state()
        writes = self.settings.output is not None and self.communicator.rank == 0
        slots = self.optimizer.state() if writes or self.optimizer.is_divided else {}
        if self.settings.output is None or not writes:
            return
        arrays = self._arrays(slots) | {f"aggregator:{name}": value for name, value in kept.items()}
        path = checkpoint.checkpoint_path(self.settings.output, self.step)
        checkpoint.save(path, arrays, self._manifest())
        checkpoint.prune(self.settings.output, keep=2)

    def _arrays(self, slots: dict[str, Array]) -> dict[str, Array]:
        weights = {f"weights:{name}": value for name, value in self.weights().items()}
        return weights | {f"slots:{name}": value for name, value in slots.items()}

    def digest(self) -> str:
        """Return a SHA-256 of all that training has made: weights, slots, averages, statistics.

        In canonical mode it is the same on every rank, and on any number of ranks; and that which `distopt
        digest` tells of a checkpoint of this step.
        """
        return checkpoint.digest_of(self._arrays(self.optimizer.state()))

    def save_weights(self, **results: float) -> Path | None:
        """Write the weights with results on rank 0, for `distopt evaluate`; returns the file."""
        if self.settings.output is None or self.communicator.rank != 0:
            return None
        path = self.settings.output / WEIGHTS_FILE
        checkpoint.save(path, self.weights(), {**self._manifest(), **results})
        return path

    def resume(self) -> str:
        """Go on from the newest checkpoint in the output folder, if there is one. Collective.

        Returns:
            A sentence that says from which step training goes on, and which files could not be used.

        Raises:
            CheckpointError: it is of another task, batch, seed or model, or can't be read.
        """
        if self.settings.output is None:
            raise CheckpointError("there is no output folder to resume from; give --output")
        # Rank 0 reads and all get what it read: the folder need not be visible to the others.
        loaded = from_rank_0(self.communicator, lambda: checkpoint.latest(Path(self.settings.output or "")))
        if loaded is None:
            return f"no checkpoint in {self.settings.output}: starting from the beginning"
        path, arrays, manifest, passed_over = loaded
        check_manifest(path, manifest, self._manifest())
        self._load(path, arrays)
        self.step = int(manifest["step"])
        warnings = "".join(f"warning: {problem}\n" for problem in passed_over)
        return f"{warnings}resumed after step {self.step}"

    def refuse_used_output(self) -> None:
        """Raise on every rank when the output folder holds checkpoints of an earlier run. Collective.

        Raises:
            CheckpointError: it does. Their steps would mix with this run's.
        """

        def look() -> None:
            found = checkpoint.paths(self.settings.output) if self.settings.output is not None else []
            if found:
                raise CheckpointError(
                    f"{self.settings.output} holds checkpoints of an earlier run ({found[-1].name}). Go on "
                    "with it by --resume, choose another --output, or delete the folder."
                )

        from_rank_0(self.communicator, look)

    def _load(self, path: Path, arrays: dict[str, Array]) -> None:
        weights = {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith("weights:")}
        load_weights(path, self.replicas[0], weights)
        slots = {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith("slots:")}
        self.optimizer.load_state(slots, self.replicas[0].variables)
        kept = {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith("aggregator:")}
        self.aggregator.load_state(kept, self.replicas[0].variables)
        for variable in self.replicas[0].variables:
            average = self.averages.average(variable)
            if average is not None:
                average.assign(weights[self.averages.average_name(variable)])
        self._copy_to_other_replicas()
        for other in self.replicas[1:]:
            load_weights(path, other, weights)
