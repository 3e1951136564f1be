"""What a rank of `bench allreduce` does: time the competitors, in turns, and check their sums."""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distopt.aggregators import AllReduce, Ticket
from distopt.backend import Array, Device
from distopt.bench import peer, resnet50
from distopt.communicators import Communicator, connect, guard
from distopt.errors import LaunchError
from distopt.variables import Arena, Variable

__all__ = ["expected_sum", "main", "measure", "pattern"]

_WARM_UPS = 2
_BYTES_OF_A_TURN = 256 * 2**10  # small arrays are reduced several times in a turn, for the clock's sake
_MOST_OF_A_TURN = 200
_BUCKET = 2**20  # elements of 4 MB

Competitors = Mapping[str, tuple[Callable[[], object], Array]]
"""By name: what reduces, and the array that it reduces in place."""


def pattern(rank: int, count: int) -> Array:
    """Return what a rank brings to the check: small integers, whose sums are exact."""
    return ((np.arange(count) + 3 * rank) % 11).astype(np.float32)


def expected_sum(ranks: int, count: int) -> Array:
    """Return the sum of all ranks' patterns."""
    total = np.zeros(count, np.int64)
    for rank in range(ranks):
        total += (np.arange(count) + 3 * rank) % 11
    return total.astype(np.float32)


def measure(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Measure on the ranks that a launcher started. Collective.

    Args:
        fields: of `allreduce.Options`.

    Returns:
        What was measured, on rank 0; None on the others.
    """
    with (
        connect("mpi") as communicator,
        guard(communicator),
        tempfile.TemporaryDirectory(prefix="distopt-bench-") as folder,
    ):
        if communicator.size == 1:
            raise LaunchError("all_reduce of one rank does nothing; start at least 2")
        torch = None
        if fields["peer"]:
            torch = importlib.import_module("torch")
            peer.set_threads(1)
            # The folder of rank 0 counts, and goes when all are done.
            peer.connect_gloo(communicator, Path(folder) / "meeting")
        sizes = [_measure_size(communicator, size, fields["repeats"], torch) for size in fields["sizes"]]
        model = _measure_model(communicator, fields["repeats"], torch) if fields["model"] else None
        choices: dict[str, str] = getattr(communicator, "all_reduce_choices", {})
        measured = {
            "ranks": communicator.size,
            "most_on_a_host": max(communicator.all_gather_object(communicator.local_size)),
            "communicator": communicator.description,
            "choices": choices,
            "sizes": sizes,
            "model": model,
        }
        if torch is not None:
            torch.distributed.destroy_process_group()
        communicator.barrier()
        return measured if communicator.rank == 0 else None


def _raw(communicator: Communicator, values: Array) -> Callable[[], object]:
    return importlib.import_module("distopt.communicators.mpi").raw_all_reduce(communicator, values)


def _measure_size(communicator: Communicator, size: int, repeats: int, torch: Any) -> dict[str, Any]:
    count = size // 4
    plain = np.zeros(count, np.float32)
    allocated = _allocated(communicator, count)
    start_allocated = communicator.prepare_all_reduce(allocated)
    start_plain = communicator.prepare_all_reduce(plain)
    competitors: dict[str, tuple[Callable[[], object], Array]] = {
        "mpi": (_raw(communicator, plain), plain),
        "allocated": (lambda: start_allocated().wait(), allocated),
        "plain": (lambda: start_plain().wait(), plain),
    }
    if torch is not None:
        tensor = torch.from_numpy(plain)
        competitors["gloo"] = (lambda: torch.distributed.all_reduce(tensor), plain)
    calls = max(1, min(_MOST_OF_A_TURN, _BYTES_OF_A_TURN // size))
    return {"size": size, "competitors": _compare(communicator, competitors, repeats, calls)}


_memory: dict[int, Array] = {}


def _allocated(communicator: Communicator, count: int) -> Array:
    """Return allocated memory, the same again while it is large enough: it lives until the end."""
    have = _memory.get(id(communicator))
    if have is None or have.size < count:
        have = _memory[id(communicator)] = communicator.allocate(count, np.float32)
    return have[:count]


def _compare(
    communicator: Communicator, competitors: Competitors, repeats: int, calls: int
) -> dict[str, dict[str, Any]]:
    """Return the seconds of a call in each round, of the slowest rank, and the number of wrong sums."""
    ranks = communicator.size
    wrong: dict[str, int] = {}
    for name, (call, values) in competitors.items():
        expected = expected_sum(ranks, values.size)
        values[...] = pattern(communicator.rank, values.size)
        communicator.barrier()
        call()
        wrong[name] = sum(communicator.all_gather_object(int((values != expected).sum())))
        values[...] = 0  # sums of sums would overflow
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    names = list(competitors)
    for turn in range(-_WARM_UPS, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call = competitors[name][0]
            communicator.barrier()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            took = (time.perf_counter() - began) / calls
            if turn >= 0:
                seconds[name].append(took)
    everyone = communicator.all_gather_object(seconds)
    return {
        name: {
            "seconds": [max(times) for times in zip(*(s[name] for s in everyone), strict=True)],
            "wrong": w,
        }
        for name, w in wrong.items()
    }


def _measure_model(communicator: Communicator, repeats: int, torch: Any) -> dict[str, Any]:
    """Compare ways to reduce the gradients of ResNet-50, each of which has them where it likes them best."""
    shapes = resnet50.shapes()
    ours, reduced = _aggregated(communicator, shapes)
    plain = np.zeros(sum(int(np.prod(shape)) for shape in shapes), np.float32)
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    tensors = [plain[end - int(np.prod(shape)) : end] for shape, end in zip(shapes, ends, strict=True)]
    each = [_raw(communicator, tensor) for tensor in tensors]
    buckets = [_raw(communicator, plain[a : a + _BUCKET]) for a in range(0, plain.size, _BUCKET)]
    packed = np.zeros_like(plain)
    whole = _raw(communicator, packed)

    def one_buffer() -> None:
        start = 0
        for tensor in tensors:
            packed[start : start + tensor.size] = tensor
            start += tensor.size
        whole()
        start = 0
        for tensor in tensors:
            tensor[...] = packed[start : start + tensor.size]
            start += tensor.size

    competitors: dict[str, tuple[Callable[[], object], Array]] = {
        "mpi": (lambda: [reduce() for reduce in buckets], plain),  # what the others are compared with
        "arena": (ours, reduced),
        "mpi, one by one": (lambda: [reduce() for reduce in each], plain),
        "mpi, one buffer": (one_buffer, plain),
    }
    if torch is not None:
        pieces = [torch.from_numpy(plain[a : a + _BUCKET]) for a in range(0, plain.size, _BUCKET)]
        competitors["gloo, buckets"] = (lambda: [torch.distributed.all_reduce(p) for p in pieces], plain)
    return {
        "tensors": len(shapes),
        "size": plain.nbytes,
        "competitors": _compare(communicator, competitors, repeats, 1),
    }


def _aggregated(
    communicator: Communicator, shapes: list[tuple[int, ...]]
) -> tuple[Callable[[], object], Array]:
    """Return a training step's aggregation, gradients last to first, and the flat array that it reduces."""
    variables = [
        Variable(np.zeros(shape, np.float32), name=f"v{number}") for number, shape in enumerate(shapes)
    ]
    arena = Arena(variables, Device("cpu"), communicator.allocate)
    aggregator = AllReduce(communicator, "sum")
    pairs = [(variable.gradient, variable) for variable in arena.variables]
    gradients = arena.slabs[0].gradients
    return lambda: aggregator.reduce(iter(pairs), Ticket(examples=1.0)), gradients


def main(arguments: list[str] | None = None) -> None:
    """Measure on this rank; rank 0 writes the results."""
    parser = argparse.ArgumentParser(description="A rank of `distopt bench allreduce`.")
    parser.add_argument("fields", help="of Options, as JSON")
    parser.add_argument("output", type=Path, help="file for what was measured, as JSON")
    chosen = parser.parse_args(arguments)
    measured = measure(json.loads(chosen.fields))
    if measured is not None:
        chosen.output.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
