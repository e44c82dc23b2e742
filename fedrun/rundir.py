"""A run's folder: complete by itself, every file in it whole or absent.

    config.json            the resolved settings
    environment.json       versions, devices, fingerprint of the corpus
    training_history.json  a record for each evaluated step
    events.jsonl           a line for each step
    model.safetensors      the last good global model, in mamba-ssm's names
    best/                  with --keep best: the model with the lowest validation loss (best.py)
    server/params/step_000030.npz, server/deltas/...    (central: params/, deltas/)
    checkpoints/           to go on from (checkpoint.py)
    clients/               states of clients while it runs, with --client_store disk (store.py)
    tracker.json           the run's id at a hosted tracker (--track wandb or trackio)
    outcome.json           how the run stands: running, finished, stopped or failed
    lock                   held by the run's first process while it lives
"""

from __future__ import annotations

import errno
import fcntl
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

from fedrun.errors import Failure
from fedrun.files import write_json, write_whole
from fedrun.run_files import CLIENTS, LOCK, MANIFEST, OUTCOME, foreign, is_partial, remove

# The parameters of a Mamba-2 block whose change is studied, as the model names them.
_STUDIED = {"in_proj.weight": "in_proj", "A_log": "A_log", "D": "D", "dt_bias": "dt_bias"}


def save_model(path: Path, tensors: Iterable[tuple[str, Tensor]],
               metadata: dict[str, str] | None = None) -> None:
    """The model as safetensors, names and shapes as `tensors` gives them."""
    write_whole(path, save({name: t.contiguous().cpu() for name, t in tensors}, metadata))


def studied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """in_proj, A_log, D and dt_bias of every layer as float32, keyed `layers.0.in_proj`."""
    found = {}
    for name, tensor in tensors:
        _, _, rest = name.partition("layers.")
        layer, _, parameter = rest.partition(".mixer.")
        if parameter in _STUDIED:
            array = tensor.detach().float().cpu().numpy()
            found[f"layers.{layer}.{_STUDIED[parameter]}"] = array.copy()
    return found


def save_studied(folder: Path, step: int, now: Mapping[str, np.ndarray],
                 start: Mapping[str, np.ndarray]) -> None:
    """`folder`/params/step_000030.npz and the change since the start, `folder`/deltas/..."""
    deltas = {f"delta_{name}": now[name] - start[name] for name in now}
    for kind, arrays in (("params", now), ("deltas", deltas)):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_whole(folder / kind / f"step_{step:06d}.npz", buffer.getvalue())


def cut_back(run_dir: Path, step: int) -> None:
    """Remove what a run wrote after a step, which it will make again, and what a kill left half."""
    def outdated(name: str) -> bool:
        saved = re.search(r"/step_(\d+)\.npz$", name)
        return (name.startswith((f"{CLIENTS}/", ".")) or is_partial(name)
                or bool(saved and int(saved[1]) > step))

    remove(run_dir, outdated)
    events = run_dir / "events.jsonl"
    if events.exists():
        lines = events.read_text(encoding="utf-8").splitlines()
        write_whole(events, "".join(line + "\n" for line in lines if _until(line, step)).encode())


def _until(line: str, step: int) -> bool:
    """Whether an event belongs to a run's first steps; the end of a run that goes on does not."""
    with suppress(ValueError):
        event = json.loads(line)
        return bool(event.get("event") != "end"
                    and event.get("round", event.get("step", 0)) <= step)
    return False  # half a line


def empty(run_dir: Path, describe: Callable[[], None]) -> None:
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


class InUse(ValueError):
    """Another run holds the folder."""


def lock(run_dir: Path, token: str) -> int:
    """Hold the folder until this process ends, however it does: the kernel frees the lock.

    `token` is written into the lock's file, by which processes on other machines see that they look
    at the same folder. Returns the open file, to be kept. InUse, naming the holder, where another
    run has it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + SECONDS_TO_DIE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if time.monotonic() > deadline:
                holder = os.pread(file, 200, 0).decode(errors="replace").partition("\n")[0]
                raise InUse(f"the folder {run_dir} is in use by {holder}; wait for it, or choose "
                            "another --run_name") from None
            time.sleep(0.1)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{_this_process()}\n{token}\n".encode(), 0)
    os.fsync(file)
    return file


def _this_process(number: int | None = None) -> str:
    return f"process {number or os.getpid()} on {platform.node()}"


def lock_token(run_dir: Path) -> str:
    """What the run that holds a folder wrote into its lock; empty where none is to be seen."""
    with suppress(OSError):
        return (run_dir / LOCK).read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]
    return ""


def launch_id() -> str:
    """What a launcher calls this job, the same when it starts it again; empty without one."""
    job, run = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("TORCHELASTIC_RUN_ID", "")
    if job:
        return f"slurm {job}"
    if run != "none":
        return run
    # All of torchrun's static rendezvous have that name, but each is a process of its own.
    with suppress(psutil.Error):
        return f"{_this_process(os.getppid())}, {psutil.Process(os.getppid()).create_time()}"
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
    held = read_outcome(run_dir)
    with suppress(OSError):
        ours = (run_dir / LOCK).read_text(encoding="utf-8").startswith(f"{_this_process()}\n")
        if ours and held.get("outcome") == "running":
            write_outcome(run_dir, "failed", held["step"], reason, kind)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """The same; {} where there is none."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((run_dir / OUTCOME).read_text(encoding="utf-8"))
        return found
    return {}
