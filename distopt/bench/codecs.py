"""Codecs in real trainings beside none, and how fast they encode and decode."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distopt.aggregators import codecs
from distopt.aggregators.codecs.powersgd import orthonormal, product
from distopt.bench.report import environment, write_json
from distopt.bench.tables import text_table
from distopt.communicators import launcher
from distopt.errors import DistoptError

__all__ = ["DEFAULT", "Options", "main", "run", "speed"]

DEFAULT = (
    "none",
    "fp16",
    "bf16",
    "int8",
    "ef-int8",
    "int8:stochastic",
    "ef-sign",
    "ef-topk:0.01",
    "ef-topk:0.01:fp16",
    "ef-powersgd:2",
)


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        codecs: names; "none" is uncompressed.
        steps: of each training.
        ranks: of each training.
        global_batch: examples in a step.
        seeds: one training for each.
        learning_rate: of all; None takes the task's.
        task: what is trained.
        data_dir: where the images are.
        error_every: steps between two measurements of the gradient's error.
        numbers: how many float32 are encoded to measure speed; 0 measures none.
        rounds: of that, the least time counts.
        timeout_seconds: for one training.

    Raises:
        ValueError: nothing to run, a number below 1, or a codec that does not exist.
    """

    codecs: tuple[str, ...] = DEFAULT
    steps: int = 1000
    ranks: int = 2
    global_batch: int = 64
    seeds: tuple[int, ...] = (0,)
    learning_rate: float | None = None
    task: str = "cifar10"
    data_dir: str | None = None
    error_every: int = 50
    numbers: int = 1 << 20
    rounds: int = 15
    timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        least = min(self.steps, self.ranks, self.global_batch, self.error_every, self.rounds)
        if not self.codecs or not self.seeds or least < 1 or self.numbers < 0:
            raise ValueError(f"codecs are compared by a codec, a seed and numbers of at least 1; got {self}")
        for name in self.codecs:
            if name != "none":
                codecs.get(name)


def run(options: Options, note: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Measure speed, and train with each codec.

    Args:
        options: what to run.
        note: is given the result so far, after each training.

    Raises:
        DistoptError: a training failed; carries the end of what it printed.
    """
    result: dict[str, Any] = {
        "benchmark": "codecs",
        "options": asdict(options) | {"data_dir": "given" if options.data_dir else "default"},
        "speed": {},
        "trainings": {},
        "environment": environment(),
    }
    if options.numbers:
        for name in dict.fromkeys(name.removeprefix("ef-") for name in options.codecs if name != "none"):
            result["speed"][name] = speed(name, options.numbers, options.rounds)
    for name in options.codecs:
        records = [_train(options, name, seed) for seed in options.seeds]
        result["trainings"][name] = records
        print(
            f"{name}: accuracy {100 * statistics.mean(r['accuracy'] for r in records):.2f} %, "
            f"{statistics.mean(r['seconds'] for r in records):.0f} s",
            flush=True,
        )
        if note is not None:
            note(result)
    return result


def speed(name: str, numbers: int, rounds: int) -> dict[str, float]:
    """Return the speed of one core's encoding and decoding, in GB of float32 per second.

    Args:
        name: of a codec, without error feedback.
        numbers: how many normal numbers are encoded; PowerSGD takes them as a square matrix.
        rounds: each time is the least of so many.
    """
    codec = codecs.get(name)
    values = np.random.default_rng(0).standard_normal(numbers).astype(np.float32)
    if isinstance(codec, codecs.PowerSGD):
        side = int(np.sqrt(numbers))
        matrix = values[: side * side].reshape(side, side)
        start = codec.first_q("w", matrix.shape)
        p = orthonormal(start @ matrix.T)
        q = p @ matrix
        encode = _least(lambda: orthonormal(start @ matrix.T) @ matrix, rounds)
        decode = _least(lambda: product(p, q), rounds)
        nbytes = matrix.nbytes
    elif isinstance(codec, codecs.Codec):
        payload = codec.encode(values)
        encode = _least(lambda: codec.encode(values), rounds)
        decode = _least(lambda: codec.decode(payload, numbers), rounds)
        nbytes = values.nbytes
    else:
        raise ValueError(f"the speed of {name!r} is that of the codec in it")
    return {
        "encode": nbytes / encode / 1e9,
        "decode": nbytes / decode / 1e9,
        "both": nbytes / (encode + decode) / 1e9,
    }


def _least(call: Callable[[], object], rounds: int) -> float:
    seconds: list[float] = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _train(options: Options, codec: str, seed: int) -> dict[str, Any]:
    job = {
        "task": options.task,
        "codec": None if codec == "none" else codec,
        "steps": options.steps,
        "global_batch": options.global_batch,
        "seed": seed,
        "learning_rate": options.learning_rate,
        "data_dir": options.data_dir,
        "every": options.error_every,
    }
    with tempfile.TemporaryDirectory(prefix="distopt-bench-") as folder:
        output = Path(folder) / "record.json"
        program = [sys.executable, "-m", "distopt.bench.codec_training", json.dumps(job), str(output)]
        done = launcher.run(options.ranks, program, timeout_seconds=options.timeout_seconds, threads=1)
        if done.returncode != 0 or not output.exists():
            raise DistoptError(
                f"training with codec {codec} and seed {seed} ended with exit code {done.returncode}:\n"
                f"{(done.stdout + done.stderr)[-2000:]}"
            )
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def main(options: Options, json_path: str | None) -> None:
    """Run, print tables, and write JSON; what is there already after each training."""
    result = run(options, None if json_path in (None, "-") else lambda r: write_json(r, json_path))
    print(
        f"\n{options.task}, {options.steps} steps of {options.global_batch} examples on {options.ranks} "
        f"rank(s), mean of {len(options.seeds)} seed(s):"
    )
    print(text_table(_HEADERS, [_row(name, found) for name, found in result["trainings"].items()]))
    if result["speed"]:
        print(f"\none core, {options.numbers:,} float32 numbers, GB/s of these (least of {options.rounds}):")
        rows = [
            [name, *(f"{found[key]:.2f}" for key in ("encode", "decode", "both"))]
            for name, found in result["speed"].items()
        ]
        print(text_table(["codec", "encode", "decode", "both"], rows))
    write_json(result, json_path)


_HEADERS = ["codec", "accuracy", "averaged", "loss", "test loss", "bytes/step", "gradient off by", "train s"]


def _row(name: str, records: list[dict[str, Any]]) -> list[str]:
    def mean(key: str) -> float:
        return statistics.mean(record[key] for record in records)

    return [
        name,
        f"{100 * mean('accuracy'):.2f} %",
        f"{100 * mean('accuracy_averaged'):.2f} %",
        f"{statistics.mean(statistics.mean(r['losses'][-100:]) for r in records):.4f}",
        f"{mean('test_loss'):.4f}",
        f"{mean('wire_bytes_per_step'):,.0f}",
        f"{statistics.mean(statistics.median(r['relative_errors']) for r in records):.1e}",
        f"{mean('seconds'):.0f}",
    ]
