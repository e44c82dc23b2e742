"""A run's folder: complete by itself, every file in it whole or absent.

    config.json            the resolved settings
    environment.json       versions, devices, fingerprint of the corpus
    training_history.json  a record for each evaluated step
    events.jsonl           a line for each step
    model.safetensors      the last good global model, in mamba-ssm's names
    server/params/step_000030.npz, server/deltas/...    (central: params/, deltas/)
    checkpoints/           to go on from (checkpoint.py)
    clients/               states of clients while it runs, with --client_store disk (store.py)
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
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.torch import save
from torch import Tensor

from fedrun.files import DamagedFile, read_json, read_regular, write_json, write_whole
from fedrun.stopping import LOCK

# The parameters of a Mamba-2 block whose change is studied, as the model names them.
_STUDIED = {"in_proj.weight": "in_proj", "A_log": "A_log", "D": "D", "dt_bias": "dt_bias"}


CLIENTS = "clients"
ENVIRONMENT = "environment.json"
LARGEST_EVENTS = 1 << 40  # bytes


def save_model(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The model as safetensors, names and shapes as `tensors` gives them."""
    write_whole(path, save({name: t.contiguous().cpu() for name, t in tensors}))


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
    shutil.rmtree(run_dir / CLIENTS, ignore_errors=True)
    for path in run_dir.rglob(".*"):
        if path.is_file():
            path.unlink()
    for path in run_dir.glob(".checkpoints-*"):
        shutil.rmtree(path)
    for path in run_dir.rglob("step_*.npz"):
        if re.fullmatch(r"step_\d+", path.stem) and int(path.stem[5:]) > step and path.is_file():
            path.unlink()
    events = run_dir / "events.jsonl"
    with suppress(FileNotFoundError):
        lines = read_regular(events, largest=LARGEST_EVENTS).split(b"\n")
        write_whole(events, b"".join(line + b"\n" for line in lines if _until(line, step)))


def _until(line: bytes, step: int) -> bool:
    """Whether an event belongs to a run's first steps; the end of a run that is resumed does not,
    nor does a line that is half or damaged."""
    with suppress(ValueError, RecursionError, TypeError, AttributeError):
        event = json.loads(line)
        return bool(event.get("event") != "end"
                    and event.get("round", event.get("step", 0)) <= step)
    return False


def empty(run_dir: Path, describe: Callable[[], None]) -> None:
    """Remove the run that a folder holds, all but the lock and what `describe` writes: what the
    folder holds from now on. Nothing of the old run can be taken for the new one in between."""
    checkpoints = run_dir / "checkpoints"
    if checkpoints.exists():
        checkpoints.rename(run_dir / f".checkpoints-{os.getpid()}-{time.time_ns()}")
    describe()
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, OUTCOME, "config.json"):
            path.unlink()


# ---- how the run stands --------------------------------------------------------------------------

OUTCOME = "outcome.json"
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


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def lock_token(run_dir: Path) -> str:
    """What the run that holds a folder wrote into its lock; empty where none is to be seen."""
    with suppress(OSError):
        return (run_dir / LOCK).read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2]
    return ""


def launch_id() -> str:
    """What a launcher calls this job, the same when it starts it again; empty without one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"slurm {job}" if job else os.environ.get("TORCHELASTIC_RUN_ID", "")


def write_outcome(run_dir: Path, outcome: Standing, step: int, reason: str = "") -> None:
    """outcome.json: read by launchers, since torchrun exits with 1 even after a clean stop."""
    write_json(run_dir / OUTCOME, {
        "outcome": outcome, "step": step, "reason": reason, "launch": launch_id(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0"))})


def write_failure(run_dir: Path, reason: str) -> None:
    """The outcome of this process's run, which ends with an error. What was finished or stopped
    stays so, and so does a run that another process holds."""
    held = read_outcome(run_dir)
    with suppress(OSError):
        ours = (run_dir / LOCK).read_text(encoding="utf-8").startswith(f"{_this_process()}\n")
        if ours and held.get("outcome") == "running":
            write_outcome(run_dir, "failed", held["step"], reason)


def read_outcome(run_dir: Path) -> dict[str, Any]:
    """The same; {} where there is none, or a damaged one."""
    with suppress(OSError, DamagedFile):
        return read_json(run_dir / OUTCOME, dict)
    return {}
