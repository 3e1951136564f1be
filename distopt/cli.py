"""`distopt train | evaluate | bench | doctor`: the command line."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distopt.bench.commands import bench
from distopt.command_options import (
    DataDir,
    DeviceOption,
    Json,
    bucket_bytes_of,
    devices_of,
    find_task,
    make_output,
    plain_errors,
    same_error_everywhere,
    say_devices,
)
from distopt.signals import SignalNotes

if TYPE_CHECKING:
    from distopt.data.dataset import Dataset
    from distopt.metrics import MetricsFile, Progress
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
app.add_typer(bench, name="bench")


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
        float | None,
        typer.Option(help="Size of a gradient bucket, in MiB; measured when not given. Not with --adasum."),
    ] = None,
    prefetch: Annotated[int, typer.Option(help="Batches made ahead; 0 makes them in the step.")] = 2,
    progress_style: Annotated[
        str, typer.Option("--progress", help="bar, lines, or auto: a bar on a terminal.")
    ] = "auto",
    device: DeviceOption = None,
    local_steps: Annotated[int, typer.Option(help="Local SGD: steps between averagings of ranks.")] = 1,
    local_start: Annotated[int, typer.Option(help="Steps with exchange before local ones.")] = 0,
    delayed: Annotated[bool, typer.Option("--delayed", help="Apply gradients one step late.")] = False,
    adasum: Annotated[bool, typer.Option("--adasum", help="Combine gradients by Adasum.")] = False,
    canonical: Annotated[
        int | None, typer.Option(help="Canonical shards: the same bits on any number of ranks.")
    ] = None,
    micro_batches: Annotated[int, typer.Option(help="Pieces in which a replica computes its part.")] = 1,
    codec: Annotated[
        str | None,
        typer.Option(help="Encode gradients: fp16, int8, ef-topk:0.01 ...; see docs/codecs.md."),
    ] = None,
    drift_check: Annotated[
        int, typer.Option(help="Steps between checks that ranks hold the same bits; 0: none.")
    ] = 100,
    on_drift: Annotated[str, typer.Option(help="stop, or repair from what most ranks hold.")] = "stop",
    shard_optimizer: Annotated[
        bool, typer.Option("--shard-optimizer", help="Each rank keeps its part of the optimizer's slots.")
    ] = False,
) -> None:
    """Train; start it with mpirun to train on several ranks.

    Exit code 3: stopped by SIGUSR1, SIGTERM or Ctrl-C after a whole step, with a checkpoint in --output, or
    before the first step.
    """
    notes = SignalNotes()
    with plain_errors(), ExitStack() as hearing:
        hearing.enter_context(notes.listening())  # from here on, for what follows takes seconds
        from distopt.communicators import connect, guard
        from distopt.errors import CheckpointError, DataError

        with connect() as communicator:
            # Mistakes that every rank finds alike are told once.
            with same_error_everywhere(communicator):
                from distopt.aggregators import codecs
                from distopt.metrics import Progress
                from distopt.step import make_pieces
                from distopt.trainer import Settings, Trainer

                task = find_task(name)
                settings = Settings(
                    global_batch=task.global_batch if global_batch is None else global_batch,
                    steps=task.steps if steps is None else steps,
                    seed=seed,
                    learning_rate=learning_rate,
                    log_every=log_every,
                    checkpoint_every=checkpoint_every,
                    bucket_bytes=bucket_bytes_of(bucket_mib),
                    prefetch=prefetch,
                    output=output,
                    local_steps=local_steps,
                    local_start=local_start,
                    delayed=delayed,
                    adasum=adasum,
                    canonical=canonical,
                    micro_batches=micro_batches,
                    codec=codec,
                    drift_check_every=drift_check,
                    on_drift=on_drift,  # type: ignore[arg-type]  # which Settings checks
                    shard_optimizer=shard_optimizer,
                )
                if resume and output is None:
                    raise ValueError("--resume needs --output, the folder of the run to go on with")
                chosen, reason = devices_of(device, communicator, replicas_per_rank)
                make_pieces(settings, communicator, replicas_per_rank)
                if codec is not None:
                    codecs.get(codec)
                Progress(settings.steps, 0, False, progress_style)
            with same_error_everywhere(communicator, CheckpointError, DataError):
                make_output(output, communicator)
                devices = say_devices(chosen, reason, communicator, 1 if canonical else None)
                data = task.load("train", data_dir=data_dir, communicator=communicator)
                test = task.load("test", data_dir=data_dir, communicator=communicator)
                trainer = Trainer(task, data, communicator, devices, settings)
                if not resume:
                    trainer.refuse_used_output()
                said = trainer.resume() if resume else ""
            with guard(communicator):
                code = _train(trainer, test, said, progress_style, notes, hearing)
    if code:
        raise typer.Exit(code)


def _train(
    trainer: Trainer, test: Dataset, said: str, progress_style: str, notes: SignalNotes, hearing: ExitStack
) -> int:
    """Train and evaluate; returns the exit code.

    Args:
        trainer: after its start-up.
        test: the examples to evaluate on.
        said: what resuming had to say.
        progress_style: see `Progress`.
        notes: the signals of the start-up.
        hearing: closed when no signal is to be noted any more.
    """
    from distopt.decisions import stop_reasons
    from distopt.metrics import MetricsFile, Progress
    from distopt.trainer import METRICS_FILE

    settings, communicator = trainer.settings, trainer.communicator
    output, leads, first_step = settings.output, communicator.rank == 0, trainer.step
    progress = Progress(settings.steps, first_step, leads, progress_style)
    if said:
        progress.say(said)
    where = f"; go on with --resume --output {output}" if output else ""
    asked = stop_reasons(notes, communicator)
    if asked:
        which = f"step {first_step + 1}" if first_step else "the first step"
        progress.say(f"stopped before {which} because {asked}{where}")
        return STOPPED
    if first_step >= settings.steps:
        progress.say(f"step {settings.steps} was reached before: nothing to train, evaluating only")
    metrics = MetricsFile(
        output / METRICS_FILE if output and leads else None, first_step if first_step else None
    )
    seconds = trainer.run(progress, metrics)
    hearing.close()
    if trainer.stopped:
        progress.say(
            f"stopped after step {trainer.step} because a rank was asked to: {trainer.stop_reason}{where}"
        )
        metrics.close()
        return STOPPED
    if notes.asked is not None:  # it came after the last step, while the checkpoint was written
        signal.raise_signal(notes.asked)
    _finish_training(trainer, test, metrics, progress, seconds, first_step)
    return 0


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
    if settings.canonical is not None:
        progress.say(f"digest after step {trainer.step}: {trainer.digest()}")


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Argument(help="weights.safetensors, or the --output folder of a run.")],
    data_dir: DataDir = None,
    averaged: Annotated[bool, typer.Option(help="Moving averages of the weights, or the weights.")] = True,
    device: DeviceOption = None,
) -> None:
    """Evaluate saved weights on the test data; every example counts once, on any number of ranks."""
    from distopt.communicators import connect

    with plain_errors(), connect() as communicator:
        from distopt import checkpoint as checkpoints
        from distopt.errors import CheckpointError, DataError
        from distopt.evaluation import evaluate_file

        path = weights / "weights.safetensors" if weights.is_dir() else weights
        with same_error_everywhere(communicator):
            checkpoints.load(path)  # each rank reads it; so what it lacks below, it lacks everywhere
            found, reason = devices_of(device, communicator, 1)
        with same_error_everywhere(communicator, CheckpointError, DataError):
            (chosen,) = say_devices(found, reason, communicator)
            task, results = evaluate_file(path, averaged, data_dir, chosen, communicator)
        if communicator.rank == 0:
            print(
                f"{task} test: loss {results['loss']:.4f}, accuracy {100 * results['accuracy']:.2f} % "
                f"({int(results['examples'])} examples, {'averaged' if averaged else 'raw'} weights)"
            )


@app.command()
def digest(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or the --output folder of a run.")],
) -> None:
    """Print one SHA-256 of a checkpoint's weights, slots, moving averages and statistics, to compare runs.

    Of a folder the newest checkpoint is taken. With `train --canonical` it is the same on any number of
    ranks and replicas, on equal processors and libraries.
    """
    from distopt import checkpoint as checkpoints
    from distopt.errors import CheckpointError

    with plain_errors():
        paths = checkpoints.paths(checkpoint) if checkpoint.is_dir() else [checkpoint]
        if not paths:
            raise CheckpointError(f"there is no checkpoint in {checkpoint}; give the --output of a training")
        arrays, manifest = checkpoints.load(paths[-1])
        print(f"digest after step {manifest['step']}: {checkpoints.digest_of(arrays)}")


@app.command()
def doctor(json_path: Json = None, data_dir: DataDir = None) -> None:
    """Tell what is here, what is missing, and the command that mends it."""
    from distopt import doctor as examination

    raise typer.Exit(examination.run(json_path, data_dir))


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; the entry point of `distopt`."""
    return app(arguments if arguments is not None else sys.argv[1:])


if __name__ == "__main__":
    main()
