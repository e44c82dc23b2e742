#!/usr/bin/env bash
# Start the processes of one machine: a worker for each GPU and, on the first machine, the server.
#
#   NODES=2 NODE=0 MASTER_ADDR=first MASTER_PORT=29500 launch/node.sh fed_avg --num_clients 8
#   launch/node.sh study FILE --workers 2   # a study's runs, one on every two GPUs at a time
#
# In a SLURM step with one task per node (launch/slurm.sbatch) these four are set automatically.
# Other settings:
#   WORKERS_PER_NODE  number of workers here (default: one per GPU; without GPUs, one per client of
#                     this node, at most one per core; for a study, as many runs as its file says)
#   RESTARTS          restarts in place after a failure (one machine only; default 0)
#   ROUND_SECONDS     how long after SIGTERM the ranks may take to finish their round (default 600)
#   MASTER_PORT       on one machine: the port of its store (default: a free port, on the loopback)
#   LOG_DIR           folder for the output of each rank; then only rank 0 prints to the console
#   PYTHON            the interpreter in which fedrun is installed (default python3)
set -euo pipefail

python=${PYTHON:-python3}
nodes=${NODES:-${SLURM_STEP_NUM_NODES:-1}}
node=${NODE:-${SLURM_NODEID:-0}}
say() { echo "launch: $*"; }

# Check the flags before any process is started; fedrun prints the errors.
settings=$("$python" -m fedrun "$@" --print_config)
setting() { sed -n "s/^$1: //p" <<<"$settings"; }

if [[ ${1:-} != study && -z $(setting num_clients) ]]; then
    ((nodes == 1)) || { say "$1 runs in one process, not on $nodes nodes" >&2; exit 2; }
    exec "$python" -m fedrun "$@"
fi

why="WORKERS_PER_NODE"
workers=${WORKERS_PER_NODE:-0}
if ((workers == 0)) && [[ $(setting device) != cpu ]]; then
    # Ask torch, as the workers do: it respects CUDA_VISIBLE_DEVICES and the scheduler's limits.
    workers=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    why="one per GPU"
fi
if [[ ${1:-} == study ]]; then
    group=$(setting workers) jobs=() shown="runs at a time: as in its file"
    if ((workers >= group)); then
        jobs=(--jobs $((workers / group))) shown="runs at a time: $((workers / group)) ($why)"
    fi
    say "node $node of $nodes on $(hostname): a study, $shown"
    unset SLURM_STEP_ID # the machines of a study meet in its folder alone: no process has a rank
    exec "$python" -m fedrun study "${jobs[@]}" "${@:2}" # flags that are given again count
fi
if ((workers == 0)); then
    share=$((($(setting num_clients) + nodes - 1) / nodes))
    cores=$(nproc)
    workers=$((share < cores ? share : cores))
    why="no GPU: one per client, at most one per core"
fi
processes=$workers server=""
if ((node == 0)) && [[ $(setting server) == dedicated ]]; then
    # Ranks count node by node, so rank 0 is here.
    processes=$((workers + 1)) server=", and the server"
fi
say "node $node of $nodes on $(hostname): workers: $workers ($why)$server"

if ((nodes == 1)); then
    # On the loopback, at a free port.
    rendezvous=(--max-restarts "${RESTARTS:-0}" ${MASTER_PORT:+--master-port "$MASTER_PORT"})
else
    # In a SLURM step fedrun.torchrun finds both.
    if [[ -z ${SLURM_STEP_ID:-} ]]; then
        : "${MASTER_ADDR:?set MASTER_ADDR to the host name of node 0}"
        : "${MASTER_PORT:?set MASTER_PORT to a free port of node 0}"
    fi
    # No restarts in place, which would leave the other nodes behind: whoever started the nodes
    # restarts all of them.
    rendezvous=(--nnodes "$nodes" --node-rank "$node" --max-restarts 0
        ${MASTER_ADDR:+--master-addr "$MASTER_ADDR"} ${MASTER_PORT:+--master-port "$MASTER_PORT"})
fi

logs=()
if [[ -n ${LOG_DIR:-} ]]; then
    mkdir -p "$LOG_DIR/node$node"
    logs=(--log-dir "$LOG_DIR/node$node" --redirects 3)
    ((node > 0)) || logs+=(--tee 0:3)
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE="[rank \${rank}] "
fi

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${ROUND_SECONDS:-600} # from torchrun's SIGTERM to its SIGKILL
exec "$python" -m fedrun.torchrun "${rendezvous[@]}" "${logs[@]}" \
    --nproc-per-node "$processes" -m fedrun "$@"
