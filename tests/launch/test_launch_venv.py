"""launch/venv.sh: making, completing and repairing the environment, without a network."""

import signal
import subprocess
import sys
import time

import pytest


def installed(venv):
    done = subprocess.run([venv / "bin" / "distopt", "x"], capture_output=True, text=True)
    return done.stdout.split()


def test_first_run_makes_it_and_the_second_is_done_at_once(scripts):
    venv = scripts.clone / ".venv"
    first = scripts.run("launch/venv.sh")
    assert first.returncode == 0, first.stderr
    assert installed(venv) == ["arguments", "x"]

    begin = time.monotonic()
    second = scripts.run("launch/venv.sh")
    assert second.returncode == 0
    assert "is up to date" in second.stderr
    assert time.monotonic() - begin < 2

    # A change of the project file, or a further extra, is seen; what is there stays.
    keep = venv / "keep"
    keep.touch()
    with (scripts.clone / "pyproject.toml").open("a") as file:
        file.write("# another line\n")
    assert "installing distopt[local]" in scripts.run("launch/venv.sh").stderr
    assert "installing distopt[local,test]" in (scripts.run("launch/venv.sh", "--extras", "test").stderr)
    assert "is up to date" in scripts.run("launch/venv.sh", "--extras", "local").stderr
    assert keep.exists()


def test_an_environment_whose_making_was_interrupted_is_made_anew(scripts):
    venv = scripts.clone / ".venv"
    process = subprocess.Popen(
        ["bash", scripts.clone / "launch/venv.sh"],
        env=scripts.environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (venv / "pyvenv.cfg").exists():
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    subprocess.run(["kill", "-KILL", "--", f"-{process.pid}"], check=True)
    assert process.wait(20) == -signal.SIGKILL
    assert not (venv / "bin" / "distopt").exists()
    litter = venv / "lib" / "litter"
    litter.parent.mkdir(exist_ok=True)
    litter.touch()

    repaired = scripts.run("launch/venv.sh")
    assert repaired.returncode == 0, repaired.stderr
    assert installed(venv) == ["arguments", "x"]
    assert not litter.exists()


def test_an_environment_that_somebody_else_made_is_completed_and_not_cleared(scripts, tmp_path):
    venv = tmp_path / "mine"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (venv / "precious").touch()
    done = scripts.run("launch/venv.sh", DISTOPT_VENV=str(venv))
    assert done.returncode == 0, done.stderr
    assert installed(venv) == ["arguments", "x"]
    assert (venv / "precious").exists()


def test_a_folder_that_is_no_environment_is_left_alone(scripts, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1").write_text("words")
    done = scripts.run("launch/venv.sh", DISTOPT_VENV=str(folder))
    assert done.returncode == 1
    assert "left as it is" in done.stderr
    assert [path.name for path in folder.iterdir() if path.name != "distopt-lock"] == ["chapter1"]


def test_a_failing_installation_says_what_to_do_and_is_taken_up_again(scripts):
    backend = scripts.clone / "backend.py"
    good = backend.read_text()
    backend.write_text("raise OSError('the index is away')")
    failed = scripts.run("launch/venv.sh")
    assert failed.returncode == 1
    for word in ("the index is away", "HTTPS_PROXY", "PIP_FIND_LINKS", "pip download"):
        assert word in failed.stderr
    backend.write_text(good)
    assert scripts.run("launch/venv.sh").returncode == 0


def test_an_old_python_is_named(scripts, program, tmp_path):
    stub = 'case "$*" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n'
    old = program(tmp_path / "old" / "python3", f"#!/bin/sh\n{stub}")
    done = scripts.run("launch/venv.sh", DISTOPT_PYTHON=str(old))
    assert done.returncode == 1
    assert "Python >= 3.11 is needed" in done.stderr
    assert f"{old} is Python 3.9.2" in done.stderr


def test_a_python_without_venv_is_named_with_its_package(scripts, program, tmp_path):
    # As Debian's python3 is without python3-venv: everything but ensurepip.
    bare = program(
        tmp_path / "bare" / "python3",
        f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n',
    )
    done = scripts.run("launch/venv.sh", DISTOPT_PYTHON=str(bare))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode == 1
    assert f"apt-get install python{version}-venv" in done.stderr


@pytest.mark.parametrize("arguments", [["--extra", "x"], ["--extras"]])
def test_wrong_arguments_are_refused(scripts, arguments):
    done = scripts.run("launch/venv.sh", *arguments)
    assert done.returncode == 1
    assert "--extra" in done.stderr
