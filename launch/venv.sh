#!/usr/bin/env bash
# Makes, completes or repairs the project's virtual environment. Needs Python >= 3.11 with venv and pip.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: bash launch/venv.sh [--extras local,test] [--quiet]

Makes the virtual environment .venv in the project's folder and installs distopt into it (editable) with
the extras named. What is there and up to date is kept: a second run takes a fraction of a second. An
environment that an interrupted run left half made is made anew; one that you made yourself is never
cleared, only completed.

  --extras LIST   extras of pyproject.toml, separated by commas (default: local)
  --quiet         say nothing where nothing needs doing
  --help          this text

environment:
  DISTOPT_VENV    the virtual environment's folder (default: .venv in the project's folder)
  DISTOPT_PYTHON  the Python to make it with (default: the first usable of python3, python3.14 ... python3.11)
  PIP_*, HTTPS_PROXY and so on are pip's own settings, for instance PIP_INDEX_URL for a mirror
HELP
}

say() { [ "$quiet" = 1 ] || printf '%s\n' "$*" >&2; }
die() {
  printf '\n' >&2
  printf '%s\n' "$@" >&2
  exit 1
}

extras=local
quiet=0
while [ $# -gt 0 ]; do
  case $1 in
    --extras)
      [ $# -ge 2 ] || die "--extras needs a list, as in --extras local,test"
      extras=$2
      shift
      ;;
    --quiet) quiet=1 ;;
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

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=${DISTOPT_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
stamp=$venv/distopt-stamp   # written last: its absence means that the making was interrupted
marker=$venv/distopt-made   # written first: this environment is ours, so we may clear it
project=$(cksum <"$root/pyproject.toml")

# One line that says which Python this is and where; the empty string where it is too old or does not run.
describe_python() {
  "$1" -c 'import sys; v = sys.version_info
print(sys.version.split()[0], sys.base_prefix) if v >= (3, 11) else sys.exit(1)' 2>/dev/null || true
}

find_python() {
  local candidate version="" seen=""
  for candidate in ${DISTOPT_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if [ -z "$(describe_python "$candidate")" ]; then
      version=$("$candidate" --version 2>&1 | head -n 1) && seen="$seen  $candidate is $version"$'\n'
      continue
    fi
    if ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
      seen="$seen  $candidate is Python $version, without the module venv or ensurepip"$'\n'
      continue
    fi
    printf '%s\n' "$candidate"
    return
  done
  if [ -n "$version" ] && [[ $seen == *"without the module"* ]]; then
    die "Python's module venv (with ensurepip) is missing:" "$seen" \
      "Install it, then run this again:" \
      "  Debian, Ubuntu:  apt-get install python$version-venv" \
      "  Fedora, RHEL:    dnf install python$version python3-pip" \
      "  elsewhere:       set DISTOPT_PYTHON to a Python >= 3.11 that has it"
  fi
  die "Python >= 3.11 is needed and was not found." "${seen:-  (no python3 on PATH)}" \
    "Install it, or set DISTOPT_PYTHON to one:" \
    "  Debian 12, Ubuntu 24.04 or newer:  apt-get install python3 python3-venv" \
    "  Fedora, RHEL 9:                    dnf install python3.12" \
    "  macOS:                             brew install python@3.13" \
    "  without root:                      uv python install 3.13, or conda create -n py python=3.13"
}

stamp_field() { sed -n "s/^$1 //p" "$stamp" 2>/dev/null || true; }

has_extras() { # LIST WANTED: whether every name of WANTED is in LIST
  local name
  for name in ${2//,/ }; do
    case ",$1," in *",$name,"*) ;; *) return 1 ;; esac
  done
}

is_ready() {
  [ -f "$stamp" ] && [ -x "$venv/bin/distopt" ] &&
    [ "$(stamp_field project)" = "$project" ] && [ "$(stamp_field place)" = "$root $venv" ] &&
    [ "$(stamp_field python)" = "$(describe_python "$venv/bin/python")" ] &&
    has_extras "$(stamp_field extras)" "$extras"
}

if is_ready; then
  say "$venv is up to date"
  exit 0
fi

# Two runs at once: the second waits, then finds the work done.
mkdir -p "$venv" || die "can't make the folder $venv. Set DISTOPT_VENV to a place that you can write to."
[ -w "$venv" ] || die "no permission to write to $venv (it may belong to another user). \
Set DISTOPT_VENV to another folder, or remove this one."
if [ -z "$(find "$venv" -mindepth 1 -maxdepth 1 | head -n 1)" ]; then touch "$marker"; fi
if command -v flock >/dev/null 2>&1; then
  exec 9>"$venv/distopt-lock"
  flock 9
  if is_ready; then
    say "$venv is up to date"
    exit 0
  fi
fi

ours=0
[ -f "$marker" ] && ours=1
works=0
[ -n "$(describe_python "$venv/bin/python")" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && works=1
if [ $ours = 0 ] && [ $works = 0 ]; then
  die "$venv was not made by this script, and has no working Python >= 3.11 with pip; it is left as it is." \
    "Remove it, or set DISTOPT_VENV to another folder."
fi
if [ $ours = 1 ] && { [ $works = 0 ] || [ ! -f "$stamp" ] || [ "$(stamp_field place)" != "$root $venv" ] ||
  [ "$(stamp_field python)" != "$(describe_python "$venv/bin/python")" ]; }; then
  python=$(find_python)
  say "making $venv with $(command -v "$python") ($("$python" --version))"
  # The marker stays through all of this, so that an interruption leaves an environment that we may clear.
  find "$venv" -mindepth 1 -maxdepth 1 ! -name distopt-made ! -name distopt-lock -exec rm -rf {} +
  "$python" -m venv "$venv" || die "'$python -m venv $venv' failed; its message is above."
fi

had=$(stamp_field extras)
rm -f "$stamp"
has_extras "${had:-none}" "$extras" || extras=$extras${had:+,$had}
extras=$(printf '%s\n' "${extras//,/$'\n'}" | sort -u | paste -sd , -)
say "installing distopt[$extras] (the first time: $(
  case $extras in *test*) echo "about 330 MB" ;; *) echo "about 30 MB" ;; esac
) to download; pip's cache is used)"
loudness=--quiet
[ -t 2 ] && [ $quiet = 0 ] && loudness=--progress-bar=on
# PIP_USER and its like would install somewhere else; pip's five retries of every package take minutes to say
# that there is no network.
if ! env -u PIP_TARGET -u PIP_PREFIX PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_RETRIES="${PIP_RETRIES:-2}" \
  "$venv/bin/python" -m pip install "$loudness" --editable "${root}[$extras]" >&2; then
  die "The packages could not be installed; pip's own message is above. If it can't reach its index:" \
    "  behind a proxy:     export HTTPS_PROXY=http://PROXY:PORT" \
    "  with a mirror:      export PIP_INDEX_URL=https://MIRROR/simple" \
    "  without a network:  on a machine like this one that has it, in a copy of this folder, run" \
    "                        python3 -m pip download -d wheels '.[$extras]' hatchling editables" \
    "                      bring the folder wheels here, and set" \
    "                        export PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels" \
    "Then run this again: it goes on from a clean state."
fi
{
  printf 'project %s\n' "$project"
  printf 'python %s\n' "$(describe_python "$venv/bin/python")"
  printf 'place %s\n' "$root $venv"
  printf 'extras %s\n' "$extras"
} >"$stamp.new"
mv "$stamp.new" "$stamp"
