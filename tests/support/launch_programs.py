"""Stand-ins for the programs that the scripts in launch/ call, and SLURM's variables."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import ROOT

# A step of 9 processes on 2 nodes, as SLURM 22.05 describes it to one of them.
STEP = {"SLURM_JOB_ID": "70", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "9",
        "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "5,4", "SLURM_NTASKS": "9",
        "SLURM_NODEID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
# What the shell of a batch job or of salloc has.
SHELL = {"SLURM_JOB_ID": "70", "SLURM_NTASKS": "9", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_TASKS_PER_NODE": "5,4"}

PYTHON = """#!/bin/sh
case "$*" in
    *--print_config) printf 'method: %s\\n' "$3"; cat "$CONFIG" ;;
    *--print_run_dir) echo "$RUN_DIR" ;;
    "-c import torch"*) echo "$GPUS" ;;
    *)
        echo "STARTED $*"
        [ -z "$OUTCOME" ] || printf '{\\n "outcome": "%s",\\n "start": "%s"\\n}\\n' "$OUTCOME" \\
            "$FEDRUN_START" >"$RUN_DIR/outcome.json"
        exit "${CODE:-0}"
        ;;
esac
"""
# A step: it ends with the outcome and exit code of the next line of $STEPS, or waits for STOP.
SRUN = """#!/bin/bash
nodes=$(sed 's/.*--nodelist \\([^ ]*\\).*/\\1/' <<<"$*")
if [[ $* == *printenv* ]]; then [[ " $ALIVE " == *" $nodes "* ]] && echo "$nodes"; exit; fi
echo "SRUN on $nodes"
echo "RESTART ${FEDRUN_RESTART:-}"
[[ $* != *--kill-on-bad-exit=0* ]] || echo "(a node goes on without the others)"
outcome() {
    mkdir -p "$RUN_DIR"
    local end=$1 kind=null
    [[ $end != diverged ]] || end=failed kind='"diverged"'
    printf '{\\n "outcome": "%s",\\n "step": 5,\\n "kind": %s,\\n "start": "%s"\\n}\\n' \\
        "$end" "$kind" "$FEDRUN_START" >"$RUN_DIR/new"
    mv "$RUN_DIR/new" "$RUN_DIR/outcome.json"
}
trap 'echo "SRUN got TERM"; exit 143' TERM
read -r end code < <(head -n 1 "$STEPS"); sed -i 1d "$STEPS"
if [[ $end == until-STOP ]]; then
    outcome running
    until [[ -e $RUN_DIR/STOP && ! $DEAF ]]; do sleep 0.05; done
    echo "OBEYED $(cat "$RUN_DIR/STOP")"
    end=stopped
fi
[[ $end == nothing ]] || outcome "$end"
exit "$code"
"""
SCONTROL = """#!/bin/sh
case "$*" in
    "show hostnames "*) printf 'n1\\nn2\\n' ;;
    "show job "*) echo "   Requeue=$REQUEUE Restarts=0" ;;
    "requeue "*) echo "REQUEUE $2"; exit "$REFUSED" ;;
esac
"""


@dataclass
class Programs:
    """A folder of stand-ins, and the environment that finds them."""

    folder: Path
    env: dict[str, str]

    def start(self, script: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen([script, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                                stderr=subprocess.STDOUT, env={**self.env, **env})

    def run(self, script: Path, *arguments: str, **env: str) -> tuple[int, str]:
        process = self.start(script, *arguments, **env)
        output, _ = process.communicate(timeout=20)
        return process.returncode, output
