"""The protocol: one loop that every rank runs. Read this file first.

The server (rank 0) plans a round, the workers train their clients on their own shards, sum the
clients' terms among themselves, and update the global model from the sum, to the same bits on all.
Alone, one process is the server and the only worker, and the loop is the same.
"""

from __future__ import annotations

import traceback
from typing import Any

from fedrun.common.errors import FedrunError, explain
from fedrun.common.limits import shortage
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.runtime import Runtime
from fedrun.distributed.stopping import StopRequest
from fedrun.federation.plan import RoundDecision, RoundPlan
from fedrun.federation.server import Server
from fedrun.federation.worker import PeerFailed, Worker
from fedrun.records.checkpoint import Checkpoint

SECONDS_FOR_STORES = 5.0  # of a run that has failed, maybe since a disk does not answer


class RunEnded(FedrunError, RuntimeError):
    """All ranks have agreed to end, and the server has told why."""


def train_federated(config: FederatedConfig, data: TokenData, shards: Shards, runtime: Runtime,
                    stopping: StopRequest, provenance: dict[str, Any],
                    checkpoint: Checkpoint | None = None) -> str:
    """All ranks: train for all rounds, or for those that a checkpoint leaves to do.

    provenance: what a checkpoint records beside the settings. Returns who asked for an end before
    the last round; empty after it. Raises RunEnded on every rank where one rank fails.
    """
    control = runtime.control
    server = Server(config, data, shards, stopping, provenance, len(runtime.workers), checkpoint
                    ) if runtime.is_server else None
    worker = Worker(config, data, shards, runtime, checkpoint
                    ) if runtime.worker is not None else None
    number, last = checkpoint.step if checkpoint else 0, False
    while not last:
        number += 1
        plan = RoundPlan(**control.share(server and server.plan(number)))       # server -> all
        report = _train(worker, plan, runtime) if worker else {}           # workers, each alone
        reports = control.gather(report | {"signal": stopping.signal})     # all -> server
        verdict = RoundDecision(**control.share(server and server.decide(plan, reports or [])))
        if verdict.error:                                                  # server -> all
            _end(verdict, server, worker, runtime)
        kept = plan.evaluate or plan.save or bool(verdict.stop)
        if worker:
            report |= worker.aggregate(plan)                               # workers <-> workers
            if plan.evaluate:
                report["pieces"], report["evaluation_seconds"] = worker.evaluate()
            if kept:
                report |= worker.examine()
            if verdict.stop or (plan.save and not plan.last):
                worker.save(plan)                                          # workers, each alone
            report["saved"] = worker.saver.written()
        model = _copy(server, worker, runtime) if plan.evaluate else None  # first worker -> server
        reports = control.gather(report)                                   # all -> server
        if kept:                                                           # server -> all
            found = RoundDecision(**control.share(server and server.inspect(plan, reports or [], model)))
            if found.error:
                _end(found, server, worker, runtime, good=False)
        if server:
            server.record(plan, verdict, reports or [], model)
        last = plan.last or bool(verdict.stop)
    control.wait_for_copy()
    saved = {"saved": worker.end(plan)} if worker else {}              # workers, each alone
    reports = control.gather(saved)                                        # all -> server
    if server:
        server.finish(plan, verdict, reports or [])
    control.share()                                       # nobody leaves before all is written
    control.close()                                       # from here on peers may be gone
    return "" if plan.last else f"{verdict.stop}, after round {plan.round}"


def _train(worker: Worker, plan: RoundPlan, runtime: Runtime) -> dict[str, Any]:
    """Workers: local training. What goes wrong is reported, so that all ranks end together."""
    try:
        return worker.train(plan)
    except PeerFailed:
        return {}
    except Exception as error:
        runtime.control.fail(error)
        line = shortage(error) or explain(error)
        return {"failure": line} if line else {"traceback": traceback.format_exc()}


def _copy(server: Server | None, worker: Worker | None, runtime: Runtime) -> Any:
    """The global model, from the first worker to the server: a vector there, None elsewhere."""
    if worker and runtime.worker == 0:
        runtime.control.copy_to_server(worker.global_model)
    return server and runtime.control.receive_copy(server.size, server.dtype)


def _end(verdict: RoundDecision, server: Server | None, worker: Worker | None, runtime: Runtime,
         good: bool = True) -> None:
    """All ranks: the end that the server has decided. Nobody leaves before it has told the reason
    and kept the model, if it is `good`, since a launcher ends all processes with the first."""
    model, reports = None, None
    if good:
        model = _copy(server, worker, runtime)                             # first worker -> server
        reports = runtime.control.gather(_examine(worker) if worker else {})   # all -> server
    if server:
        server.end_early(verdict, model, reports or [])
    if worker:
        worker.store.close(SECONDS_FOR_STORES)
    runtime.control.share()
    raise RunEnded(verdict.error)


def _examine(worker: Worker) -> dict[str, Any]:
    """Workers: `Worker.examine`; nothing from a device that has failed, maybe why the run ends."""
    try:
        return worker.examine()
    except RuntimeError:
        return {}
