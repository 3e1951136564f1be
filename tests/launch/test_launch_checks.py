"""launch/test.sh and launch/gpu-check.sh: which checks run, and which exit code comes out."""

import importlib.util
import shutil
import sys

import pytest

from distopt import backend

TOOLS = ("ruff", "basedpyright", "shellcheck", "python")


@pytest.fixture
def test_script(scripts, program, tmp_path):
    """Runs test.sh with tools that print how they were called and end with failing[tool]."""
    (scripts.clone / ".ci").mkdir()
    (scripts.clone / ".ci" / "run").write_text("#!/bin/sh\n")

    def run(*arguments, failing=None, **environment):
        for tool in TOOLS:
            code = (failing or {}).get(tool, 0)
            program(tmp_path / "tools" / "bin" / tool, f'#!/bin/sh\necho "{tool} $*"\nexit {code}\n')
        return scripts.run(
            "launch/test.sh", "--no-setup", *arguments,
            DISTOPT_VENV=str(tmp_path / "tools"), **environment,
        )  # fmt: skip

    return run


def test_all_checks_run_and_a_summary_follows(test_script):
    done = test_script()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in ("ruff format --check .", "ruff check .", "python -m pytest"):
        assert line in lines
    assert any(line.startswith("shellcheck ") and "slurm.sbatch" in line for line in lines)
    assert lines[-1] == "All checks passed."


def test_the_first_failure_gives_the_exit_code_and_the_others_still_run(test_script):
    done = test_script(failing={"basedpyright": 3, "python": 4})
    assert done.returncode == 3
    assert "python -m pytest" in done.stdout.splitlines()
    summary = [line.split()[:2] for line in done.stdout.splitlines() if line.endswith(" s")]
    assert summary == [
        ["format", "passed"], ["lint", "passed"], ["types", "FAILED"], ["shell", "passed"],
        ["tests", "FAILED"],
    ]  # fmt: skip


def test_arguments_after_the_dashes_go_to_pytest(test_script):
    done = test_script("--quick", "--", "-k", "two words", "tests/x.py")
    assert "python -m pytest -m not slow -k two words tests/x.py" in done.stdout.splitlines()


def test_an_unknown_argument_is_refused(test_script):
    done = test_script("--fast")
    assert done.returncode == 2
    assert "'--fast'" in done.stderr


def test_a_missing_tool_is_named(test_script, scripts):
    done = test_script()
    assert done.returncode == 0
    done = scripts.run("launch/test.sh", "--no-setup", PATH="/usr/bin:/bin", DISTOPT_VENV="/none")
    assert done.returncode == 1
    assert "is missing" in done.stderr


needs_cupy = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="gpu-check.sh needs CuPy, which is not here"
)


@needs_cupy
@pytest.mark.skipif(backend.gpu_status().usable, reason="there is a GPU: gpu-check.sh would measure")
def test_gpu_check_without_a_gpu_shows_the_skipped_tests_and_succeeds(scripts, tmp_path):
    shutil.rmtree(scripts.clone / "distopt", ignore_errors=True)
    shutil.copytree("distopt", scripts.clone / "distopt", ignore=shutil.ignore_patterns("__pyc*"))
    (scripts.clone / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["gpu: needs a CUDA device"]\n'
    )
    (scripts.clone / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n"
        "@pytest.mark.skip(reason='the sky has no GPU')\n"
        "def test_on_gpu(): pass\n"
        "def test_other(): assert False\n"
    )
    done = scripts.run(
        "launch/gpu-check.sh", "--", "-rs",
        DISTOPT_VENV=sys.prefix, OUT=str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no usable GPU here" in done.stdout
    assert "the sky has no GPU" in done.stdout
    assert "1 skipped, 1 deselected" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.fixture
def gpu_report(scripts):
    spec = importlib.util.spec_from_file_location("gpu_report", scripts.clone / "launch" / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_report_counts_passed_failed_and_skipped_tests(gpu_report, tmp_path):
    xml = tmp_path / "junit.xml"
    xml.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="a" name="one" time="1.5"/>'
        '<testcase classname="a" name="two" time="0.5"><failure message="no"/></testcase>'
        '<testcase classname="b" name="three" time="0"><skipped message="one GPU"/></testcase>'
        '<testcase classname="b" name="four" time="1"/>'
        "</testsuite></testsuites>"
    )
    assert gpu_report.tests(xml) == {
        "passed": 2,
        "failed": ["a::two"],
        "skipped": {"b::three": "one GPU"},
        "seconds": 3.0,
    }


def test_the_machine_report_names_the_versions(gpu_report):
    import numpy as np

    report = gpu_report.machine()
    assert report["packages"]["numpy"] == np.__version__
    assert report["cores"] >= 1
    assert report["processor"]
