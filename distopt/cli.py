"""`distopt train | evaluate | bench | doctor`: the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from distopt.backend import Device
    from distopt.communicators import Communicator
    from distopt.data.dataset import Dataset
    from distopt.metrics import MetricsFile, Progress
    from distopt.models import Task
    from distopt.trainer import Trainer

__all__ = ["STOPPED", "app", "main"]

STOPPED = 3
"""Exit code of a training that was asked to stop and did, after a whole step."""

app = typer.Typer(
    name="distopt",
    help="Exact data-parallel training for NumPy and CuPy over MPI.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # guard() prints tracebacks with the rank and host
)
bench = typer.Typer(help="Measure; every command takes --json FILE.", no_args_is_help=True)
app.add_typer(bench, name="bench")

DataDir = Annotated[
    str | None,
    typer.Option(help="Folder with the data; else DISTOPT_DATA, else a cache folder in the home directory."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, or one of them with a number; a usable GPU when not given.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this file as JSON.")]


@app.command()
def train(
    name: Annotated[str, typer.Argument(metavar="TASK", help="cifar10 or digits")],
    data_dir: DataDir = None,
    global_batch: Annotated[int | None, typer.Option(help="Examples per step over all ranks.")] = None,
    steps: Annotated[int | None, typer.Option(help="Number of the last step.")] = None,
    seed: Annotated[int, typer.Option(help="Of initial values, order and augmentation.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="Initial rate; else the task's.")] = None,
    replicas_per_rank: Annotated[int, typer.Option(help="Copies of the model in each rank.")] = 1,
    output: Annotated[
        Path | None, typer.Option(help="Folder for metrics, checkpoints and weights; else none are written.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint there.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    log_every: Annotated[int, typer.Option(help="Steps between lines of progress.")] = 50,
    bucket_mib: Annotated[
        float | None, typer.Option(help="Size of a gradient bucket, in MiB; measured when not given.")
    ] = None,
    prefetch: Annotated[int, typer.Option(help="Batches made ahead; 0 makes them in the step.")] = 2,
    progress_style: Annotated[
        str, typer.Option("--progress", help="bar, lines, or auto: a bar on a terminal.")
    ] = "auto",
    device: DeviceOption = None,
) -> None:
    """Train; start it with mpirun to train on several ranks.

    Exit code 3: stopped by SIGUSR1, SIGTERM or Ctrl-C after a whole step, with a checkpoint in --output.
    """
    from distopt.communicators import connect, guard

    with _plain_errors(), connect() as communicator, guard(communicator):
        from distopt.metrics import MetricsFile, Progress
        from distopt.trainer import METRICS_FILE, Settings, Trainer

        task = _task(name)
        settings = Settings(
            global_batch=task.global_batch if global_batch is None else global_batch,
            steps=task.steps if steps is None else steps,
            seed=seed,
            learning_rate=learning_rate,
            log_every=log_every,
            checkpoint_every=checkpoint_every,
            bucket_bytes=None if bucket_mib is None else int(bucket_mib * (1 << 20)),
            prefetch=prefetch,
            output=output,
        )
        if resume and output is None:
            raise ValueError("--resume needs --output, the folder of the run to go on with")
        devices = _devices(device, communicator, replicas_per_rank)
        data = task.load("train", data_dir=data_dir, communicator=communicator)
        test = task.load("test", data_dir=data_dir, communicator=communicator)
        trainer = Trainer(task, data, communicator, devices, settings)
        if not resume:
            trainer.refuse_used_output()
        said = trainer.resume() if resume else ""
        leads = communicator.rank == 0
        progress = Progress(settings.steps, trainer.step, leads, progress_style)
        if said:
            progress.say(said)
        first_step = trainer.step
        resumed = first_step > 0
        if first_step >= settings.steps:
            progress.say(f"step {settings.steps} was reached before: nothing to train, evaluating only")
        metrics = MetricsFile(
            output / METRICS_FILE if output and leads else None, first_step if resumed else None
        )
        seconds = trainer.run(progress, metrics)
        if trainer.stopped:
            where = f"; go on with --resume --output {output}" if output else ""
            progress.say(f"stopped after step {trainer.step} because a rank was asked to{where}")
            metrics.close()
        else:
            _finish_training(trainer, test, metrics, progress, seconds, first_step)
    if trainer.stopped:
        raise typer.Exit(STOPPED)


def _finish_training(
    trainer: Trainer,
    test: Dataset,
    metrics: MetricsFile,
    progress: Progress,
    seconds: float,
    first_step: int,
) -> None:
    """Evaluate, write the weights, and say how it went."""
    settings = trainer.settings
    raw = trainer.evaluate(test)
    averaged = trainer.evaluate(test, averaged=True)
    results = {
        "train_seconds": seconds,
        "examples_per_second": (trainer.step - first_step) * settings.global_batch / max(seconds, 1e-9),
        "test_accuracy": averaged["accuracy"],
        "test_accuracy_raw": raw["accuracy"],
        "test_loss": averaged["loss"],
    }
    path = trainer.save_weights(**results)
    metrics.write(step=trainer.step, final=True, **results)
    metrics.close()
    if path is not None:
        progress.say(f"weights are in {path}")
    progress.say(
        f"done: {seconds:.1f} s of training, {results['examples_per_second']:,.0f} examples/s, "
        f"test accuracy {100 * averaged['accuracy']:.2f} % with averaged weights, "
        f"{100 * raw['accuracy']:.2f} % with raw ones ({int(averaged['examples'])} examples)"
    )


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Argument(help="weights.safetensors, or the --output folder of a run.")],
    data_dir: DataDir = None,
    averaged: Annotated[bool, typer.Option(help="Moving averages of the weights, or the weights.")] = True,
    device: DeviceOption = None,
) -> None:
    """Evaluate saved weights on the test data; every example counts once, on any number of ranks."""
    from distopt.communicators import connect, guard

    with _plain_errors(), connect() as communicator, guard(communicator):
        from distopt.evaluation import evaluate_file

        path = weights / "weights.safetensors" if weights.is_dir() else weights
        chosen = _devices(device, communicator, 1)[0]
        task, found = evaluate_file(path, averaged, data_dir, chosen, communicator)
        if communicator.rank == 0:
            print(
                f"{task} test: loss {found['loss']:.4f}, accuracy {100 * found['accuracy']:.2f} % "
                f"({int(found['examples'])} examples, {'averaged' if averaged else 'raw'} weights)"
            )


@app.command()
def doctor(json_path: Json = None, data_dir: DataDir = None) -> None:
    """Tell what is here, what is missing, and the command that mends it."""
    from distopt import doctor as examination

    raise typer.Exit(examination.run(json_path, data_dir))


def _task(name: str) -> Task:
    from distopt.models import TASKS

    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _devices(request: str | None, communicator: Communicator, replicas: int) -> list[Device]:
    """Choose this rank's devices, set its threads, and let rank 0 print every rank's choice."""
    from distopt.backend import Device, choose_device

    if replicas < 1:
        raise ValueError(f"--replicas-per-rank must be at least 1, got {replicas}")
    devices: list[Device] = []
    reason = ""
    for number in range(replicas):
        chosen, reason = choose_device(request, communicator.local_rank * replicas + number)
        # On a CPU the replicas are logical devices of one processor.
        devices.append(Device("cpu", number) if chosen.kind == "cpu" else chosen)
    threads = _limit_threads(communicator)
    line = (
        f"rank {communicator.rank} of {communicator.size} on {communicator.host}: "
        f"{', '.join(map(str, devices))}, {threads} thread(s) ({reason})"
    )
    for text in communicator.all_gather_object(line):
        if communicator.rank == 0:
            print(text, flush=True)
    return devices


def _limit_threads(communicator: Communicator) -> int:
    """Give each rank of a host its share of the cores for matrix products, unless the user said how many."""
    from threadpoolctl import threadpool_limits

    asked = os.environ.get("OMP_NUM_THREADS") or os.environ.get("OPENBLAS_NUM_THREADS")
    if asked and asked.isdigit():
        return int(asked)
    cores = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset[int]()
    mine = len(cores) or os.cpu_count() or 1
    # Ranks that a launcher bound have cores of their own; others share theirs.
    ranks = communicator.all_gather_object((communicator.host, cores))
    sharing = sum(1 for host, others in ranks if host == communicator.host and (not cores or others & cores))
    threads = max(1, mine // max(1, sharing))
    threadpool_limits(threads)
    return threads


@bench.command("apply")
def bench_apply(
    size: Annotated[int, typer.Option(help="Number of parameters.")] = 25_000_000,
    repeats: Annotated[int, typer.Option(help="Rounds; in each, every competitor has a turn.")] = 11,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    json_path: Json = None,
) -> None:
    """Adam on a flat array: ours with and without numba, beside PyTorch's fused and foreach."""
    from distopt.bench import apply

    with _plain_errors():
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

    with _plain_errors():
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

    with _plain_errors():
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

    with _plain_errors():
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

    with _plain_errors():
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


@contextmanager
def _plain_errors() -> Generator[None]:
    """Print an error that the user can mend without a traceback, and exit with 1."""
    from distopt.errors import DistoptError

    try:
        yield
    except (DistoptError, ValueError) as error:
        print(f"distopt: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; the entry point of `distopt`."""
    return app(arguments if arguments is not None else sys.argv[1:])


if __name__ == "__main__":
    main()
