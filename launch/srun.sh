#!/bin/bash
# Trains a recipe with one srun, without supervision: inside salloc or a batch script of your own.
#
#   salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8
#   launch/srun.sh demo data.train=datasets/train run_dir=runs/first
#
# One task is one rank. A rank that fails ends the step; mvlm submit starts such a run again.
set -euo pipefail
exec srun --kill-on-bad-exit=1 --mpi=none "${PYTHON:-python}" -m megatron_vlm train "$@"
