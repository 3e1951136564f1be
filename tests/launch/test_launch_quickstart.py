"""launch/quickstart.sh: what it starts, and how it judges the result."""

import json

import pytest

# Stands for the trainer: writes the metrics file as it does, and tells how it was called.
TRAINER = """
import json, os, pathlib, sys
def main():
    arguments = sys.argv[1:]
    print("distopt", *arguments)
    output = pathlib.Path(arguments[arguments.index("--output") + 1])
    records = [{"step": 1, "loss": 2.3}]
    if os.environ["ACCURACY"]:
        records.append({"step": 2, "test_accuracy": float(os.environ["ACCURACY"])})
    (output / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))
    sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def quickstart(scripts, launcher_stub):
    (scripts.clone / "command.py").write_text(TRAINER)
    stub = str(launcher_stub("mpirun (Open MPI) 5.0.11"))

    def run(*arguments, accuracy, **environment):
        return scripts.run(
            "launch/quickstart.sh",
            *arguments,
            DISTOPT_MPIRUN=stub,
            ACCURACY=accuracy,
            **environment,
        )

    return run


def test_it_trains_digits_with_two_ranks_and_says_what_is_next(quickstart, scripts):
    done = quickstart(accuracy="0.9778")
    assert done.returncode == 0, done.stderr
    output = scripts.clone / "runs" / "quickstart"
    assert f"distopt train digits --seed 0 --output {output}" in done.stdout.splitlines()
    assert "mpirun -n 2 " in done.stdout
    assert "Test accuracy 97.78 % with 2 MPI ranks" in done.stdout
    assert "train cifar10" in done.stdout.partition("What to run next")[2]

    again = quickstart("--ranks", "3", "--seed", "7", accuracy="0.97")
    assert again.returncode == 0
    assert "up to date" in again.stderr
    assert "mpirun -n 3 " in again.stdout
    assert "--seed 7" in again.stdout

    # What went well before must not hide what goes wrong now.
    low = quickstart(accuracy="0.9694")
    assert low.returncode == 1
    assert "test accuracy 96.94 % is below the expected 97 %" in low.stderr
    assert "Everything works" not in low.stdout

    none = quickstart(accuracy="")
    assert none.returncode == 1
    assert "without a test accuracy" in none.stderr

    failed = quickstart(accuracy="0.99", CODE="5")
    assert failed.returncode == 5
    assert "exit code 5" in failed.stderr
    assert "doctor" in failed.stderr
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize("arguments", [["--ranks", "0"], ["--ranks", "two"], ["--rank", "2"]])
def test_wrong_arguments_are_refused_before_anything_is_made(quickstart, scripts, arguments):
    done = quickstart(*arguments, accuracy="0.99")
    assert done.returncode == 1
    assert arguments[0] in done.stderr
    assert not (scripts.clone / ".venv").exists()


@pytest.mark.parametrize(
    "script",
    ["quickstart.sh", "test.sh", "venv.sh", "local.sh", "gpu-check.sh", "slurm.sbatch"],
)
def test_every_script_explains_itself(scripts, script):
    done = scripts.run(f"launch/{script}", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
