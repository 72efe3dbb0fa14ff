#!/bin/bash
# Trains a recipe with torchrun, without supervision: on this machine, or on several.
#
#   launch/torchrun.sh demo data.train=datasets/train run_dir=runs/first
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first.host launch/torchrun.sh ...     and on the other machine
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first.host launch/torchrun.sh ...
#
# NPROC: processes on each machine (default: one for each GPU, or 1).
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec torchrun \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m megatron_vlm train "$@"
