"""How to train: what every rank has to be told alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distopt.aggregators.arguments import whole_number

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """How to train; the same on every rank.

    Attributes:
        global_batch: examples in a step, over all replicas of all ranks.
        steps: number of the last step.
        seed: of initial values, order and augmentation.
        learning_rate: initial rate; None takes the task's.
        log_every: steps between two lines of progress.
        checkpoint_every: steps between two checkpoints; one is always written at the end.
        bucket_bytes: size of the pieces in which gradients are reduced; None measures it at the start. Not
            for `adasum`, which has no such pieces.
        prefetch: how many batches are made ahead.
        output: folder for metrics, checkpoints and weights; None writes nothing.
        local_steps: above 1, ranks train by themselves and average every so many steps (local SGD).
        local_start: exchange gradients in the first so many steps before that (post-local SGD).
        delayed: apply the gradients of the step before, while those of this one are exchanged.
        adasum: combine the ranks' gradients by Adasum instead of their mean.
        canonical: number of canonical shards of the global batch: training has the same bits on any number
            of ranks and replicas then. None: ranks share the global batch as it is cheapest.
        micro_batches: in how many pieces each replica computes its part of the global batch, one after the
            other, with one reduction: the activations of one piece are in memory at a time.
        codec: name of the codec that gradients are exchanged by, as `aggregators.codecs.get` reads it; None
            sends them as they are.
        drift_check_every: steps between two checks that all ranks hold the same bits; 0 for none. With local
            steps there are none.
        on_drift: "stop" or "repair"; see `DriftCheck`.
        shard_optimizer: whether each rank keeps only its part of the optimizer's slots; see
            `aggregators.Sharded`.

    Raises:
        ValueError: a number is out of range; two options don't go together, or one would have no effect.
        TypeError: a count is no whole number.
    """

    global_batch: int
    steps: int
    seed: int = 0
    learning_rate: float | None = None
    log_every: int = 50
    checkpoint_every: int = 1000
    bucket_bytes: int | None = None
    prefetch: int = 2
    output: Path | None = None
    local_steps: int = 1
    local_start: int = 0
    delayed: bool = False
    adasum: bool = False
    canonical: int | None = None
    micro_batches: int = 1
    codec: str | None = None
    drift_check_every: int = 100
    on_drift: Literal["stop", "repair"] = "stop"
    shard_optimizer: bool = False

    def __post_init__(self) -> None:
        counts = ("global_batch", "log_every", "checkpoint_every", "local_steps", "micro_batches")
        for name in (*counts, *(() if self.bucket_bytes is None else ("bucket_bytes",))):
            self._keep(name, 1)
        for name in ("steps", "seed", "prefetch", "local_start", "drift_check_every"):
            self._keep(name, 0)
        if self.on_drift not in ("stop", "repair"):
            raise ValueError(f"on_drift must be 'stop' or 'repair', got {self.on_drift!r}")
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and not negative, got {self.learning_rate}")
        if self.local_start and self.local_steps == 1:
            raise ValueError(
                f"local_start={self.local_start} says when local steps begin; give local_steps too"
            )
        self._check_one_way()
        if self.codec is not None and (self.adasum or self.shard_optimizer or self.canonical is not None):
            raise ValueError(
                f"codec={self.codec!r} has no place beside adasum, canonical or shard_optimizer: these "
                "exchange gradients as they are"
            )
        if self.codec is not None and self.local_steps > 1 and self.local_start == 0:
            raise ValueError(
                f"codec={self.codec!r} would never be used: with local_steps={self.local_steps} gradients "
                "are exchanged in the first local_start=0 steps only. Give local_start, or leave the "
                "codec out: variables are averaged as they are"
            )
        if self.bucket_bytes is not None and self.adasum:
            raise ValueError(
                f"bucket_bytes={self.bucket_bytes} has no use with adasum, which exchanges whole gradients; "
                "leave it (--bucket-mib) out"
            )
        if self.canonical is not None:
            self._keep("canonical", 0)
        if self.canonical is not None and not 1 <= self.canonical <= self.global_batch:
            raise ValueError(
                f"canonical must be a number of shards from 1 to the global batch, {self.global_batch}, "
                f"so that each has an example; got {self.canonical}"
            )
        if self.canonical is not None and self.micro_batches != 1:
            raise ValueError(
                f"micro_batches={self.micro_batches} has no place beside canonical={self.canonical}: "
                "canonical shards are computed one after the other already; for less memory take more of them"
            )

    def _keep(self, name: str, least: int) -> None:
        """Check a count, and keep it as an int, which JSON can hold."""
        object.__setattr__(self, name, whole_number(getattr(self, name), name, least))

    def _check_one_way(self) -> None:
        """Raise where more than one way to combine the ranks is asked for."""
        ways = {
            "canonical": self.canonical is not None,
            "local_steps": self.local_steps > 1,
            "delayed": self.delayed,
            "adasum": self.adasum,
            "shard_optimizer": self.shard_optimizer,
        }
        asked = [f"{name}={getattr(self, name)}" for name, is_asked in ways.items() if is_asked]
        if len(asked) > 1:
            raise ValueError(f"these are different ways to combine ranks, choose one: {', '.join(asked)}")
