#!/usr/bin/env bash
# Runs a command on ranks of several pretended hosts of this machine, with a network of a given speed.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/hosts.sh --hosts N [options] -- COMMAND [ARGUMENTS]

Makes N network namespaces, each with a host name, a network card, shared memory and IPC of its own, plugged
into one switch; runs COMMAND under mpirun over them, and removes them at the end. For measuring and testing
what several machines do, where there is only one. Needs root, Linux, ip and tc (Debian: iproute2), unshare.
Several runs at a time don't meet. Ends with the exit code of mpirun.

  --hosts N      number of hosts: h1 .. hN, with the addresses 10.77.0.1 .. 10.77.0.N
  --ranks R      ranks of each host (default: 1)
  --rate RATE    of each card, in each direction, as tc writes it: 1gbit, 100mbit (default: not limited)
  --check        only say whether it can run here; exit code 0 if it can
  --help         this text

environment:
  DISTOPT_VENV    environment whose mpirun is used (default: the active one, then .venv, then PATH)
  DISTOPT_MPIRUN  the launcher to use: Open MPI's or Hydra's (MPICH)
HELP
}

die() {
  printf 'hosts.sh: %s\n' "$@" >&2
  exit 2
}

# on_host PREFIX FOLDER HOST COMMAND...: as if on that host. Without a host name of its own mpirun takes all
# hosts for one and waits for ever; with a common /dev/shm ranks of two hosts would share memory.
on_host() {
  local prefix=$1 folder=$2 host=$3
  shift 3
  # shellcheck disable=SC2016 # expanded by the inner shell
  exec ip netns exec "$prefix$host" unshare --uts --ipc --mount bash -c '
    hostname "$0" && mount -t tmpfs tmpfs /dev/shm && mount --bind "$1/hosts" /etc/hosts && shift && exec "$@"
  ' "$host" "$folder" "$@"
}

# What mpirun calls instead of ssh: [OPTIONS] HOST COMMAND...
agent() {
  local prefix=$1 folder=$2 host
  shift 2
  while [ "${1#-}" != "$1" ]; do
    case $1 in -l | -p | -i | -o | -F) shift 2 ;; *) shift ;; esac
  done
  host=$1
  shift
  case $host in 10.77.0.*) host=h${host##*.} ;; esac
  on_host "$prefix" "$folder" "$host" /bin/sh -c "$*"
}

is_count() { [[ $1 =~ ^[1-9][0-9]{0,2}$ ]]; }

why_not() {
  local tool
  [ "$(uname -s)" = Linux ] || { echo "network namespaces need Linux, this is $(uname -s)"; return; }
  [ "$(id -u)" = 0 ] || { echo "only root may make network namespaces; use sudo"; return; }
  for tool in ip tc unshare; do
    command -v $tool >/dev/null || { echo "$tool is missing (Debian: apt-get install iproute2 util-linux)"; return; }
  done
  ip netns add "dotry$$" 2>/dev/null || { echo "this system lets nobody make a network namespace"; return; }
  ip netns del "dotry$$"
}

if [ "${1:-}" = --agent ]; then
  shift
  agent "$@"
fi
hosts='' ranks=1 rate='' check=0
while [ $# -gt 0 ]; do
  case $1 in
    --hosts | --ranks | --rate)
      [ $# -ge 2 ] || die "$1 needs a value; see --help."
      case $1 in --hosts) hosts=$2 ;; --ranks) ranks=$2 ;; *) rate=$2 ;; esac
      shift 2
      ;;
    --check)
      check=1
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
    *) die "unknown argument '$1'; the command comes after --, as in: --hosts 3 -- python script.py" ;;
  esac
done
reason=$(why_not)
[ -z "$reason" ] || die "can't make hosts here: $reason."
[ $check = 0 ] || exit 0
is_count "$hosts" || die "--hosts must be a whole number from 1 to 999, got '$hosts'."
is_count "$ranks" || die "--ranks must be a whole number from 1 to 999, got '$ranks'."
[ $# -gt 0 ] || die "nothing to run: put the command after --, as in: --hosts 3 -- python script.py"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/programs.sh
. "$root/launch/programs.sh"
find_distopt "$root" 2>/dev/null || bin=
find_launcher

prefix=do$$-
folder=$(mktemp -d)
list=
# shellcheck disable=SC2329 # called by the trap
clean_up() {
  local number
  for number in $(seq 0 "$hosts"); do
    # What a lost mpirun left behind would keep the namespace alive.
    ip netns pids "${prefix}h$number" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "${prefix}h$number" 2>/dev/null || true
  done
  rm -rf "$folder"
}
trap clean_up EXIT

# The switch is a namespace as well: names of cards and addresses are free in it, whatever else runs here.
ip netns add "${prefix}h0"
ip -n "${prefix}h0" link add switch type bridge
ip -n "${prefix}h0" link set switch up
printf '127.0.0.1 localhost\n' >"$folder/hosts"
for number in $(seq 1 "$hosts"); do
  name=$prefix"h$number"
  ip netns add "$name"
  ip -n "${prefix}h0" link add "port$number" type veth peer name eth0 netns "$name"
  ip -n "${prefix}h0" link set "port$number" master switch up
  ip -n "$name" addr add "10.77.0.$number/24" dev eth0
  ip -n "$name" link set lo up
  ip -n "$name" link set eth0 up
  if [ -n "$rate" ]; then
    # Both directions, as a cable: what the host sends, and what the switch sends to it.
    ip netns exec "$name" tc qdisc add dev eth0 root tbf rate "$rate" burst 256kb latency 50ms
    ip netns exec "${prefix}h0" tc qdisc add dev "port$number" root tbf rate "$rate" burst 256kb latency 50ms
  fi
  printf '10.77.0.%s h%s\n' "$number" "$number" >>"$folder/hosts"
  list+=${list:+,}h$number:$ranks
done
printf '#!/bin/sh\nexec bash %q --agent %q %q "$@"\n' "$root/launch/hosts.sh" "$prefix" "$folder" >"$folder/agent"
chmod +x "$folder/agent"

total=$((hosts * ranks))
if [ "$family" = openmpi ]; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  # Waiting ranks spin; on cores that all hosts share they spin in the way of the others.
  export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1} OMPI_MCA_osc=${OMPI_MCA_osc:-^ucx}
  start=("$launcher" --prtemca plm ssh --prtemca plm_ssh_agent "$folder/agent" --prtemca prte_if_include eth0
    --mca btl_tcp_if_include eth0 --bind-to none --host "$list" -n "$total")
  for name in $(compgen -e | grep -E '^(DISTOPT_|OMP_NUM_THREADS$|OPENBLAS_|PYTHONPATH$|OMPI_MCA_)'); do
    start+=(-x "$name")
  done
else
  start=("$launcher" -launcher ssh -launcher-exec "$folder/agent" -iface eth0 -bind-to none -hosts "$list"
    -n "$total")
fi
code=0
(on_host "$prefix" "$folder" h1 "${start[@]}" "$@") </dev/null || code=$?
exit $code
