#!/usr/bin/env bash
# The torchrun agent of one machine: a worker for each GPU and, on the first machine, the server.
#
#   NODES=2 NODE=0 MASTER_ADDR=first MASTER_PORT=29500 launch/node.sh fed_avg --num_clients 8
#
# In a step of SLURM with one task a node (launch/slurm.sbatch) these four are found. Other settings:
#   WORKERS_PER_NODE  workers here (default: the GPUs; without any, the clients of this node, at
#                     most one a core)
#   RESTARTS          restarts in place after a failure (one machine only; default 0)
#   ROUND_SECONDS     how long after SIGTERM the ranks may take to end their round (default 600)
#   MASTER_PORT       on one machine: where its processes meet (default: a free port, on the loopback)
#   LOG_DIR           a folder for each rank's output; then only rank 0 writes to the console
#   PYTHON            the interpreter that has fedrun (default python3)
set -euo pipefail

python=${PYTHON:-python3}
nodes=${NODES:-${SLURM_STEP_NUM_NODES:-1}}
node=${NODE:-${SLURM_NODEID:-0}}
say() { echo "launch: $*"; }

# Flags are checked here, before any process is started; errors are told by fedrun.
settings=$("$python" -m fedrun "$@" --print_config)
setting() { sed -n "s/^$1: //p" <<<"$settings"; }

if [[ -z $(setting num_clients) ]]; then
    ((nodes == 1)) || { say "$1 runs in one process, not on $nodes nodes" >&2; exit 2; }
    exec "$python" -m fedrun "$@"
fi

why="WORKERS_PER_NODE"
workers=${WORKERS_PER_NODE:-0}
if ((workers == 0)) && [[ $(setting device) != cpu ]]; then
    # What torch sees is what workers take: CUDA_VISIBLE_DEVICES and the scheduler's limits count.
    workers=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    why="one a GPU"
fi
if ((workers == 0)); then
    share=$((($(setting num_clients) + nodes - 1) / nodes))
    cores=$(nproc)
    workers=$((share < cores ? share : cores))
    why="no GPU: one a client, at most one a core"
fi
processes=$workers server=""
if ((node == 0)) && [[ $(setting server) == dedicated ]]; then
    # Ranks are numbered node by node, so rank 0 is here.
    processes=$((workers + 1)) server=", and the server"
fi
say "node $node of $nodes on $(hostname): workers: $workers ($why)$server"

if ((nodes == 1)); then
    # On the loopback, at a port that is free.
    rendezvous=(--max-restarts "${RESTARTS:-0}" ${MASTER_PORT:+--master-port "$MASTER_PORT"})
else
    # A restart in place would leave the other nodes' agents behind, so whoever started the nodes
    # restarts them all.
    if [[ -n ${SLURM_STEP_ID:-} ]]; then
        first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | sed -n 1p)
        port=$((20000 + (SLURM_JOB_ID * 16 + SLURM_STEP_ID) % 10000)) # as fedrun.distributed.launch has it
    fi
    rendezvous=(--nnodes "$nodes" --node-rank "$node" --max-restarts 0
        --master-addr "${MASTER_ADDR:-${first:?set MASTER_ADDR to the host name of node 0}}"
        --master-port "${MASTER_PORT:-${port:?set MASTER_PORT to a free port of node 0}}")
fi

logs=()
if [[ -n ${LOG_DIR:-} ]]; then
    mkdir -p "$LOG_DIR/node$node"
    logs=(--log-dir "$LOG_DIR/node$node" --redirects 3)
    ((node > 0)) || logs+=(--tee 0:3)
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank \${rank}] "
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${ROUND_SECONDS:-600} # between its SIGTERM and SIGKILL
exec "$python" -m fedrun.torchrun "${rendezvous[@]}" "${logs[@]}" \
    --nproc-per-node "$processes" -m fedrun "$@"
