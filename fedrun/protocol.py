"""The protocol: one loop that every rank runs. Read this file first.

The server (rank 0) plans a round. The workers train their clients on their own shards, sum the
clients' terms among themselves, and update the global model from the sum, to the same bits on all
of them. In a world of one process, that process is the server and the only worker, and the loop is
the same.
"""

from __future__ import annotations

import traceback
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn, TypeVar

from torch import Tensor

from fedrun.common.errors import Diverged, FedrunError, explain
from fedrun.common.limits import shortage
from fedrun.distributed.control_plane import ControlPlane, UnresponsiveRanks
from fedrun.distributed.runtime import Runtime
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import Experiment
from fedrun.federation.messages import (
    RoundDecision,
    RoundPlan,
    RoundReport,
    WorkerReport,
    decode,
    encode,
)
from fedrun.federation.schedule import Schedule
from fedrun.federation.server import Server
from fedrun.federation.worker import PeerFailed, Worker
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.recorder import OnRound

Message = TypeVar("Message")
Report = TypeVar("Report", WorkerReport, RoundReport)

STORE_SECONDS = 5.0  # to close the client store of a failed run, whose disk may not answer
MODEL_SECONDS = 60.0  # to send the last model of a failed run, whose workers may not answer


class RunEnded(FedrunError, RuntimeError):
    """All ranks have agreed to end, and the server has printed the reason."""


class RunDiverged(RunEnded, Diverged):
    """The same, because the loss or the parameters are no longer finite."""


def train_federated(experiment: Experiment, runtime: Runtime, stopping: StopRequest,
                    checkpoint: Checkpoint | None = None, on_round: OnRound | None = None) -> str:
    """All ranks: train all rounds, or those that are left after a checkpoint.

    on_round: called on the server when a round is recorded. Returns who asked to stop before the
    last round, or "" after it. Raises RunEnded on every rank if one rank fails.
    """
    schedule = Schedule(experiment.federated, experiment.shards.sizes)
    server = make_server(experiment, schedule, runtime, stopping, checkpoint, on_round)
    worker = make_worker(experiment, schedule, runtime, checkpoint)
    done = checkpoint.step if checkpoint is not None else 0
    try:
        return rounds(server, worker, runtime, stopping, done)
    finally:
        # A single process may live on, and its caller releases the run's folder. One of several
        # ends after an error, without a wait for its disk.
        if server is not None and runtime.launch.alone:
            server.recorder.end_thread()
        if worker is not None:
            worker.checkpoint_writer.close()


def rounds(server: Server | None, worker: Worker | None, runtime: Runtime, stopping: StopRequest,
           done: int) -> str:
    """All ranks: the rounds after the first `done`. Returns who asked to stop, or ""."""
    control, number, last = runtime.control, done, False
    while not last:
        number += 1

        # 1. Plan: cohort, weights, grid; evaluate? save? Or no more rounds. server -> all
        plan = share(control, RoundPlan, None if server is None else server.plan(number))
        if plan.stop:
            decision = RoundDecision(stop=plan.stop)
            if plan.save:
                save_recorded(plan, server, worker, runtime)
            break

        # 2. Local training.                                                 workers, each alone
        trained = gather(control, train(worker, plan, runtime, stopping))  # all -> server

        # 3. Continue, stop after this round, or end here.                   server -> all
        decision = share(control, RoundDecision,
                         None if server is None else server.decide(plan, trained))
        if decision.error:
            end(decision, server, worker, runtime)
        writes = plan.evaluate or plan.save or bool(decision.stop)

        # 4. Sum the terms and update the global model; evaluate it.         workers <-> workers
        report = RoundReport()
        if worker is not None:
            report = worker.aggregate(plan)
            if plan.evaluate:
                report = worker.evaluate(report)
            if writes:
                report = worker.check_replicas(report)
            if decision.stop or (plan.save and not plan.last):
                worker.save(plan)
            report = replace(report, written=worker.written())
        model = copy_model(server, worker, runtime) if plan.evaluate else None
        reports = gather(control, report)                                  # all -> server

        # 5. Check the replicas of what is to be written.                    server -> all
        if writes:
            check = share(control, RoundDecision,
                          None if server is None else server.check(plan, reports, model))
            if check.error:
                end(check, server, worker, runtime, model_is_good=False)

        # 6. Record the round.                                               server
        if server is not None:
            server.record(plan, decision, trained, reports, model)
        control.compiling(False)  # what was not compiled before the first round is so now
        last = plan.last or bool(decision.stop)

    control.wait_for_copy()
    reports = gather(control, worker.finish(plan) if worker is not None else RoundReport())
    if server is not None:
        server.finish(plan, decision, reports)
    control.share()  # all ranks: nobody leaves before everything is written
    control.close()  # from here on a peer may be gone
    return "" if plan.last else f"{decision.stop}, after round {plan.round}"


def save_recorded(plan: RoundPlan, server: Server | None, worker: Worker | None, runtime: Runtime
                  ) -> None:
    """All ranks: make a checkpoint of the plan's round, which is recorded already."""
    report = RoundReport()
    if worker is not None:
        report = worker.check_replicas(report)
        worker.save(plan)
    reports = gather(runtime.control, report)
    check = share(runtime.control, RoundDecision,
                  None if server is None else server.check(plan, reports, None))
    if check.error:
        end(check, server, worker, runtime, model_is_good=False)
    if server is not None:
        server.begin_checkpoint(plan)


def make_server(experiment: Experiment, schedule: Schedule, runtime: Runtime,
                stopping: StopRequest, checkpoint: Checkpoint | None,
                on_round: OnRound | None = None) -> Server | None:
    """The server on rank 0, None elsewhere.

    Its sample texts keep no GPU waiting, unless a run is to be repeatable with all that it records.
    Beside GPUs they are made with fp32 products: its processor may have no others.
    """
    if not runtime.is_server:
        return None
    config, made = experiment.federated, experiment
    gpus = bool(experiment.provenance.get("gpu"))
    if gpus and config.dtype == "bf16":  # whose parameters are fp32 too
        made = experiment.decided("fp32", experiment.data)
    return Server(config, experiment.data, schedule, made.new_model("cpu"), stopping,
                  experiment.provenance, len(runtime.workers), checkpoint,
                  skips_texts=gpus and not config.deterministic, on_round=on_round)


def make_worker(experiment: Experiment, schedule: Schedule, runtime: Runtime,
                checkpoint: Checkpoint | None) -> Worker | None:
    """This rank's worker; None on a rank that only serves."""
    if runtime.worker is None:
        return None
    return Worker(experiment.federated, experiment.data, experiment.shards, schedule,
                  experiment.new_model(runtime.device), runtime, checkpoint)


def share(control: ControlPlane, kind: type[Message], message: Message | None) -> Message:
    """All ranks: the server's message; the others pass None."""
    return decode(kind, control.share(None if message is None else encode(message)))


def gather(control: ControlPlane, report: Report) -> list[Report]:
    """All ranks: the reports of all of them in order on the server, an empty list elsewhere."""
    received = control.gather(encode(report))
    return [] if received is None else [decode(type(report), values) for values in received]


def train(worker: Worker | None, plan: RoundPlan, runtime: Runtime, stopping: StopRequest
          ) -> WorkerReport:
    """Workers: local training. An error is reported, so that all ranks end together."""
    report = WorkerReport()
    try:
        if worker is not None:
            report = worker.train(plan)
    except PeerFailed:
        pass
    except Exception as error:
        runtime.control.fail(error)
        line = shortage(error) or explain(error)
        report = (WorkerReport(failure=line) if line
                  else WorkerReport(traceback=traceback.format_exc()))
    return replace(report, signal=stopping.signal)


def copy_model(server: Server | None, worker: Worker | None, runtime: Runtime) -> Tensor | None:
    """First worker -> server: the global model, (size,) on the server, None elsewhere."""
    if worker is not None and runtime.worker == 0:
        runtime.control.copy_to_server(worker.global_model)
    return None if server is None else runtime.control.receive_copy(server.size, server.dtype)


def end(decision: RoundDecision, server: Server | None, worker: Worker | None, runtime: Runtime,
        model_is_good: bool = True) -> NoReturn:
    """All ranks: end as the server has decided. It prints the reason first: whoever failed may be
    killed by its CUDA libraries next, and a launcher kills all ranks as soon as one is gone. Nobody
    leaves before it has saved the model too, if that is good."""
    if server is not None:
        server.announce(decision)
    model, reports = None, list[RoundReport]()
    if model_is_good:
        with suppress(UnresponsiveRanks):
            model, reports = last_model(server, worker, runtime)
    if server is not None:
        server.end_early(model, reports)
    if worker is not None:
        worker.store.close(STORE_SECONDS)
    with suppress(UnresponsiveRanks):  # the reason for the end is known
        runtime.control.share()
    raise (RunDiverged if decision.kind == "diverged" else RunEnded)(decision.error)


def last_model(server: Server | None, worker: Worker | None, runtime: Runtime
               ) -> tuple[Tensor | None, list[RoundReport]]:
    """All ranks: the global model, (size,), and the digests of its replicas on the server.

    The model is from the first worker that can still compute a digest of its own, and None if there
    is none. After an error in a CUDA call a process can make no other, and all hold the same model.
    """
    control = runtime.control
    if server is not None:
        control.timeout = min(control.timeout, timedelta(seconds=MODEL_SECONDS))
    reports = gather(control, check_replicas(worker))
    able = [rank for rank, report in enumerate(reports) if report.replicas]
    sender = control.share(able[0] if able else None)
    if sender is None:
        return None, reports
    if worker is not None and runtime.rank == sender:
        control.copy_to_server(worker.global_model)
    return (None if server is None else
            control.receive_copy(server.size, server.dtype, sender)), reports


def check_replicas(worker: Worker | None) -> RoundReport:
    """Workers: `Worker.check_replicas`; nothing from a device that has failed, which may be why the
    run ends."""
    try:
        return RoundReport() if worker is None else worker.check_replicas(RoundReport())
    except RuntimeError:
        return RoundReport()
