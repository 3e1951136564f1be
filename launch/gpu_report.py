"""Write what gpu-check.sh found as JSON.

Usage: `gpu_report.py machine OUT` or `gpu_report.py tests OUT JUNIT_XML`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.memory",
    "pcie.link.gen.current",
    "pcie.link.width.current",
)
_PACKAGES = (
    "numpy",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "nvidia-cuda-nvrtc",
    "nvidia-cuda-runtime",
    "nvidia-cublas",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
    "mpi4py",
    "numba",
    "torch",
)


def _output(*command: str) -> str | None:
    """Return what a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _gpus() -> list[dict[str, str]]:
    query = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in (query or "").splitlines()]
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _packages() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cuda() -> dict[str, Any]:
    # CuPy's own words: what it was built for, what it loaded, what the devices say of themselves.
    code = (
        "import json, cupy; r = cupy.cuda.runtime; "
        "p = r.getDeviceProperties(0); "
        "print(json.dumps({'runtime': r.runtimeGetVersion(), 'driver': r.driverGetVersion(), "
        "'devices': r.getDeviceCount(), 'name': p['name'].decode(), "
        "'compute_capability': f\"{p['major']}.{p['minor']}\", "
        "'multiprocessors': p['multiProcessorCount'], 'memory_bytes': p['totalGlobalMem']}))"
    )
    answer = _output(sys.executable, "-c", code)
    return json.loads(answer) if answer else {}


def machine() -> dict[str, Any]:
    """Return the hardware, the versions, the commit and the date."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "bash launch/gpu-check.sh",
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_since_commit": bool(_output("git", "status", "--porcelain", "--", "distopt")),
        "gpus": _gpus(),
        "cuda": _cuda(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": _packages(),
    }


def tests(report: Path) -> dict[str, Any]:
    """Return the counts and the names of what did not pass, from pytest's JUnit XML."""
    cases = list(ET.parse(report).getroot().iter("testcase"))
    failed: list[str] = []
    skipped: dict[str, str] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif (skip := case.find("skipped")) is not None:
            skipped[name] = skip.get("message", "")
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": failed,
        "skipped": skipped,
        "seconds": sum(float(case.get("time", "0")) for case in cases),
    }


def main(arguments: list[str]) -> None:
    """Write one of the two reports."""
    kind, target = arguments[0], Path(arguments[1])
    content = machine() if kind == "machine" else tests(Path(arguments[2]))
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
