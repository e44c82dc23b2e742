"""The protocol: one loop that every rank runs. Read this file first.

The server (rank 0) plans a round. The workers train their clients on their own shards, sum the
clients' terms among themselves, and update the global model from the sum, to the same bits on all
of them. In a world of one process, that process is the server and the only worker, and the loop is
the same.
"""

from __future__ import annotations

import traceback
from dataclasses import replace

from torch import Tensor

from fedrun.common.errors import explain
from fedrun.common.limits import shortage
from fedrun.common.log import ERROR, log
from fedrun.distributed.runtime import Runtime
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import Experiment
from fedrun.federation import global_state
from fedrun.federation.early_end import end
from fedrun.federation.messages import (
    RoundDecision,
    RoundPlan,
    RoundReport,
    WorkerReport,
    gather,
    share,
)
from fedrun.federation.schedule import Schedule
from fedrun.federation.server import Server
from fedrun.federation.site_keys import (
    JournalRefused,
    RoundRefused,
)
from fedrun.federation.worker import PeerFailed, Worker
from fedrun.protecting import Protection, protect, secure
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.recorder import OnRound
from fedrun.records.site_states import SiteStates


def train_federated(experiment: Experiment, runtime: Runtime, stopping: StopRequest,
                    checkpoint: Checkpoint | None = None, on_round: OnRound | None = None,
                    site_states: SiteStates | None = None,
                    protection: Protection | None = None) -> str:
    """All ranks: train all rounds, or those that are left after a checkpoint.

    site_states: at a real site. on_round: called on the server when a round is recorded.
    protection: with --dp.
    Returns who asked to stop before the last round, or "" after it. Raises RunEnded on every rank
    if one rank fails.
    """
    schedule = experiment.schedule
    server = make_server(experiment, schedule, runtime, stopping, checkpoint, on_round)
    worker = make_worker(experiment, schedule, runtime, checkpoint, site_states)
    done = checkpoint.step if checkpoint is not None else 0
    try:
        if experiment.federated.secure_sum:
            secure(experiment, schedule, server, worker, runtime, done)
        if protection is not None:
            protect(experiment, protection, server, worker, runtime)
        return rounds(server, worker, runtime, stopping, done)
    finally:
        # A single process may live on, and its caller releases the run's folder. One of several
        # ends after an error, without a wait for its disk.
        if server is not None and runtime.launch.alone:
            server.recorder.end_thread()
        if worker is not None:
            worker.checkpoint_writer.close()
            if worker.secure is not None:
                worker.secure.close()


def rounds(server: Server | None, worker: Worker | None, runtime: Runtime, stopping: StopRequest,
           done: int) -> str:
    """All ranks: the rounds after the first `done`. Returns who asked to stop, or ""."""
    control, number, last = runtime.control, done, False
    may_refuse = any(one is not None and (one.config.sites or one.config.private)
                     for one in (server, worker))
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
            worker.terms.add_waiting(decision.clip)
            report = aggregate(worker, plan)
            if not report.failure:
                if plan.evaluate:
                    report = worker.evaluate(report)
                saves = bool(decision.stop) or (plan.save and not plan.last)
                if writes:
                    report = worker.check_replicas(report, saves)
                if saves:
                    worker.save(plan)
                if decision.stop or plan.save:
                    report = worker.announce_state(report)
            report = replace(report, written=worker.checkpoint_writer.written())
        model = copy_model(server, worker, runtime) if plan.evaluate else None
        reports = gather(control, report)                                  # all -> server

        # 5. Check the replicas of what is to be written; with sites or     server -> all
        #    --dp, the sum of every round.
        if writes or may_refuse:
            check = share(control, RoundDecision,
                          None if server is None else server.check(plan, reports, model))
            if check.error:
                end(check, server, worker, runtime)

        # 6. Record the round, with what a checkpoint of real sites needs.   server
        state = copy_state(server, worker, runtime, reports) if plan.save or decision.stop else None
        if server is not None:
            server.record(plan, decision, trained, reports, model, state)
        if plan.evaluate and not plan.last and runtime.data_plane.of_site:
            log(f"round {plan.round} is done")
        control.compiling(False)  # what was not compiled before the first round is so now
        last = plan.last or bool(decision.stop)

    control.wait_for_copy()
    reports = gather(control, worker.finish(plan) if worker is not None else RoundReport())
    if server is not None:
        server.finish(plan, decision, reports)
    # All ranks: nobody leaves before everything is written.
    kept = control.share(None if server is None else server.kept)
    if worker is not None:
        worker.keep(kept)
    control.close()  # from here on a peer may be gone
    return "" if plan.last else f"{decision.stop}, after round {plan.round}"


def save_recorded(plan: RoundPlan, server: Server | None, worker: Worker | None, runtime: Runtime
                  ) -> None:
    """All ranks: make a checkpoint of the plan's round, which is recorded already."""
    report = RoundReport()
    if worker is not None:
        report = worker.announce_state(worker.check_replicas(report, saves=True))
        worker.save(plan)
    reports = gather(runtime.control, report)
    check = share(runtime.control, RoundDecision,
                  None if server is None else server.check(plan, reports, None))
    if check.error:
        end(check, server, worker, runtime)
    state = copy_state(server, worker, runtime, reports)
    if server is not None:
        server.begin_checkpoint(plan, state)


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
                  skips_texts=gpus and not config.deterministic, on_round=on_round,
                  members=runtime.control.membership)


def make_worker(experiment: Experiment, schedule: Schedule, runtime: Runtime,
                checkpoint: Checkpoint | None, site_states: SiteStates | None = None
                ) -> Worker | None:
    """This rank's worker; None on a rank that only serves."""
    if runtime.worker is None:
        return None
    return Worker(experiment.federated, experiment.data, experiment.shards, schedule,
                  experiment.new_model(runtime.device), runtime, checkpoint, site_states)


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
        line, trace = shortage(error) or explain(error) or "", traceback.format_exc()
        if runtime.control.membership is not None:  # its text stays at the site
            log(line or "an unexpected error", ERROR, "" if line else trace)
            line = runtime.control.public(error)
        report = WorkerReport(failure=line) if line else WorkerReport(traceback=trace)
    return replace(report, signal=stopping.signal)


def aggregate(worker: Worker, plan: RoundPlan) -> RoundReport:
    """Workers: sum and update. A refusal, which every worker raises, is reported, so that all ranks
    end together."""
    try:
        return worker.aggregate(plan)
    except RoundRefused as error:
        if isinstance(error, JournalRefused):  # its text stays at the site
            log(str(error), ERROR)
        return RoundReport(failure=error.code)


def copy_model(server: Server | None, worker: Worker | None, runtime: Runtime) -> Tensor | None:
    """First worker -> server: the global model, (size,) on the server, None elsewhere."""
    if worker is not None and runtime.worker == 0:
        runtime.control.copy_to_server(worker.global_model)
    return None if server is None else runtime.control.receive_copy(server.size, server.dtype)


def copy_state(server: Server | None, worker: Worker | None, runtime: Runtime,
               reports: list[RoundReport]) -> dict[str, Tensor] | None:
    """First worker of a run of real sites -> server: the global state, as announced in its report.
    None on other ranks, and in other runs, whose first worker writes it into the run's folder."""
    if runtime.control.membership is None:
        return None
    if worker is not None and runtime.worker == 0:
        global_state.send(runtime.control, worker.global_state.named())
    if server is None:
        return None
    announced = next((report.state for report in reports if report.state), [])
    return global_state.receive(runtime.control, announced)
