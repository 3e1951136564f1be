"""How to train: what every rank has to be told alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

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
        bucket_bytes: size of the pieces in which gradients are reduced.
        prefetch: how many batches are made ahead.
        output: folder for metrics, checkpoints and weights; None writes nothing.
        local_steps: above 1, ranks train by themselves and average every so many steps (local SGD).
        local_start: exchange gradients in the first so many steps before that (post-local SGD).
        delayed: apply the gradients of the step before, while those of this one are exchanged.
        adasum: combine the ranks' gradients by Adasum instead of their mean.

    Raises:
        ValueError: a number is out of range.
    """

    global_batch: int
    steps: int
    seed: int = 0
    learning_rate: float | None = None
    log_every: int = 50
    checkpoint_every: int = 1000
    bucket_bytes: int = 4 << 20
    prefetch: int = 2
    output: Path | None = None
    local_steps: int = 1
    local_start: int = 0
    delayed: bool = False
    adasum: bool = False

    def __post_init__(self) -> None:
        for name in ("global_batch", "log_every", "checkpoint_every", "bucket_bytes", "local_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "seed", "prefetch", "local_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and not negative, got {self.learning_rate}")
        if self.local_start and self.local_steps == 1:
            raise ValueError(
                f"local_start={self.local_start} says when local steps begin; give local_steps too"
            )
        if (self.local_steps > 1) + self.delayed + self.adasum > 1:
            raise ValueError(
                "local_steps, delayed and adasum are different ways to combine ranks, choose one; got "
                f"local_steps={self.local_steps}, delayed={self.delayed}, adasum={self.adasum}"
            )
