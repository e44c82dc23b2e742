"""outcome.json: whether a run is running, or how it ended.

Launchers read it, since torchrun exits with 1 even after a clean stop.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from fedrun.common.errors import Failure, FolderLost
from fedrun.common.files import DamagedFile, read_json, write_json
from fedrun.records.run_files import OUTCOME
from fedrun.records.run_lock import holds_lock

START_VARIABLE = "FEDRUN_START"
RESTART_VARIABLE = "FEDRUN_RESTART"  # how often a script has started the run again after failures
Standing = Literal["running", "finished", "stopped", "failed"]


def write_outcome(run_dir: Path, outcome: Standing, step: int, reason: str = "",
                  kind: Failure | None = None) -> None:
    """Write outcome.json.

    `start` in it is FEDRUN_START, which lets the starting script distinguish this outcome from
    an earlier run's. Scripts decide by `kind`, the kind of a failure; the reason is for readers.
    """
    write_json(run_dir / OUTCOME, {
        "outcome": outcome, "step": step, "reason": reason, "kind": kind, "launch": launch_id(),
        "start": os.environ.get(START_VARIABLE, ""), "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0"))})


def write_failure(run_dir: Path, reason: str, kind: Failure = "error") -> None:
    """Record that this process's run ends with an error, and the step of its newest checkpoint, if
    there is one. Nothing changes if the run is already
    finished or stopped, or if another process holds the folder."""
    from fedrun.records.checkpoint import latest_step  # imports torch, which a run has by now
    with suppress(OSError, FolderLost):
        recorded = read_outcome(run_dir)
        if holds_lock(run_dir) and recorded.get("outcome") == "running":
            write_outcome(run_dir, "failed", latest_step(run_dir) or recorded["step"], reason, kind)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """The content of outcome.json; {} if it is missing or damaged."""
    with suppress(OSError, DamagedFile):
        return read_json(run_dir / OUTCOME, dict)
    return {}


def launch_id() -> str:
    """The launcher's name for this job, the same when it restarts it; empty without a launcher."""
    job, run = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("TORCHELASTIC_RUN_ID", "")
    if job:
        return f"slurm {job}"
    if run != "none":
        return run
    # torchrun's static rendezvous always has that name, but each launcher is its own process.
    with suppress(psutil.Error):
        return (f"process {os.getppid()} on {platform.node()}, "
                f"{psutil.Process(os.getppid()).create_time()}")
    return ""


def is_restart(run_dir: Path) -> bool:
    """Whether a launcher restarts the job whose run is in this folder."""
    restarted = any(os.environ.get(name, "0") != "0" for name in (
        "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RESTART_VARIABLE))
    return restarted and read_outcome(run_dir).get("launch") == launch_id()
