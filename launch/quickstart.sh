#!/usr/bin/env bash
# From a bare clone to a network trained by two MPI ranks. Needs Python >= 3.11 with venv and pip, nothing else.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
ranks=2
seed=0
least=0.97

usage() {
  cat <<HELP
usage: bash launch/quickstart.sh [--ranks N] [--seed S]

Makes the virtual environment .venv, installs distopt with an MPI from a wheel, trains a small convolutional
network on 1,797 real handwritten digits with $ranks MPI ranks, and checks that the test accuracy is at
least 97 %. A second run skips the set-up.

  --ranks N   number of MPI ranks (default: $ranks); more than there are cores is allowed
  --seed S    seed of the initial values and of the order of the images (default: $seed)
  --help      this text

environment: DISTOPT_VENV (the virtual environment's folder), DISTOPT_PYTHON (the Python to make it with);
see also: bash launch/venv.sh --help

exit code: 0 when the accuracy was reached, 1 when something is missing or it was not, else distopt's own
HELP
}

die() {
  printf '\nquickstart: %s\n' "$*" >&2
  exit 1
}

while [ $# -gt 0 ]; do
  case $1 in
    --ranks | --seed)
      [ $# -ge 2 ] || die "$1 needs a number."
      [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$1 must be a whole number, got '$2'."
      [[ $1 = --seed || $2 != 0 ]] || die "--ranks must be at least 1, got 0."
      if [ "$1" = --ranks ]; then ranks=$2; else seed=$2; fi
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      die "unknown argument '$1'; the arguments are above."
      ;;
  esac
  shift
done

began=$SECONDS
bash "$root/launch/venv.sh" --extras local
venv=${DISTOPT_VENV:-$root/.venv}
# A clone that belongs to somebody else can still be tried out.
output=$root/runs/quickstart
mkdir -p "$output" 2>/dev/null && [ -w "$output" ] || output=$(mktemp -d)
printf 'set-up took %d s\n\n' $((SECONDS - began)) >&2

# An earlier run's record must not pass for this one's.
rm -f "$output/metrics.jsonl" "$output"/checkpoint-*.safetensors
began=$SECONDS
code=0
DISTOPT_VENV=$venv bash "$root/launch/local.sh" -n "$ranks" -- \
  train digits --seed "$seed" --output "$output" || code=$?
if [ $code != 0 ]; then
  printf '\nquickstart: the training ended with exit code %d; its message is above.\n' $code >&2
  printf 'What is installed and what is missing:  %s doctor\n' "$venv/bin/distopt" >&2
  exit $code
fi

accuracy=$("$venv/bin/python" - "$output/metrics.jsonl" <<'PYTHON'
import json, pathlib, sys

path = pathlib.Path(sys.argv[1])
records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
found = [record["test_accuracy"] for record in records if "test_accuracy" in record]
print(found[-1] if found else "none")
PYTHON
)
[ "$accuracy" != none ] || die "the training ended without a test accuracy in $output/metrics.jsonl."
percent=$(awk -v a="$accuracy" 'BEGIN { printf "%.2f %%", 100 * a }')
if awk -v a="$accuracy" -v b=$least 'BEGIN { exit !(a < b) }'; then
  die "test accuracy $percent is below the expected 97 % (seed $seed, $ranks ranks). Please report it with \
the output above and that of: $venv/bin/distopt doctor"
fi

cat <<NEXT

Test accuracy $percent with $ranks MPI ranks in $((SECONDS - began)) s. Everything works.

What to run next:
  source ${venv}/bin/activate
  distopt doctor                                       what this machine has, and what is missing
  bash launch/local.sh -n 2 -- train cifar10 --output runs/cifar10
                                                       the tutorial's network on real CIFAR-10
  distopt evaluate runs/cifar10                        the test accuracy of the weights it saved
  distopt bench scaling --ranks 1,2                    what another rank brings on this machine
  bash launch/test.sh                                  the whole test suite
NEXT
