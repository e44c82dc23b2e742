"""A run's folder: complete by itself, every file in it whole or absent.

    config.json            the resolved settings
    environment.json       versions, devices, fingerprint of the corpus
    training_history.json  a record for each evaluated step
    events.jsonl           a line for each step
    model.safetensors      the last good global model, in mamba-ssm's names
    best/                  with --keep best: the model with the lowest validation loss (best.py)
    server/params/step_000030.npz, server/deltas/...    (central: params/, deltas/)
    checkpoints/           to go on from (checkpoint.py)
    clients/               states of clients while it runs, with --client_store disk
    tracker.json           the run's id at a hosted tracker (--track wandb or trackio)
    outcome.json           how the run stands: running, finished, stopped or failed
    lock                   held by the run's first process while it lives
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from safetensors.torch import save
from torch import Tensor

from fedrun.common import locks
from fedrun.common.errors import Failure, FolderLost, InputError
from fedrun.common.files import (
    DamagedFile,
    claim,
    read_json,
    read_regular,
    write_atomic,
    write_json,
)
from fedrun.model.names import mixer_parameter
from fedrun.records.run_files import CLIENTS, LOCK, MANIFEST, OUTCOME, foreign, is_partial, remove

# Parameters of a Mamba-2 mixer whose change is recorded, and their names in npz files.
_STUDIED = {"in_proj.weight": "in_proj", "A_log": "A_log", "D": "D", "dt_bias": "dt_bias"}


ENVIRONMENT = "environment.json"
LARGEST_EVENTS = 1 << 40  # bytes


def save_model(path: Path, tensors: Iterable[tuple[str, Tensor]],
               metadata: dict[str, str] | None = None) -> None:
    """The model as safetensors, names and shapes as `tensors` gives them."""
    write_atomic(path, save({name: t.contiguous().cpu() for name, t in tensors}, metadata))


def studied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """in_proj, A_log, D and dt_bias of every layer as float32, keyed `layers.0.in_proj`."""
    found = {}
    for name, tensor in tensors:
        layer, parameter = mixer_parameter(name)
        if parameter in _STUDIED:
            array = tensor.detach().float().cpu().numpy()
            found[f"layers.{layer}.{_STUDIED[parameter]}"] = array.copy()
    return found


def save_snapshot(folder: Path, step: int, now: Mapping[str, np.ndarray],
                 start: Mapping[str, np.ndarray]) -> None:
    """`folder`/params/step_000030.npz and the change since the start, `folder`/deltas/..."""
    deltas = {f"delta_{name}": now[name] - start[name] for name in now}
    for kind, arrays in (("params", now), ("deltas", deltas)):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomic(folder / kind / f"step_{step:06d}.npz", buffer.getvalue())


class SnapshotWriter:
    """What is kept of the evaluated steps of one model. Those that a full disk cannot take wait in
    memory for the next, or for a checkpoint, which is none without them."""

    AT_MOST = 3  # that wait, of a model's size each

    def __init__(self, folder: Path, start: Mapping[str, np.ndarray]) -> None:
        self._folder, self._start = folder, start
        self._waiting: list[tuple[int, Mapping[str, np.ndarray]]] = []

    @property
    def full(self) -> bool:
        """Whether as many wait as may."""
        return len(self._waiting) >= self.AT_MOST

    def add(self, step: int, now: Mapping[str, np.ndarray]) -> None:
        """A step's parameters, which `write` is to write."""
        self._waiting.append((step, now))

    def write(self) -> None:
        """Write those that wait, oldest first. OSError where the disk does not take them."""
        while self._waiting:
            save_snapshot(self._folder, *self._waiting[0], self._start)
            self._waiting.pop(0)


def truncate_after(run_dir: Path, step: int) -> None:
    """Remove what a run wrote after a step, which it will make again, and what a kill left half."""
    def outdated(name: str) -> bool:
        saved = re.search(r"/step_(\d+)\.npz$", name)
        return (name.startswith((f"{CLIENTS}/", ".")) or is_partial(name)
                or bool(saved and int(saved[1]) > step))

    remove(run_dir, outdated)
    events = run_dir / "events.jsonl"
    with suppress(FileNotFoundError):
        lines = read_regular(events, largest=LARGEST_EVENTS).split(b"\n")
        write_atomic(events, b"".join(line + b"\n" for line in lines if _until(line, step)))


def _until(line: bytes, step: int) -> bool:
    """Whether an event belongs to a run's first steps; the end of a run that is resumed does not,
    nor does a line that is half or damaged."""
    with suppress(ValueError, RecursionError, TypeError, AttributeError):
        event = json.loads(line)
        return bool(event.get("event") != "end"
                    and event.get("round", event.get("step", 0)) <= step)
    return False


def clear(run_dir: Path, describe: Callable[[], None]) -> None:
    """Remove the run that a folder holds, all but the lock and what `describe` writes: what the
    folder holds from now on. Nothing of the old run can be taken for the new one in between."""
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists() and foreign(run_dir):  # which is not to be moved with them
        remove(run_dir, lambda name: name.endswith(f"/{MANIFEST}"))
    elif checkpoints.exists():
        checkpoints.rename(run_dir / f".checkpoints-{os.getpid()}-{time.time_ns()}")
    describe()
    remove(run_dir, lambda name: name not in (LOCK, OUTCOME, "config.json"))


# ---- how the run stands --------------------------------------------------------------------------

START = "FEDRUN_START"
SECONDS_TO_DIE = 3.0  # that a killed run may take to let go of its folder
Standing = Literal["running", "finished", "stopped", "failed"]


class RunDirLocked(InputError):
    """Another run holds the folder."""


_locks: dict[Path, locks.Held] = {}  # of the folders that this process holds


def lock(run_dir: Path, token: str) -> None:
    """Hold the folder until `release`, or until this process ends, however it does.

    `token` is written into the lock's file, by which the run's other processes, on other machines
    too, see that they look at the same folder. RunDirLocked, naming the holder, where another run has it.
    """
    try:
        held = locks.acquire(run_dir / LOCK, SECONDS_TO_DIE)
    except locks.Busy as holder:
        raise RunDirLocked(f"the folder {run_dir} is in use by {holder}; wait for it, or choose another "
                    "--run_name") from None
    try:
        held.write(token)
    except OSError:
        held.release()
        raise
    _locks[run_dir] = held
    claim(run_dir, lambda: check(run_dir, token))


def guard(run_dir: Path, token: str) -> None:
    """The run's other processes: write into the folder only while it is this run's."""
    if run_dir not in _locks:
        claim(run_dir, lambda: check(run_dir, token))


def release(run_dir: Path) -> None:
    """This process's run has ended, and nothing of it writes any more."""
    claim(run_dir, None)
    if held := _locks.pop(run_dir, None):
        held.release()


def check(run_dir: Path, token: str) -> None:
    """FolderLost where the lock's file does not hold the token: the folder was removed, renamed, or
    given to another run since, which must not find ours in it."""
    try:
        text = (run_dir / LOCK).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        raise FolderLost(f"{run_dir}: the folder of this run was removed or renamed while it ran; "
                         "the run ends, and has written nothing since") from None
    except OSError:
        return  # of a disk that does not answer: the writing itself will tell
    if _token(text) != token:
        holder = text.partition("\n")[0]
        raise FolderLost(f"{run_dir}: the folder of this run was taken by {holder} while it ran; "
                         "this run ends, and has written nothing since")


def lock_token(run_dir: Path) -> str:
    """What the run that holds a folder wrote into its lock; empty where none is to be seen."""
    with suppress(OSError):
        return _token((run_dir / LOCK).read_text(encoding="utf-8", errors="replace"))
    return ""


def _token(text: str) -> str:
    return text.rpartition("\n")[0].rpartition("\n")[2]


def launch_id() -> str:
    """What a launcher calls this job, the same when it starts it again; empty without one."""
    job, run = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("TORCHELASTIC_RUN_ID", "")
    if job:
        return f"slurm {job}"
    if run != "none":
        return run
    # All of torchrun's static rendezvous have that name, but each is a process of its own.
    with suppress(psutil.Error):
        return (f"process {os.getppid()} on {platform.node()}, "
                f"{psutil.Process(os.getppid()).create_time()}")
    return ""


def write_outcome(run_dir: Path, outcome: Standing, step: int, reason: str = "",
                  kind: Failure | None = None) -> None:
    """outcome.json: read by launchers, since torchrun exits with 1 even after a clean stop.

    `start` is what the script that started this run has called the start (FEDRUN_START), so that it
    does not take an earlier run's outcome for this one's. Scripts decide by `kind`, that of a
    failure; the reason is for readers.
    """
    write_json(run_dir / OUTCOME, {
        "outcome": outcome, "step": step, "reason": reason, "kind": kind, "launch": launch_id(),
        "start": os.environ.get(START, ""), "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0"))})


def write_failure(run_dir: Path, reason: str, kind: Failure = "error") -> None:
    """The outcome of this process's run, which ends with an error. What was finished or stopped
    stays so, and so does a run that another process holds."""
    with suppress(OSError, FolderLost):
        held = read_outcome(run_dir)
        if run_dir in _locks and held.get("outcome") == "running":
            write_outcome(run_dir, "failed", held["step"], reason, kind)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """The same; {} where there is none, or a damaged one."""
    with suppress(OSError, DamagedFile):
        return read_json(run_dir / OUTCOME, dict)
    return {}
