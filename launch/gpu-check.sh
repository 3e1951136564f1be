#!/usr/bin/env bash
# What only a GPU can show: the tests marked gpu, and the benchmarks, with the machine they ran on.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/gpu-check.sh [--tests-only] [-- PYTEST-ARGUMENTS]

Runs the tests marked gpu, then the benchmarks on the GPU, and writes JSON files into one folder:
  machine.json    GPU, driver, CPU, versions, git commit, date, command
  doctor.json     what `distopt doctor` says
  tests.json      how many tests passed, failed and were skipped, and why
  step.json      what `distopt bench step` says on the GPU, beside PyTorch where that is installed
On a machine without a usable GPU the same tests are skipped with the reason; it says so, writes nothing,
and ends with exit code 0.

  --tests-only   leave the benchmarks out
  --help         this text
  -- ...         handed to pytest

environment:
  OUT            folder for the results (default: docs/results/gpu in the clone)
  DISTOPT_VENV   environment to use where the python3 on PATH lacks NumPy, CuPy or pytest (default: .venv)
Nothing is installed: a python3 that can import NumPy and CuPy is used as it is, and the package from here.

exit code: that of the first part that failed, else 0
HELP
}

benchmarks=1
while [ $# -gt 0 ]; do
  case $1 in
    --tests-only) benchmarks=0 ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *)
      usage >&2
      printf "\nunknown argument '%s'; pytest's own arguments come after --\n" "$1" >&2
      exit 2
      ;;
  esac
  shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${DISTOPT_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
out=${OUT:-$root/docs/results/gpu}
case $out in /*) ;; *) out=$PWD/$out ;; esac
cd "$root"

needs='numpy cupy pytest pytest_timeout typer rich safetensors ml_dtypes'
lacks() { # PYTHON: prints the packages that it can't find
  # shellcheck disable=SC2086 # a list of words
  "$1" -c 'import importlib.util as u, sys
print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])' $needs 2>/dev/null || echo "$needs"
}
python=
for candidate in python3 "$venv/bin/python" python; do
  command -v "$candidate" >/dev/null 2>&1 || continue
  if [ -z "$(lacks "$candidate")" ]; then
    python=$(command -v "$candidate")
    break
  fi
done
if [ -z "$python" ]; then
  candidate=python3
  [ ! -x "$venv/bin/python" ] || candidate=$venv/bin/python
  printf '%s\n' "gpu-check: $candidate lacks: $(lacks "$candidate")" \
    "Install them: bash launch/venv.sh --extras local,test (add cuda13 for NCCL and cuBLAS)," \
    "or without a network unpack their wheels into a folder and name it in PYTHONPATH." >&2
  exit 1
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
printf 'gpu-check: %s\n' "$python ($("$python" --version))"

usable=0
reason=$("$python" -c 'from distopt import backend
status = backend.gpu_status()
print(status.reason)
raise SystemExit(0 if status.usable else 3)') && usable=1 || [ $? = 3 ] || exit 1
if [ $usable = 0 ]; then
  printf 'gpu-check: no usable GPU here: %s\nThe tests marked gpu are skipped:\n' "$reason"
  "$python" -m pytest -m gpu "$@" </dev/null
  printf 'gpu-check: nothing was measured and nothing written; run this on a machine with a GPU.\n'
  exit 0
fi

printf 'gpu-check: %s; results in %s\n' "$reason" "$out"
mkdir -p "$out"
rm -f "$out"/{machine,doctor,tests,step}.json
worst=0
part() { # COMMAND...: run it, remember the first failure
  local code=0
  printf '\n--- %s\n' "$*"
  "$@" </dev/null || code=$?
  [ $code = 0 ] || printf 'gpu-check: exit code %d: %s\n' $code "$*" >&2
  [ $worst != 0 ] || worst=$code
}
# shellcheck disable=SC2329 # called by part
distopt() { "$python" -c 'import sys; from distopt.cli import main; sys.exit(main())' "$@"; }

"$python" launch/gpu_report.py machine "$out/machine.json"
# Its exit code is about MPI, which a machine for this check may lack.
"$python" -c 'import sys; from distopt import doctor; doctor.run(sys.argv[1])' "$out/doctor.json"
part "$python" -m pytest -m gpu --junitxml "$out/tests.xml" "$@"
if [ -f "$out/tests.xml" ]; then
  "$python" launch/gpu_report.py tests "$out/tests.json" "$out/tests.xml"
  rm -f "$out/tests.xml"
fi
if [ $benchmarks = 1 ]; then
  part distopt bench step --device cuda --json "$out/step.json"
fi
printf '\ngpu-check: written: '
ls -x "$out"
exit $worst
