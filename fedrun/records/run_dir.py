"""A run's folder: complete by itself; every file in it is whole or absent.

    config.json            the resolved settings
    environment.json       versions, devices, fingerprint of the corpus; with --sites who they are
    training_history.json  a record for each evaluated step
    events.jsonl           a line for each step (events.py)
    model.safetensors      the last good global model, in mamba-ssm's names
    best/                  with --keep best: the model with the lowest validation loss (best.py)
    server/params/step_000030.npz, server/deltas/...    snapshots (snapshots.py); of a central run:
                                                        params/, deltas/
    server/params/step_000000.npz                       the start
    checkpoints/           to resume from (checkpoint.py)
    clients/               states of clients while the run lasts, with --client_store disk
    tracker.json           the run's id at a hosted tracker (--track wandb or trackio)
    outcome.json           running, finished, stopped or failed (outcome.py)
    lock                   held by the run's first process while it lives (run_lock.py)

Here: how a folder is cut back to a checkpoint's step, or cleared for a new run.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedrun.common.files import read_regular, write_atomic
from fedrun.records.run_files import CLIENTS, LOCK, MANIFEST, OUTCOME, foreign, is_partial, remove

ENVIRONMENT = "environment.json"
MAX_EVENTS_BYTES = 1 << 40  # of events.jsonl


def truncate_after(run_dir: Path, step: int) -> None:
    """Remove what a run wrote after a step, which the resumed run writes again, and half-written
    files that a kill left."""
    def outdated(name: str) -> bool:
        saved = re.search(r"/step_(\d+)\.npz$", name)
        return (name.startswith((f"{CLIENTS}/", ".")) or is_partial(name)
                or bool(saved and int(saved[1]) > step))

    remove(run_dir, outdated)
    events = run_dir / "events.jsonl"
    with suppress(FileNotFoundError):
        lines = read_regular(events, largest=MAX_EVENTS_BYTES).split(b"\n")
        write_atomic(events, b"".join(line + b"\n" for line in lines if _is_until(line, step)))


def _is_until(line: bytes, step: int) -> bool:
    """Whether a line of events.jsonl is an event up to a step. Lines that are cut off or damaged
    are not, nor is the `end` of a run that is resumed."""
    with suppress(ValueError, RecursionError, TypeError, AttributeError):
        event = json.loads(line)
        return bool(event.get("event") != "end"
                    and event.get("round", event.get("step", 0)) <= step)
    return False


def clear_run_dir(run_dir: Path, describe: Callable[[], None]) -> None:
    """Remove a run's files from its folder, except the lock and what `describe` writes.

    describe: writes config.json and outcome.json of the new run. It is called after the checkpoints
    are out of the way and before the rest is removed: if this is interrupted, nothing of the old
    run passes for the new one's.
    """
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() and foreign(run_dir):  # the user's files must not move with them
        remove(run_dir, lambda name: name.endswith(f"/{MANIFEST}"))
    elif checkpoints.exists():
        checkpoints.rename(run_dir / f".checkpoints-{os.getpid()}-{time.time_ns()}")
    describe()
    remove(run_dir, lambda name: name not in (LOCK, OUTCOME, "config.json"))
