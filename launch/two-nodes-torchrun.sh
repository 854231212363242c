#!/usr/bin/env bash
# Two machines, torchrun. Start this on each with its number:
#   MASTER=10.0.0.1 NODE=0 launch/two-nodes-torchrun.sh    # on 10.0.0.1
#   MASTER=10.0.0.1 NODE=1 launch/two-nodes-torchrun.sh    # on the other
# The model file and the shards lie at the same paths on both, and the run folder is one that both see; only
# rank 0 reads the model, every rank writes its part of the training state.
set -euo pipefail

: "${MASTER:?address of machine 0}" "${NODE:?number of this machine, 0 or 1}"
INIT="${INIT:-model.apr}"
DATA="${DATA:-data}"
RUN_DIR="${RUN_DIR:-runs/two-nodes}"
STRATEGY="${STRATEGY:-hsdp}"
NODES="${NODES:-2}"
PROCESSES="${PROCESSES:-8}"
RESTARTS="${RESTARTS:-3}"
# Where a host's name does not resolve to the address the other machine reaches it at, name that address.
LOCAL_ADDRESS="${LOCAL_ADDRESS:-}"

# Without it a machine that joins a later round of a restarted job waits for an address nobody sends.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

exec torchrun \
    --nnodes "$NODES" --nproc_per_node "$PROCESSES" --max_restarts "$RESTARTS" --shutdown_timeout 570 \
    ${LOCAL_ADDRESS:+--local_addr "$LOCAL_ADDRESS"} \
    --rdzv_id apr-dist --rdzv_backend c10d --rdzv_endpoint "$MASTER:29400" \
    --rdzv_conf "is_host=$([ "$NODE" = 0 ] && echo 1 || echo 0),join_timeout=600" \
    apr_dist/train.py \
    --init "$INIT" --dataset "$DATA/train" --val-dataset "$DATA/validation" \
    --run-dir "$RUN_DIR" --resume auto \
    --parallel.strategy "$STRATEGY" --parallel.precision bf16 --parallel.timeout-s 600 "$@"
