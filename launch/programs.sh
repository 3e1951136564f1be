# shellcheck shell=bash disable=SC2034 # what is set here is used by the scripts that source it
# Finds distopt and the MPI launcher that belongs to it; sourced by local.sh and slurm.sbatch.

# find_distopt ROOT: sets `distopt` (the program) and `bin` (the folder of its environment, or empty).
# The environment named in DISTOPT_VENV comes first, then the active one, then ROOT/.venv, then PATH.
find_distopt() {
  local folder
  for folder in "${DISTOPT_VENV:-}" "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$1/.venv"; do
    if [ -n "$folder" ] && [ -x "$folder/bin/distopt" ]; then
      bin=$(cd "$folder/bin" && pwd)
      distopt=$bin/distopt
      return
    fi
  done
  bin=
  if ! distopt=$(command -v distopt); then
    printf '%s\n' "distopt is not installed: it is neither in $1/.venv nor on PATH." \
      "Install it with 'bash launch/venv.sh', or set DISTOPT_VENV to the environment that has it." >&2
    return 1
  fi
}

# find_launcher: sets `launcher` (mpirun or mpiexec) and `family` (openmpi or hydra). The launcher has to
# be of the MPI library that mpi4py loads. An MPI from a wheel has both in one environment, which is why
# that environment comes before PATH.
find_launcher() {
  local candidate version
  for candidate in ${DISTOPT_MPIRUN:-${bin:+"$bin/mpirun" "$bin/mpiexec"} mpirun mpiexec}; do
    launcher=$(command -v "$candidate") || continue
    version=$("$launcher" --version 2>&1 </dev/null | head -n 3) || continue
    case $version in
      *"Open MPI"* | *"OpenRTE"* | *PRRTE*) family=openmpi ;;
      *HYDRA* | *"Intel(R) MPI"* | *MPICH*) family=hydra ;;
      *) continue ;;
    esac
    return
  done
  printf '%s\n' "no mpirun or mpiexec of Open MPI, MPICH or Intel MPI was found${bin:+ in $bin or} on PATH." \
    "Install one beside distopt with \"pip install 'distopt[local]'\", load your cluster's MPI module," \
    "or set DISTOPT_MPIRUN to its path." >&2
  return 1
}

# count_cores: prints the cores that this process may use: its affinity, and a container's quota.
count_cores() {
  local cores quota period
  # nproc reads these two, and would then answer with the number of threads that somebody asked for.
  cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
    quota=$(((quota + period - 1) / period))
    [ "$quota" -ge "$cores" ] || cores=$quota
  fi
  printf '%s\n' "$cores"
}
