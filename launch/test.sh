#!/usr/bin/env bash
# Every check of the project: format, lint, types, shell scripts, tests (those under mpirun included).
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/test.sh [--quick] [--no-setup] [-- PYTEST-ARGUMENTS]

Makes or updates .venv with the extras local and test (see launch/venv.sh --help), then runs every check:
  format   ruff format --check       lint     ruff check
  types    basedpyright              shell    shellcheck on launch/ and .ci/
  tests    pytest, which runs the distributed tests under mpirun with 1, 2, 3 and 4 ranks
All of them run, also after one has failed; a summary follows. What needs a GPU or Slurm is skipped with the
reason where there is none.

  --quick      leave out the tests marked slow
  --no-setup   use the tools on PATH (or of DISTOPT_VENV) as they are, install nothing
  --help       this text
  -- ...       handed to pytest: a file, -k NAME, -x ...

exit code: that of the first check that failed, else 0
HELP
}

quick=0
setup=1
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --no-setup) setup=0 ;;
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
began=$SECONDS
if [ $setup = 1 ]; then bash "$root/launch/venv.sh" --extras local,test; fi
if [ -d "$venv/bin" ]; then export PATH="$venv/bin:$PATH"; fi
cd "$root"
for tool in python ruff basedpyright shellcheck; do
  command -v $tool >/dev/null && continue
  printf '%s is missing. Run this without --no-setup, or: pip install -e ".[local,test]"\n' $tool >&2
  exit 1
done
if [ $setup = 1 ]; then printf 'set-up took %d s\n' $((SECONDS - began)); fi

# Tests start several ranks on few cores, and measure nothing: one thread each.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
worst=0
summary=

check() { # NAME COMMAND...
  local name=$1 code=0 start=$SECONDS
  shift
  printf '\n--- %s: %s\n' "$name" "$*"
  "$@" </dev/null || code=$?
  [ $worst != 0 ] || worst=$code
  summary+=$(printf '  %-7s %-22s %4d s' "$name" \
    "$([ $code = 0 ] && echo passed || echo "FAILED (exit code $code)")" $((SECONDS - start)))$'\n'
}

selection=()
if [ $quick = 1 ]; then selection=(-m "not slow"); fi
check format ruff format --check .
check lint ruff check .
check types basedpyright --pythonpath "$(command -v python)"
check shell shellcheck --external-sources launch/*.sh launch/*.sbatch .ci/run
check tests python -m pytest ${selection[@]+"${selection[@]}"} "$@"

printf '\n%s' "$summary"
if [ $worst = 0 ]; then echo "All checks passed."; else echo "Some checks failed; their output is above."; fi
exit $worst
