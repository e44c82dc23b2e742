"""`fedrun` with a fault in it, for tests.

FAULT=raise|nan|beyond: in step FAULT_STEP (from 0) of client FAULT_CLIENT (or of `all`).
FAULT=kill|stop|term: at FAULT_AT, `stage:step`, on rank FAULT_RANK; once, as the file FAULT_ONCE
says: SIGKILL, SIGSTOP or SIGTERM to this process, or with FAULT=launcher SIGKILL to its parent, or
with FAULT=disk the error of a full one.
Workers train, reduce, evaluate and write their files; the server judges, records, commits
checkpoints and finishes; a central run steps.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from fedrun import __main__, central
from fedrun.federation import server, worker
from fedrun.federation.client import Client
from fedrun.records import checkpoint

SENT = {"kill": signal.SIGKILL, "launcher": signal.SIGKILL, "stop": signal.SIGSTOP,
        "term": signal.SIGTERM}
FAULT = os.environ["FAULT"]


def strike(stage: str, step: int) -> None:
    """The fault, if it is due here."""
    if (os.environ.get("FAULT_AT") != f"{stage}:{step}"
            or os.environ.get("RANK", "0") != os.environ["FAULT_RANK"]):
        return
    try:
        os.close(os.open(os.environ["FAULT_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if FAULT == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getppid() if FAULT == "launcher" else os.getpid(), SENT[FAULT])


def before(owner: Any, name: str, stage: str, step_of: Callable[..., int]) -> None:
    """Strike when a function is called."""
    healthy = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        strike(stage, step_of(*args, **kwargs))
        return healthy(*args, **kwargs)

    setattr(owner, name, faulty)


def after(owner: Any, name: str, stage: str, step_of: Callable[..., int]) -> None:
    """Strike when a function has been called."""
    healthy = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        result = healthy(*args, **kwargs)
        strike(stage, step_of(*args, **kwargs))
        return result

    setattr(owner, name, faulty)


def of_folder(folder: Any, *_: Any) -> int:
    return int(folder.name.removeprefix("step_"))


def of_plan(_: Any, plan: Any, *__: Any) -> int:
    return int(plan.round)


current = {"round": 0}


def remembered(_: Any, plan: Any) -> int:
    current["round"] = int(plan.round)
    return current["round"]


def first_files(folder: Any, files: Any) -> Any:
    """Write half of a snapshot's files, and stop there if that is the fault."""
    names = list(files)
    sums = whole_files(folder, {name: files[name] for name in names[:len(names) // 2]})
    strike("half-written", of_folder(folder))
    return sums | whole_files(folder, {name: files[name] for name in names[len(names) // 2:]})


def due(checkpoints: checkpoint.CheckpointCoordinator, number: int, last: bool) -> bool:
    """A checkpoint by the round's number alone, however slowly the one before is written: a fault
    at a round is to find its round on a busy machine too."""
    every = checkpoints.config.checkpoint_freq
    return every is not None and (last or number % every == 0)


if FAULT in ("raise", "nan", "beyond"):
    healthy_batch = Client.next_batch

    def faulty_batch(client: Client) -> Any:
        chosen = os.environ["FAULT_CLIENT"] in (str(client.index), "all")
        if chosen and client.steps_done == int(os.environ["FAULT_STEP"]):
            if FAULT == "raise":
                raise ZeroDivisionError("injected")
            client.flat.vector[7] = float("nan") if FAULT == "nan" else 45.0
        return healthy_batch(client)

    patched: Any = Client
    patched.next_batch = faulty_batch
else:
    after(Client, "next_batch", "train", lambda client: client.steps_done)
    before(worker.Worker, "aggregate", "reduce", remembered)
    after(worker.Worker, "aggregate", "reduced", of_plan)
    before(worker.Worker, "evaluate", "evaluate", lambda *_: current["round"])
    whole_files = checkpoint.write_tensors
    patched = checkpoint
    patched.write_tensors = first_files
    patched = checkpoint.CheckpointCoordinator
    patched.due = due
    before(server.Server, "decide", "judge", of_plan)
    before(server.Server, "record", "record", of_plan)
    before(checkpoint, "commit", "before-manifest", of_folder)
    after(checkpoint, "commit", "after-manifest", of_folder)
    before(server.Server, "finish", "finish", of_plan)
    after(central.Training, "step", "step", lambda training: training.done)

if __name__ == "__main__":
    __main__.main()
