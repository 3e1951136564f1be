#!/usr/bin/env bash
# Starts distopt with N MPI ranks on this machine.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/local.sh -n N [options] -- train cifar10 [distopt's arguments]

Starts `distopt ARGUMENTS` with N MPI ranks on this machine, with the mpirun (or mpiexec) of Open MPI or
MPICH that is installed beside distopt, or else on PATH. Ends with its exit code.

  -n, --ranks N    number of ranks (default: one per GPU that nvidia-smi lists, else one per core)
  --threads T      threads of each rank (default: OMP_NUM_THREADS where it is set, else cores / ranks)
  --bind WHERE     auto, core, numa or none (default: auto, which is core where every rank has cores of
                   its own and none where they have to share, or where this shell is bound already)
  --dry-run        print the command and the variables instead of running it
  --help           this text

More ranks than cores are allowed. Waiting ranks yield their core (OMPI_MCA_mpi_yield_when_idle=0 if not).

Stopping: the first Ctrl-C, TERM or USR1 is sent to all ranks as USR1, the one signal that every MPI
launcher passes on without killing the ranks itself; the second ends the job at once.

environment:
  DISTOPT_VENV     environment that has distopt (default: the active one, then .venv, then PATH)
  DISTOPT_MPIRUN   the launcher to use
HELP
}

die() {
  printf 'local.sh: %s\n' "$@" >&2
  exit 2
}

is_count() { [[ $1 =~ ^[1-9][0-9]{0,5}$ ]]; }

ranks='' threads='' bind=auto dry_run=0
while [ $# -gt 0 ]; do
  case $1 in
    -n | -np | --ranks | --threads | --bind)
      [ $# -ge 2 ] || die "$1 needs a value; see --help."
      case $1 in --threads) threads=$2 ;; --bind) bind=$2 ;; *) ranks=$2 ;; esac
      shift 2
      ;;
    --dry-run)
      dry_run=1
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown argument '$1'; distopt's own arguments come after --, as in: -n 2 -- train digits" ;;
  esac
done
[ $# -gt 0 ] || die "nothing to run: put distopt's arguments after --, as in: -n 2 -- train digits"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/programs.sh
. "$root/launch/programs.sh"
find_distopt "$root"
find_launcher

cores=$(count_cores)
if [ -z "$ranks" ]; then
  gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
  ranks=$((gpus > 0 ? gpus : cores))
fi
is_count "$ranks" || die "-n must be a whole number from 1, got '$ranks'."
threads=${threads:-${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}}
is_count "$threads" || die "--threads must be a whole number from 1, got '$threads'."
crowded=$((ranks * threads > cores))
case $bind in
  core | numa | none) ;;
  auto)
    # A shell that is bound to some cores: ranks inherit that, while the launchers would bind outside of it.
    everything=$(nproc --all 2>/dev/null || echo "$cores")
    if [ "$crowded" = 1 ] || [ "$cores" != "$everything" ]; then bind=none; else bind=core; fi
    ;;
  *) die "--bind must be auto, core, numa or none, got '$bind'." ;;
esac

for name in OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS; do export "$name=$threads"; done
command=("$launcher" -n "$ranks")
if [ "$family" = openmpi ]; then
  if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  # PE is what keeps a rank's threads from sharing one core. Slots are counted in cores, so an oversubscribed
  # mapping has to be allowed by name.
  if [ "$bind" = core ]; then command+=(--map-by "slot:PE=$threads" --bind-to core)
  else command+=(--map-by ":OVERSUBSCRIBE" --bind-to "$bind"); fi
  # Waiting ranks spin. On cores that are shared, with more ranks or with anything else, they spin in the way
  # of those that they wait for, and an allreduce takes 10 to 60 times as long.
  export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
  # Its UCX component for windows prints an error at every start, and is of no use on one machine.
  export OMPI_MCA_osc=${OMPI_MCA_osc:-^ucx}
else
  if [ "$bind" = core ]; then command+=(-bind-to "core:$threads"); else command+=(-bind-to "$bind"); fi
fi
command+=("$distopt" "$@")

if [ "$dry_run" = 1 ]; then
  env | grep -E '^(OMP_NUM_THREADS|OPENBLAS_NUM_THREADS|MKL_NUM_THREADS|OMPI_[A-Za-z_]+|DISTOPT_[A-Z_]+)=' | sort
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi

# The launcher gets a process group of its own (set -m), so that Ctrl-C reaches this script alone. TERM must
# never reach it while ranks may want to write a checkpoint: Open MPI kills them half a second later.
set -m
"${command[@]}" </dev/null &
job=$!
stops=0
# shellcheck disable=SC2329 # called by the trap
stop() {
  stops=$((stops + 1))
  if [ "$stops" = 1 ]; then
    printf 'local.sh: stopping the ranks (once more ends them at once)\n' >&2
    kill -USR1 "$job" 2>/dev/null || true
  else
    kill -TERM "$job" 2>/dev/null || true
  fi
}
trap stop INT TERM USR1
# wait returns early when a trap ran; the job's own code comes once it is gone.
while :; do
  code=0
  wait "$job" || code=$?
  kill -0 "$job" 2>/dev/null || break
done
exit "$code"
