#!/bin/bash
# Trains a recipe with mpirun, without supervision; needs mpi4py (pip install 'megatron-vlm[mpi]').
#
#   NP=2 launch/mpi.sh demo data.train=datasets/train run_dir=runs/first
#   NP=16 launch/mpi.sh --hostfile hosts -- demo data.train=datasets/train
#
# What stands before -- goes to mpirun. Ranks find each other by themselves.
set -euo pipefail
options=()
for word in "$@"; do
  if [ "$word" = -- ]; then
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    break
  fi
done
[ "$(id -u)" != 0 ] || options+=(--allow-run-as-root)
exec mpirun -n "${NP:?set NP to the number of processes}" "${options[@]}" \
  "${PYTHON:-python}" -m megatron_vlm train "$@"
