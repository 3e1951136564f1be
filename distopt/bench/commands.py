"""`distopt bench ...`: the command line of the measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distopt.command_options import DataDir, DeviceOption, Json, choose_devices, find_task, plain_errors

__all__ = ["bench"]

bench = typer.Typer(help="Measure; every command takes --json FILE.", no_args_is_help=True)


@bench.command("apply")
def bench_apply(
    size: Annotated[int, typer.Option(help="Number of parameters.")] = 25_000_000,
    repeats: Annotated[int, typer.Option(help="Rounds; in each, every competitor has a turn.")] = 11,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    json_path: Json = None,
) -> None:
    """Adam on a flat array: ours with and without numba, beside PyTorch's fused and foreach."""
    from distopt.bench import apply

    with plain_errors():
        if dtype != "float32" and dtype != "float64":
            raise ValueError(f"--dtype must be float32 or float64, got {dtype!r}")
        apply.main(size, repeats, dtype, _text(json_path))


@bench.command("step")
def bench_step(
    batch: Annotated[int, typer.Option(help="Examples in a step.")] = 128,
    threads: Annotated[int, typer.Option(help="Of every competitor.")] = 1,
    rounds: Annotated[int, typer.Option(help="In each, every competitor has a turn.")] = 7,
    steps: Annotated[int, typer.Option(help="Training steps in a turn.")] = 5,
    peer: Annotated[bool, typer.Option(help="Measure PyTorch too, where it is installed.")] = True,
    device: DeviceOption = None,
    json_path: Json = None,
) -> None:
    """One process: images/s beside PyTorch, the phases of a step, and memory."""
    from distopt.bench import step

    with plain_errors():
        step.main(step.Options(batch, threads, rounds, steps, peer, device), _text(json_path))


@bench.command("scaling")
def bench_scaling(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, as in 1,2,4.")] = "1,2,4",
    mode: Annotated[str, typer.Option(help="weak, strong or both.")] = "both",
    batch_per_rank: Annotated[int, typer.Option(help="Examples of a rank, in weak scaling.")] = 128,
    global_batch: Annotated[int, typer.Option(help="Examples of all ranks, in strong scaling.")] = 256,
    steps: Annotated[int, typer.Option(help="Timed steps of a run.")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 5,
    rounds: Annotated[int, typer.Option(help="Runs of each number of ranks, in turns.")] = 3,
    threads: Annotated[int, typer.Option(help="Of each rank.")] = 1,
    ceiling: Annotated[
        bool, typer.Option("--ceiling", help="Measure ranks that don't communicate too: the machine's limit.")
    ] = False,
    peer: Annotated[bool, typer.Option("--peer", help="Measure PyTorch's DDP (gloo) too.")] = False,
    device: DeviceOption = None,
    json_path: Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results into this PNG file.")] = None,
) -> None:
    """Weak and strong scaling over ranks of this machine, which mpirun starts."""
    from distopt.bench import scaling

    with plain_errors():
        options = scaling.Options(
            ranks=_numbers("--ranks", ranks),
            modes=("weak", "strong") if mode == "both" else (mode,),
            batch_per_rank=batch_per_rank,
            global_batch=global_batch,
            steps=steps,
            warmup=warmup,
            rounds=rounds,
            threads=threads,
            ceiling=ceiling,
            peer=peer,
            device=device,
        )
        scaling.main(options, _text(json_path), _text(plot))


@bench.command("allreduce")
def bench_allreduce(
    ranks: Annotated[int, typer.Option(help="How many mpirun starts; without effect under mpirun.")] = 2,
    sizes: Annotated[
        str, typer.Option(help="Bytes, by factors of 4 as in 4..256M, or as in 4,1K; or none.")
    ] = ("4..256M"),
    repeats: Annotated[int, typer.Option(help="Rounds; in each, every competitor has a turn.")] = 15,
    peer: Annotated[bool, typer.Option("--peer", help="Measure PyTorch's gloo too.")] = False,
    model: Annotated[
        str | None, typer.Option(help="resnet50: reduce its gradients, too, as a training step does.")
    ] = None,
    json_path: Json = None,
) -> None:
    """all_reduce of 4 B to 256 MB on ranks of this machine: ours beside raw MPI, as nccl-tests prints it."""
    from distopt.bench import allreduce

    with plain_errors():
        chosen = [] if sizes == "none" else allreduce.parse_sizes(sizes)
        allreduce.main(allreduce.Options(ranks, chosen, repeats, peer, model), _text(json_path))


@bench.command("convergence")
def bench_convergence(
    seeds: Annotated[str, typer.Option(help="One training for each, as in 0,1,2.")] = "0,1,2",
    ranks: Annotated[int, typer.Option(help="Of the trainings.")] = 2,
    steps: Annotated[int, typer.Option(help="Of the trainings.")] = 2000,
    global_batch: Annotated[int, typer.Option(help="Examples in a step.")] = 128,
    curves: Annotated[str, typer.Option(help="Numbers of ranks to compare losses of.")] = "1,2,3,4",
    curve_steps: Annotated[int, typer.Option(help="How many losses.")] = 50,
    data_dir: DataDir = None,
    json_path: Json = None,
) -> None:
    """Test accuracy on real CIFAR-10 for several seeds, and equal losses on any number of ranks."""
    from distopt.bench import convergence

    with plain_errors():
        options = convergence.Options(
            seeds=tuple(_numbers("--seeds", seeds)),
            ranks=ranks,
            steps=steps,
            global_batch=global_batch,
            curves=tuple(_numbers("--curves", curves)),
            curve_steps=curve_steps,
            data_dir=data_dir,
        )
        convergence.main(options, _text(json_path))


@bench.command("codecs")
def bench_codecs(
    codecs: Annotated[str | None, typer.Option(help="Names with commas between; none is one too.")] = None,
    steps: Annotated[int, typer.Option(help="Of each training.")] = 1000,
    ranks: Annotated[int, typer.Option(help="Of each training.")] = 2,
    global_batch: Annotated[int, typer.Option(help="Examples in a step.")] = 64,
    seeds: Annotated[str, typer.Option(help="One training for each, as in 0,1,2.")] = "0",
    learning_rate: Annotated[float | None, typer.Option(help="Of all; else the task's.")] = None,
    task: Annotated[str, typer.Option(help="cifar10 or digits.")] = "cifar10",
    data_dir: DataDir = None,
    json_path: Json = None,
) -> None:
    """Train with each codec beside none: accuracy, loss, bytes on the wire, error of the gradient, speed."""
    from distopt.bench import codecs as bench_of_codecs

    with plain_errors():
        find_task(task)
        options = bench_of_codecs.Options(
            codecs=bench_of_codecs.DEFAULT if codecs is None else tuple(codecs.split(",")),
            steps=steps,
            ranks=ranks,
            global_batch=global_batch,
            seeds=tuple(_numbers("--seeds", seeds)),
            learning_rate=learning_rate,
            task=task,
            data_dir=data_dir,
        )
        bench_of_codecs.main(options, _text(json_path))


@bench.command("canonical")
def bench_canonical(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, as in 2,4.")] = "2,4",
    shards: Annotated[str, typer.Option(help="Numbers of shards to try beside that of the ranks.")] = "8",
    global_batch: Annotated[int, typer.Option(help="Examples in a step, over all ranks.")] = 128,
    steps: Annotated[int, typer.Option(help="Training steps in a turn.")] = 5,
    rounds: Annotated[int, typer.Option(help="In each, everything has a turn.")] = 9,
    largest_mib: Annotated[int, typer.Option(help="Largest array to exchange, in MiB.")] = 256,
    device: DeviceOption = None,
    json_path: Json = None,
) -> None:
    """Canonical mode beside plain training, and its exchange beside all_reduce from 4 KiB on."""
    from distopt.bench import canonical

    with plain_errors():
        options = canonical.Options(
            ranks=_numbers("--ranks", ranks),
            shards=_numbers("--shards", shards),
            global_batch=global_batch,
            steps=steps,
            rounds=rounds,
            largest_bytes=largest_mib << 20,
            device=device,
        )
        canonical.main(options, _text(json_path))


@bench.command("drift")
def bench_drift(
    batch: Annotated[int, typer.Option(help="Examples of each rank in a step.")] = 128,
    rounds: Annotated[int, typer.Option(help="One step and one check in each.")] = 30,
    every: Annotated[int, typer.Option(help="Steps between two checks.")] = 100,
    device: DeviceOption = None,
    json_path: Json = None,
) -> None:
    """The drift check beside a training step; start it with mpirun."""
    from distopt.communicators import connect, guard

    with plain_errors(), connect() as communicator, guard(communicator):
        from distopt.bench import drift

        (chosen,) = choose_devices(device, communicator, 1)
        drift.main(communicator, chosen, batch, rounds, every, _text(json_path))


@bench.command("sparse")
def bench_sparse(
    rows: Annotated[int, typer.Option(help="Of the table.")] = 50_000,
    width: Annotated[int, typer.Option(help="Numbers in a row.")] = 64,
    rounds: Annotated[int, typer.Option(help="One exchange in each way in each.")] = 7,
    device: DeviceOption = None,
    json_path: Json = None,
) -> None:
    """Sparse gradients as rows and as a whole table; start it with mpirun."""
    from distopt.communicators import connect, guard

    with plain_errors(), connect() as communicator, guard(communicator):
        from distopt.bench import sparse

        (chosen,) = choose_devices(device, communicator, 1)
        sparse.main(communicator, chosen, rows, width, rounds, _text(json_path))


@bench.command("overlap")
def bench_overlap(
    batch: Annotated[int, typer.Option(help="Examples of a rank.")] = 128,
    rounds: Annotated[int, typer.Option(help="In each, every kind of step has a turn.")] = 20,
    bucket_mib: Annotated[float | None, typer.Option(help="Bucket in MiB; measured when not given.")] = None,
    hosts: Annotated[int, typer.Option(help="Pretended hosts (root on Linux), unless under mpirun.")] = 2,
    rate: Annotated[str, typer.Option(help="Of their network cards, as tc writes it.")] = "1gbit",
    trace: Annotated[Path | None, typer.Option(help="File for the timeline, to open in Perfetto.")] = None,
    json_path: Json = None,
) -> None:
    """How much of the communication hides behind the backward pass, between hosts."""
    from distopt.bench import overlap

    with plain_errors():
        size = None if bucket_mib is None else int(bucket_mib * (1 << 20))
        options = overlap.Options(batch, rounds, size, hosts, rate, _text(trace))
        overlap.main(options, _text(json_path))


def _numbers(option: str, text: str) -> list[int]:
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"{option} must be numbers with commas between, as in 1,2,4; got {text!r}")
    return [int(number) for number in numbers]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
