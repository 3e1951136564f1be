"""What the README shows is run, and prints what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distopt.communicators import launcher

_README = (Path(__file__).parent.parent / "README.md").read_text()
_BLOCKS = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)


def _promised(block):
    """Return what the comments behind `print(...)` say."""
    return [line.rpartition("  # ")[2] for line in block.splitlines() if re.match(r"print\(.*  # ", line)]


@pytest.mark.parametrize("number", range(1, len(_BLOCKS)))
def test_a_python_block_prints_what_its_comments_say(number, tmp_path):
    script = tmp_path / "block.py"  # a file: formulas are read from their source
    script.write_text(_BLOCKS[number])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert _promised(_BLOCKS[number])
    assert done.stdout.splitlines() == _promised(_BLOCKS[number])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_first_example_gives_the_same_on_any_number_of_ranks(ranks, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(_BLOCKS[0])
    expected = re.search(r"prints `(.*?)`", _README)[1]
    program = [sys.executable, str(script)]
    if ranks == 1:
        done = subprocess.run(program, capture_output=True, text=True, check=False)
    elif launcher.find_launcher() is None:
        pytest.skip("no mpirun or mpiexec here")
    else:
        done = launcher.run(ranks, program, timeout_seconds=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
