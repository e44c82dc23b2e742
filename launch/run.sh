#!/usr/bin/env bash
# One machine: a worker for each GPU, and the server. Without GPUs, CLIENTS workers.
#
#   launch/run.sh fed_avg --num_clients 8
#
# After a failure the run goes on from its last checkpoint, RESTARTS times (default 3). Ctrl-C,
# `kill` or a closed terminal (not under nohup) ends it with a checkpoint at the end of the round,
# and the same command goes on from there.
# node.sh, which starts the processes, lists the other settings.
set -uo pipefail
python=${PYTHON:-python3}
run_dir=$("$python" -m fedrun "$@" --print_run_dir) || exit
FEDRUN_START="$$ $RANDOM $(date +%s.%N)" # written into the outcome of the run that begins here
export FEDRUN_START

set -m # a process group for the agent, so that a terminal signals this script alone
NODES=1 NODE=0 WORKERS_PER_NODE=${CLIENTS:-} RESTARTS=${RESTARTS:-3} "$(dirname "$0")/node.sh" "$@" </dev/null &
agent=$!
set +m
# Each signal is passed on once. Under nohup, HUP is ignored here and by all that this starts.
for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # the agent is known now
    trap "kill -$signal -- -$agent 2>/dev/null" "$signal"
done
while wait "$agent" 2>/dev/null; code=$?; kill -0 "$agent" 2>/dev/null; do :; done

# torchrun exits 1 after a clean stop on a signal: how the run ended is in its folder. An outcome
# that another start has left there says nothing.
outcome=$run_dir/outcome.json
if ((code != 0)) && grep -q "\"start\": \"$FEDRUN_START\"" "$outcome" 2>/dev/null &&
    grep -q '"outcome": "stopped"' "$outcome"; then
    echo "launch: stopped in order; the same command goes on"
    exit 0
fi
exit "$code"
