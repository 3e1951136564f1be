"""What the tests of the launch scripts share: a clone to try them in, and a way to run them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BASH = shutil.which("bash")

# A project of no dependencies whose build backend is its own: pip installs it without a network.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "distopt"
version = "1.0"
[project.optional-dependencies]
local = []
test = []
"""
BACKEND = '''
import zipfile
METADATA = """Metadata-Version: 2.1
Name: distopt
Version: 1.0
Provides-Extra: local
Provides-Extra: test
"""
WHEEL = "Wheel-Version: 1.0\\nGenerator: here\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "distopt-1.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("distopt-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("distopt-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("distopt-1.0.dist-info/RECORD", "")
        wheel.writestr("distopt_command.py", open("command.py").read())
        entry = "[console_scripts]\\ndistopt = distopt_command:main\\n"
        wheel.writestr("distopt-1.0.dist-info/entry_points.txt", entry)
    return name
build_wheel = build_editable
'''


class Scripts:
    """Runs scripts of a clone in an environment that holds nothing but what the test puts there."""

    def __init__(self, clone: Path, home: Path) -> None:
        self.clone = clone
        self.home = home
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(home),
            "PIP_NO_INDEX": "1",
            "DISTOPT_PYTHON": sys.executable,
        }

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
        return subprocess.run(
            [BASH, str(self.clone / script), *arguments],
            env=self.environment | environment,
            cwd=cwd or self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def program():
    """Writes an executable file: program(path, text)."""
    return write_program


@pytest.fixture
def scripts(tmp_path):
    """A clone of the launch folder, with a small package in place of ours."""
    clone = tmp_path / "clone with spaces"
    shutil.copytree(ROOT / "launch", clone / "launch")
    (clone / "pyproject.toml").write_text(PYPROJECT)
    (clone / "backend.py").write_text(BACKEND)
    (clone / "command.py").write_text("import sys\ndef main():\n    print('arguments', *sys.argv[1:])\n")
    home = tmp_path / "home"
    home.mkdir()
    return Scripts(clone, home)


@pytest.fixture
def launcher_stub(tmp_path):
    """Writes an mpirun that says its version and runs its program once: launcher_stub(version)."""

    def write(version: str, folder: str = "stub") -> Path:
        return write_program(
            tmp_path / folder / "mpirun",
            f"""#!{BASH}
if [ "$1" = --version ]; then echo '{version}'; exit; fi
echo "mpirun $*"
while [ $# -gt 0 ]; do case $1 in */distopt) exec "$@" ;; *) shift ;; esac; done
""",
        )

    return write


@pytest.fixture(scope="session")
def real_mpi():
    """The environment to start this Python's MPI with; skips where there is none."""
    folder = Path(sys.executable).parent
    found = next((folder / n for n in ("mpirun", "mpiexec") if (folder / n).exists()), None)
    launcher = str(found) if found else shutil.which("mpirun") or shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("there is no mpirun beside Python or on PATH")
    return {"DISTOPT_MPIRUN": launcher, "PATH": os.environ["PATH"]}
