"""What this machine has for distopt, what is missing, and the command that mends it.

Libraries that can end a process when they are broken (an MPI, CuPy's CUDA bindings) are asked in a
process of their own, so the report comes to its end whatever their state.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from distopt import backend
from distopt.communicators import launcher
from distopt.data import cifar10
from distopt.errors import DataError, LaunchError

__all__ = ["Row", "examine", "run"]

_ASK_SECONDS = 120  # a cold import of CuPy from a network file system takes most of a minute
_RANKS_SECONDS = 60

_ASK_MPI = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
vendor, version = MPI.get_vendor()
print(json.dumps({"vendor": vendor, "version": ".".join(map(str, version))}))
"""

_ASK_CUDA = """
import json, warnings
warnings.simplefilter("ignore")
import cupy
def ask(question):
    try:
        return question(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
def nvrtc():
    from cupy.cuda import nvrtc
    program = nvrtc.createProgram("__global__ void f() {}", "f.cu", (), ())
    nvrtc.compileProgram(program, ())
    return ".".join(map(str, nvrtc.getVersion()))
def nccl():
    from cupy.cuda import nccl
    if not hasattr(nccl, "get_version"):
        raise ImportError("libnccl.so.2 was not found")
    return str(nccl.get_version())
print(json.dumps({"nvrtc": ask(nvrtc), "nccl": ask(nccl)}))
"""

# Each rank adds up rank + 1 over the ranks; 2 ranks that found each other print "2 3".
_TWO_RANKS = """
from mpi4py import MPI
print("ranks", MPI.COMM_WORLD.size, MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank + 1), flush=True)
"""


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        part: what was looked for.
        state: "ok", "missing", or "warning" where it works but not as well as it could.
        found: what is there, or why it is not.
        fix: the command or the step that mends it; empty where there is nothing to mend.
        needed: whether training on CPUs with several ranks needs it.
    """

    part: str
    state: Literal["ok", "warning", "missing"]
    found: str
    fix: str = ""
    needed: bool = False


def run(json_path: str | os.PathLike[str] | None = None, data_dir: str | None = None) -> int:
    """Print the report; write it as JSON too if a path is given.

    Args:
        json_path: file to write: date, versions, and the rows.
        data_dir: where CIFAR-10 is looked for; the default folder if None.

    Returns:
        0 if everything that training on CPUs needs is there, else 1.
    """
    rows = examine(data_dir)
    lacking = [row.part for row in rows if row.needed and row.state == "missing"]
    _show(rows, lacking)
    if json_path is not None:
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "distopt": _version("distopt"),
            "ready_for_cpu_training": not lacking,
            "rows": [asdict(row) for row in rows],
        }
        target = Path(json_path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if lacking else 0


def examine(data_dir: str | None = None) -> list[Row]:
    """Return all rows of the report, in the order in which things depend on each other."""
    return [
        _python(),
        *_packages(),
        _blas(),
        _cores(),
        *_mpi(),
        *_gpu(),
        _extra("numba", "cpu", "faster optimizer loops on a CPU"),
        _extra("matplotlib", "plot", "plots of benchmarks"),
        _extra("torch", "bench", "what the benchmarks compare with"),
        _data(data_dir),
        _slurm(),
    ]


def _show(rows: list[Row], lacking: list[str]) -> None:
    console = Console()
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    width = max(len(row.part) for row in rows)
    for row in rows:
        line = Text.assemble(
            (f"{row.state:8} ", colours[row.state]), (f"{row.part:{width}}  ", "bold"), row.found
        )
        # Lines are not folded: they are also read by grep and pasted into reports.
        console.print(line, soft_wrap=True)
        if row.fix:
            console.print(Text(f"{'':8} {'':{width}}  mend it: {row.fix}"), soft_wrap=True)
    if lacking:
        verdict = f"Training with several ranks needs, and does not find: {', '.join(lacking)}."
    else:
        verdict = "Everything that training on CPUs needs is here."
    console.print(Text("\n" + verdict), soft_wrap=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_version(*distributions: str) -> str | None:
    """Return "name version" of the first distribution that is installed."""
    for name in distributions:
        if version := _version(name):
            return f"{name} {version}"
    return None


def _ask(code: str, without: str | None = None) -> tuple[Any, str]:
    """Run code that prints one JSON value in a Python of its own.

    Args:
        code: what to run.
        without: an environment variable to leave out.

    Returns:
        The value and an empty string, or None and what went wrong.
    """
    environment = {name: value for name, value in os.environ.items() if name != without}
    # This package has to be found there too when it was found by the folder that Python started in.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_ASK_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return None, f"no answer within {_ASK_SECONDS} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    complaint = done.stderr.strip().splitlines()
    return None, complaint[-1] if complaint else f"Python ended with exit code {done.returncode}"


def _python() -> Row:
    # No older one gets here: the package asks for Python 3.11, and older ones can't read its files.
    return Row("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})", needed=True)


def _packages() -> list[Row]:
    rows = [Row("NumPy", "ok", np.__version__, needed=True)]
    for name in ("ml_dtypes", "safetensors", "typer"):
        version = _version(name)
        state = "ok" if version else "missing"
        fix = "" if version else f"pip install {name}"
        rows.append(Row(name, state, version or "not installed", fix, needed=True))
    return rows


def blas_kernels() -> str | None:
    """Return the processor that OpenBLAS chose its kernels for; None with another BLAS."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None  # not Linux
    libraries = {line.split()[-1] for line in mapped.splitlines() if "openblas" in line.lower()}
    for path in sorted(libraries):
        library = ctypes.CDLL(path)
        for name in ("scipy_openblas_get_corename64_", "openblas_get_corename"):
            if hasattr(library, name):
                corename = getattr(library, name)
                corename.restype = ctypes.c_char_p
                return corename().decode()
    return None


def _blas() -> Row:
    config: Any = np.show_config(mode="dicts")
    built = config.get("Build Dependencies", {}).get("blas", {})
    found = f"{built.get('name', 'unknown')} {built.get('version', '')}".strip()
    kernels = blas_kernels()
    if kernels is None:
        return Row("BLAS", "ok", found)
    found = f"{found}, kernels for {kernels}"
    forced = os.environ.get("OPENBLAS_CORETYPE")
    if forced:
        code = "import json; from distopt import doctor; print(json.dumps(doctor.blas_kernels()))"
        natural, _ = _ask(code, without="OPENBLAS_CORETYPE")
        if natural is not None and natural != kernels:
            found += f": forced by OPENBLAS_CORETYPE={forced}, this processor would get {natural}"
            return Row("BLAS", "warning", found, "unset OPENBLAS_CORETYPE")
    return Row("BLAS", "ok", found)


def _cores() -> Row:
    cores = launcher.usable_cores()
    found = f"{cores} usable of {os.cpu_count()}"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    threads = {name: os.environ[name] for name in names if name in os.environ}
    found += "".join(f", {name}={value}" for name, value in threads.items())
    crowded = [name for name, value in threads.items() if value.isdigit() and int(value) > cores]
    if crowded:
        return Row("cores", "warning", found, f"unset {' '.join(crowded)}: more threads than cores")
    return Row("cores", "ok", found)


def _mpi() -> list[Row]:
    mend = "pip install 'distopt[local]', or 'distopt[mpi]' where the machine has an MPI of its own"
    version = _version("mpi4py")
    if version is None:
        return [Row("mpi4py", "missing", "not installed", mend, needed=True)]
    rows = [Row("mpi4py", "ok", version, needed=True)]
    library, complaint = _ask(_ASK_MPI)
    if library is None:
        found = f"mpi4py can't load one: {complaint}"
        rows.append(Row("MPI library", "missing", found, mend, needed=True))
    else:
        found = f"{library['vendor']} {library['version']}"
        rows.append(Row("MPI library", "ok", found, needed=True))
    rows.append(_launcher(library and library["vendor"], mend))
    if all(row.state == "ok" for row in rows):
        rows.append(_two_ranks())
    return rows


def _launcher(library: str | None, mend: str) -> Row:
    here = launcher.find_launcher()
    if here is None:
        return Row("mpirun", "missing", "neither beside Python nor on PATH", mend, needed=True)
    names = {"openmpi": "Open MPI", "mpich": "MPICH"}
    found = f"{here.path} of {names[here.vendor]} {here.version}"
    # Intel MPI and MVAPICH start their ranks as MPICH does.
    if library is not None and (library == "Open MPI") != (here.vendor == "openmpi"):
        found += f", but mpi4py loads {library}: every rank would run alone"
        fix = f"put the mpirun of {library} first on PATH, or {mend}"
        return Row("mpirun", "missing", found, fix, needed=True)
    return Row("mpirun", "ok", found, needed=True)


def _two_ranks() -> Row:
    part = "two ranks"
    fix = "read the message, then try by hand: bash launch/local.sh -n 2 -- train digits"
    begin = time.perf_counter()
    try:
        done = launcher.run(2, [sys.executable, "-c", _TWO_RANKS], timeout_seconds=_RANKS_SECONDS, threads=1)
    except subprocess.TimeoutExpired:
        return Row(part, "missing", f"no answer within {_RANKS_SECONDS} s", fix, needed=True)
    except LaunchError as error:
        return Row(part, "missing", str(error), fix, needed=True)
    said = [line for line in done.stdout.splitlines() if "ranks" in line]
    if done.returncode == 0 and done.stdout.count("ranks 2 3") == 2:
        seconds = time.perf_counter() - begin
        return Row(part, "ok", f"started, added up and ended in {seconds:.1f} s", needed=True)
    complaint = " / ".join(said or done.stderr.strip().splitlines()[-3:])
    found = f"exit code {done.returncode}: {complaint}"
    return Row(part, "missing", found, fix, needed=True)


def _gpu() -> list[Row]:
    cupy = _first_version("cupy-cuda13x", "cupy-cuda12x", "cupy")
    mend = "pip install 'distopt[cuda13]' ('distopt[cuda12]' for a driver older than 580)"
    if cupy is None:
        found = "not installed: training runs on the CPU"
        driver = shutil.which("nvidia-smi")
        if driver:
            found += f", although {driver} says that there is a GPU"
        return [Row("CuPy", "missing", found, mend)]
    rows = [Row("CuPy", "ok", cupy)]
    status = backend.gpu_status()
    fix = "" if status.usable else "needs an NVIDIA GPU and its driver; the CPU is used meanwhile"
    rows.append(Row("GPU", "ok" if status.usable else "missing", status.reason, fix))
    answers, complaint = _ask(_ASK_CUDA)
    for part, key in (("NVRTC", "nvrtc"), ("NCCL", "nccl")):
        version, problem = answers[key] if answers else (None, complaint)
        if version is None:
            rows.append(Row(part, "missing", problem or "no answer", mend))
        else:
            rows.append(Row(part, "ok", version))
    cudnn = _first_version("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
    frontend = _first_version("nvidia-cudnn-frontend")
    if cudnn and frontend:
        rows.append(Row("cuDNN", "ok", f"{cudnn}, {frontend}"))
    else:
        found = ", ".join(name for name in (cudnn, frontend) if name) or "not installed"
        fix = "pip install nvidia-cudnn-cu13 'nvidia-cudnn-frontend>=1.22,<1.29'"
        rows.append(Row("cuDNN", "missing", found, fix))
    return rows


def _extra(distribution: str, extra: str, purpose: str) -> Row:
    version = _version(distribution)
    if version is None:
        found = f"not installed ({purpose})"
        return Row(distribution, "missing", found, f"pip install 'distopt[{extra}]'")
    return Row(distribution, "ok", version)


def _data(data_dir: str | None) -> Row:
    folder = Path(data_dir).expanduser() if data_dir else cifar10.default_data_dir()
    try:
        sources = [cifar10.find(split, folder) for split in ("train", "test")]
    except DataError as error:
        fix = "put the missing files there, or remove the others"
        return Row("CIFAR-10", "warning", str(error), fix)
    if any(source is None for source in sources):
        fix = (
            "`distopt train cifar10` downloads it (170 MB); without a network put "
            "cifar-10-binary.tar.gz there, or name its folder with --data-dir or DISTOPT_DATA"
        )
        return Row("CIFAR-10", "missing", f"not in {folder}", fix)
    return Row("CIFAR-10", "ok", str(sources[0]))


def _slurm() -> Row:
    if job := os.environ.get("SLURM_JOB_ID"):
        tasks = os.environ.get("SLURM_NTASKS", "1")
        nodes = os.environ.get("SLURM_JOB_NODELIST", "one node")
        return Row("Slurm", "ok", f"inside job {job}: {tasks} task(s) on {nodes}")
    if found := shutil.which("sbatch"):
        return Row("Slurm", "ok", f"{found}; submit launch/slurm.sbatch")
    return Row("Slurm", "ok", "not on this machine, and not needed on one machine")
