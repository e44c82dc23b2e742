#!/usr/bin/env bash
# Train on one machine: a worker for each GPU, and the server. Without GPUs, a worker for each client, at
# most one a core. CLIENTS: this many workers instead.
#
#   launch/run.sh fed_avg --num_clients 8
#   launch/run.sh study configs/experiments/original.yaml    # a run on each GPU at a time
#
# After a failure the run resumes from its last checkpoint, at most RESTARTS times (default 3; a study
# is not restarted).
# Ctrl-C, `kill` or a closed terminal (not under nohup) stops it with a checkpoint at the end of the
# round; the same command resumes it. For other settings see node.sh, which starts the processes.
set -uo pipefail
python=${PYTHON:-python3}
run_dir=$("$python" -m fedrun "$@" --print_run_dir) || exit
FEDRUN_START="$$ $RANDOM $(date +%s.%N)" # the run writes it into outcome.json
export FEDRUN_START
export FEDRUN_LAUNCHER=$$ # processes that it starts end with this script, however it ends
again="the same command" # that resumes the run
[[ " $* " != *" --overwrite"* || " $* " == *" --overwrite false "* ]] || again="the same command without --overwrite"

set -m # a process group for the agent, so that a terminal signals this script alone
NODES=1 NODE=0 WORKERS_PER_NODE=${CLIENTS:-} RESTARTS=${RESTARTS:-3} "$(dirname "$0")/node.sh" "$@" </dev/null &
agent=$!
set +m
# Forward each signal once. Under nohup this script and all its children ignore HUP.
for signal in INT TERM HUP; do
    # shellcheck disable=SC2064 # the agent is known now
    trap "kill -$signal -- -$agent 2>/dev/null" "$signal"
done
while wait "$agent" 2>/dev/null; code=$?; kill -0 "$agent" 2>/dev/null; do :; done

# torchrun exits with 1 even after a clean stop on a signal, so read the outcome from the run's
# folder. FEDRUN_START distinguishes it from one that an earlier start has left there.
outcome=$run_dir/outcome.json
if ((code != 0)) && grep -q "\"start\": \"$FEDRUN_START\"" "$outcome" 2>/dev/null &&
    grep -q '"outcome": "stopped"' "$outcome"; then
    echo "launch: stopped in order; $again resumes it"
    exit 0
fi
exit "$code"
