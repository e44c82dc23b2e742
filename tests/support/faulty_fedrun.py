"""`fedrun` with an injected fault, for tests.

FAULT=raise|nan|beyond: in step FAULT_STEP (from 0) of client FAULT_CLIENT (or of `all`): an
    exception, a parameter that is NaN, one beyond the bound of an update.
FAULT=kill|stop|term|launcher|disk: at FAULT_AT, `stage:step`, on rank FAULT_RANK, and only once:
    the file FAULT_ONCE is made then. SIGKILL, SIGSTOP or SIGTERM to this process, SIGKILL to its
    parent, or the error of a full disk.

TWO_MACHINES: as if even and odd ranks were on two.

Stages of workers: train, reduce, between (two sums of a round), reduced, evaluate, half-written. Of
the server: decide, record, before-manifest, after-manifest, finish. Of a central run: step.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from fedrun import __main__, central
from fedrun.aggregation.weiszfeld import WeiszfeldAggregator
from fedrun.federation import server, worker
from fedrun.federation.client import Client
from fedrun.records import checkpoint_writer
from tests.support import two_machines

SIGNALS = {"kill": signal.SIGKILL, "launcher": signal.SIGKILL, "stop": signal.SIGSTOP,
           "term": signal.SIGTERM}
FAULT = os.environ["FAULT"]


def strike(stage: str, step: int) -> None:
    """Cause the fault if it is due here."""
    if (os.environ.get("FAULT_AT") != f"{stage}:{step}"
            or os.environ.get("RANK", "0") != os.environ["FAULT_RANK"]):
        return
    try:
        os.close(os.open(os.environ["FAULT_ONCE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    if FAULT == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.kill(os.getppid() if FAULT == "launcher" else os.getpid(), SIGNALS[FAULT])


def before(owner: Any, name: str, stage: str, step_of: Callable[..., int]) -> None:
    """Strike before each call of a function."""
    healthy = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        strike(stage, step_of(*args, **kwargs))
        return healthy(*args, **kwargs)

    setattr(owner, name, faulty)


def after(owner: Any, name: str, stage: str, step_of: Callable[..., int]) -> None:
    """Strike after each call of a function."""
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


def of_plan_remembered(worker: Any, plan: Any) -> int:
    """The round of the plan, kept for what gets no plan."""
    current["round"] = of_plan(worker, plan)
    return current["round"]


def write_in_halves(folder: Any, files: Any) -> Any:
    """Write a checkpoint's tensor files, and strike when half of them are written."""
    names = list(files)
    checksums = healthy_write(folder, {name: files[name] for name in names[:len(names) // 2]})
    strike("half-written", of_folder(folder))
    return checksums | healthy_write(
        folder, {name: files[name] for name in names[len(names) // 2:]})


def due(coordinator: checkpoint_writer.CheckpointCoordinator, number: int, last: bool) -> bool:
    """Whether a checkpoint is due by the round's number alone, however slowly the last one is
    written: a fault at the checkpoint of a round must be reached on a busy machine too."""
    every = coordinator.config.checkpoint_freq
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
    before(worker.Worker, "aggregate", "reduce", of_plan_remembered)
    before(WeiszfeldAggregator, "_move_centre", "between", lambda *_: current["round"])
    after(worker.Worker, "aggregate", "reduced", of_plan)
    before(worker.Worker, "evaluate", "evaluate", lambda *_: current["round"])
    patched = checkpoint_writer
    healthy_write = patched.write_tensors
    patched.write_tensors = write_in_halves
    patched = checkpoint_writer.CheckpointCoordinator
    patched.due = due
    before(server.Server, "decide", "decide", of_plan)
    before(server.Server, "record", "record", of_plan)
    before(checkpoint_writer, "commit", "before-manifest", of_folder)
    after(checkpoint_writer, "commit", "after-manifest", of_folder)
    before(server.Server, "finish", "finish", of_plan)
    after(central.Training, "step", "step", lambda training: training.done)

if __name__ == "__main__":
    if "TWO_MACHINES" in os.environ:
        two_machines.pretend()
    __main__.main()
