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
        bucket_bytes: size of the pieces in which gradients are reduced; None measures it at the start.
        prefetch: how many batches are made ahead.
        output: folder for metrics, checkpoints and weights; None writes nothing.

    Raises:
        ValueError: a number is out of range.
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

    def __post_init__(self) -> None:
        if self.bucket_bytes is not None and self.bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be at least 1, got {self.bucket_bytes}")
        for name in ("global_batch", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("steps", "seed", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be finite and not negative, got {self.learning_rate}")
