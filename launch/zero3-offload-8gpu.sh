#!/usr/bin/env bash
# One machine, eight GPUs, DeepSpeed ZeRO-3 with weights and optimizer state in host memory, by torchrun: for
# a model that does not fit even when cut in eight. DeepSpeed compiles its host optimizer at first use.
#   INIT=model.apr DATA=data launch/zero3-offload-8gpu.sh
set -euo pipefail

INIT="${INIT:-model.apr}"
DATA="${DATA:-data}"
RUN_DIR="${RUN_DIR:-runs/offload}"
STRATEGY="${STRATEGY:-zero3}"
PROCESSES="${PROCESSES:-8}"

exec torchrun --standalone --nproc_per_node "$PROCESSES" --max_restarts 3 --shutdown_timeout 570 \
    apr_dist/train.py \
    --init "$INIT" --dataset "$DATA/train" --val-dataset "$DATA/validation" \
    --run-dir "$RUN_DIR" --resume auto \
    --parallel.strategy "$STRATEGY" --parallel.offload optimizer+parameters --parallel.precision bf16 "$@"
