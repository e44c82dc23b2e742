"""The server: the plan of each round, the decision on it, the run's history and models.

It hosts no clients and sums nothing. It writes on a thread of its own, beside the training of the
next rounds: nobody waits for a disk, unless the writer falls behind by PENDING writes.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedrun.common.errors import FolderLost, explain
from fedrun.common.files import write_json
from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed.stopping import StopRequest
from fedrun.federation import replicas
from fedrun.federation.messages import (
    RoundDecision,
    RoundPlan,
    RoundReport,
    WorkerReport,
    clients_of,
)
from fedrun.federation.schedule import Schedule
from fedrun.model.build import DTYPES
from fedrun.model.mamba2 import Mamba2LM
from fedrun.records.best import BestModel
from fedrun.records.checkpoint import Checkpoint, CheckpointCoordinator
from fedrun.records.history import COHORT_NUMBERS, RunTotals, cohort_record, half_losses
from fedrun.records.run_dir import SnapshotWriter, save_model, studied, write_failure, write_outcome
from fedrun.records.track import Events, Progress, cohort_event
from fedrun.strategies.base import ClientReport
from fedrun.training.evaluate import Piece, mean_loss, perplexity, sample_text
from fedrun.training.optimizer import scheduled_lr
from fedrun.training.params import FlatParams

# Pieces of work that wait for the writer or are under way. A piece of an evaluated round holds a
# copy of the model, as does one that waits for a place: of 100 million parameters in fp32, 2 GB in
# all at the most.
PENDING = 4


class Server:
    """Rank 0's part of the protocol."""

    def __init__(self, config: FederatedConfig, data: TokenData, schedule: Schedule,
                 model: Mamba2LM, stopping: StopRequest, provenance: dict[str, Any], workers: int,
                 checkpoint: Checkpoint | None = None) -> None:
        """model: the run's model at its start, on the CPU; workers: how many there are."""
        self.config, self.data, self.schedule, self.model = config, data, schedule, model
        self.flat = FlatParams(self.model)
        self.steps = SnapshotWriter(config.run_dir / "server",
                                  studied(self.flat.views(self.flat.vector)))
        self.history: list[dict[str, Any]] = []
        self.clocks = RunTotals()
        self.entropy_reference = config.strategy.first_entropy_reference(data.vocab_size,
                                                                         config.cohort_size)
        self._left_out: list[list[int]] = []  # round and client, since the last record
        self._left_out_why: list[str] = []
        done = 0
        if checkpoint is not None:
            done = checkpoint.step
            self._load(checkpoint)
        self.events = Events(config, "round", self.schedule.rounds, done)
        self.progress = Progress("round", self.schedule.rounds, done, self.clocks.tokens)
        self.stopping = stopping
        losses = [(r["global_step"], r["server_val_loss"]) for r in self.history
                  if r["server_val_loss"] is not None]
        self.best = BestModel(config, losses, self.progress.say) if config.keep == "best" else None
        self.checkpoints = CheckpointCoordinator(config, provenance, workers, self.progress.say,
                                       self._write_rest)
        self._writer = ThreadPoolExecutor(1, "fedrun-writer",
                                          initializer=lambda: torch.set_num_threads(config.threads))
        self._writing: deque[Future[None]] = deque()
        self._waited = False

    @property
    def size(self) -> int:
        return self.flat.size

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    def plan(self, number: int) -> RoundPlan:
        """The plan of round `number`, counted from 1."""
        due = self.checkpoints.due(number, last=number >= self.schedule.rounds)
        return self.schedule.plan(number, self.entropy_reference, save=due)

    def decide(self, plan: RoundPlan, trained: list[WorkerReport]) -> RoundDecision:
        """What happens after local training: all ranks continue, or all end for one reason.

        trained: the reports of all ranks, in order.
        """
        if lost := self.stopping.lost_folder():
            return RoundDecision(lost)
        for rank, report in enumerate(trained):
            if report.failure:
                return RoundDecision(f"round {plan.round}: rank {rank} failed: {report.failure}; "
                                     "all ranks end")
            if report.traceback:
                return RoundDecision(f"{report.traceback}round {plan.round}: rank {rank} failed "
                                     "with the error above; all ranks end")
        clients = clients_of(plan, trained)
        left_out = [c for c in clients if c.left_out]
        if 2 * len(left_out) > len(clients):
            return RoundDecision(f"round {plan.round}: {len(left_out)} of {len(clients)} clients "
                                 f"are left out, more than half ({self._reasons(left_out)}",
                                 "diverged")
        refused = self.config.strategy.refuse_total(math.fsum(c.weight for c in clients))
        if refused:
            return RoundDecision(f"round {plan.round}: {refused}")
        if plan.last:
            return RoundDecision()  # it ends anyway
        signals = [report.signal for report in trained if report.signal]
        return RoundDecision(stop=signals[0] if signals else self.stopping.asked_by())

    def _reasons(self, left_out: list[ClientReport]) -> str:
        """Why these clients are left out, a closing parenthesis, and what to do about it unless a
        reason names a flag itself."""
        why = "; ".join(f"client {c.client}: {c.left_out}" for c in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        if "--" in why:
            return f"{why}{more})"
        advice = f"--lr {self.config.lr:g} may be too large"
        if "exceeds its bound" in why:
            exact = "--wire exact " if self.config.wire == "int8" else ""
            advice += f" ({exact}--reduce float has no bound)"
        return f"{why}{more}): {advice}"

    def check(self, plan: RoundPlan, reports: list[RoundReport], model: Tensor | None
              ) -> RoundDecision:
        """Whether what is about to be written is right: all ranks end, and this round is lost, if
        the replicas of the global model differ or the model is not finite.

        reports: of all ranks, in order; model: the copy that was sent here, (size,), if one was.
        """
        error = replicas.compare(reports, model)
        diverged = any(report.not_finite for report in reports)
        if not error and model is not None and not math.isfinite(mean_loss(_validation(reports))):
            error, diverged = "the validation loss is not finite: --lr may be too large", True
        if not error:
            return RoundDecision()
        return RoundDecision(f"round {plan.round}: {error}", "diverged" if diverged else "error")

    def record(self, plan: RoundPlan, decision: RoundDecision, trained: list[WorkerReport],
               reports: list[RoundReport], model: Tensor | None) -> None:
        """Record a round; `model` (size,) is the global model if it was evaluated."""
        clients = clients_of(plan, trained)
        taken = [c for c in clients if not c.left_out]
        left_out = [c for c in clients if c.left_out]
        loss_sum = math.fsum(c.loss_sum for c in taken)
        tokens = sum(c.tokens for c in taken)
        per_client = (self.config.local_updates * self.config.batch_size
                      * self.config.sequence_length)
        self.clocks.add(
            len(clients) * per_client, loss_sum, tokens,
            local_training_seconds=max(r.local_training_seconds for r in trained),
            aggregation_seconds=max(r.aggregation_seconds for r in reports),
            evaluation_seconds=max(r.evaluation_seconds for r in reports))
        self.clocks.bytes += sum(report.bytes for report in trained)
        entropies = [c.entropy for c in taken if c.entropy is not None]
        if entropies:
            self.entropy_reference = self.config.strategy.next_entropy_reference(entropies)
        for client in left_out:
            self._left_out.append([plan.round, client.client])
            self._left_out_why.append(client.left_out)
            self.progress.say(f"round {plan.round}: client {client.client} is left out: "
                              f"{client.left_out}; its moments are reset")
        train_ppl = perplexity(loss_sum / tokens)
        steps = self.config.local_updates
        seen = {"train_ppl": train_ppl, "left_out": [c.client for c in left_out],
                "left_out_why": [c.left_out for c in left_out], "clients": cohort_event(clients),
                "lr": scheduled_lr(self.config, (plan.round - 1) * steps,
                                   self.schedule.rounds * steps), **self.clocks.now()}
        val_ppl = None
        if model is not None:
            record = self._add_record(plan, clients, reports, model)
            val_ppl = record["server_val_ppl"]
            seen |= {"val_ppl": val_ppl} | {n: record[n] for n in COHORT_NUMBERS if n in record}
        self.events.add("round", round=plan.round, **seen)
        self.progress.step(plan.round, train_ppl, self.clocks.tokens, val_ppl)
        if plan.save or decision.stop:
            self.checkpoints.begin(plan.round, self._state())
        self._commit(reports)

    def _commit(self, reports: list[RoundReport]) -> None:
        for commit in self.checkpoints.collect([report.written for report in reports]):
            self._write(commit)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the server; the records' sample text may still be made."""
        return {"history": self.history.copy(), "clocks": self.clocks.state(),
                "reference": self.entropy_reference, "left_out": list(self._left_out),
                "left_out_why": list(self._left_out_why)}

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.server
        self.history = state["history"]
        self.clocks.load_state(state["clocks"])
        self.entropy_reference = state["reference"]
        self._left_out = state["left_out"]
        # Checkpoints did not always have the reasons, of which there was only one.
        self._left_out_why = state.get("left_out_why", ["not finite"] * len(self._left_out))
        write_json(self.config.run_dir / "training_history.json", self.history)

    def _add_record(self, plan: RoundPlan, clients: list[ClientReport], reports: list[RoundReport],
                    model: Tensor) -> dict[str, Any]:
        losses = _validation(reports)
        loss = mean_loss(losses)
        measured = next(report.measured for report in reports if report.measured)
        record = {
            "global_step": plan.round, **self.clocks.take_train_loss(),
            "server_val_loss": loss, "server_val_ppl": perplexity(loss),
            "val_loss_halves": half_losses(losses), "generated": None, **self.clocks.now(),
            **cohort_record(clients, measured, gradients=not self.config.strategy.trains),
            "left_out": self._left_out, "left_out_why": self._left_out_why}
        if self.config.cohort is not None:
            record["cohort"] = plan.cohort
        if self.config.eval_clients:
            record["client_val_ppls"] = [perplexity(mean_loss(client.validation))
                                         for client in clients]
        self._left_out, self._left_out_why = [], []
        self.history.append(record)
        self._write(lambda: self._save(plan.round, model, record))
        return record

    def _save(self, number: int, model: Tensor, record: dict[str, Any]) -> None:
        """On the writer's thread: the model, its studied parameters, sample text, the history.

        On a disk that is full the run goes on, and the next evaluation tries again; the last one
        has to succeed, and so has one for which too many wait.
        """
        run_dir = self.config.run_dir
        last_try = number == self.schedule.rounds or self.steps.full
        self.flat.vector.copy_(model)
        self.steps.add(number, studied(self.flat.views(model)))
        record["generated"] = sample_text(self.model, self.data, torch.device("cpu"))
        try:
            self._save_model()
            if self.best:
                self.best.offer(number, record["server_val_loss"], self.flat.views(model))
            write_json(run_dir / "training_history.json",
                       [r for r in self.history if r["global_step"] <= number])
            self.steps.write()
        except OSError as error:
            if last_try:
                raise
            self.progress.say(f"fedrun: warning: round {number} could not be written to {run_dir} "
                              f"({error.strerror}); the run goes on")

    def _write_rest(self) -> None:
        self.steps.write()
        self.events.write()

    def _save_model(self) -> None:
        save_model(self.config.run_dir / "model.safetensors", self.flat.views(self.flat.vector))

    def _write(self, work: Callable[[], None]) -> None:
        """Hand work to the writer, which does it in this order. Its errors surface here."""
        while self._writing and self._writing[0].done():
            self._writing.popleft().result()
        if len(self._writing) == PENDING:
            if not self._waited:
                self.progress.say(f"fedrun: warning: {self.config.run_dir} is written more slowly "
                                  "than rounds go by: the run waits for its disk (a larger "
                                  "--val_freq writes less)")
            self._waited = True
            self._writing.popleft().result()
        self._writing.append(self._writer.submit(work))

    def end_early(self, decision: RoundDecision, model: Tensor | None, reports: list[RoundReport]
                  ) -> None:
        """Keep the model of the last whole round, unless there is none, its replicas differ or it
        is not finite, and tell the reason; `reports`: of all ranks, on what they hold now."""
        reason = decision.error
        try:
            self._close()
            if model is not None and not replicas.compare(reports, model):
                self.flat.vector.copy_(model)
                self._save_model()
        except FolderLost as lost:
            reason = str(lost)
        except OSError as error:
            reason += f" (nor could the last good model be kept: {explain(error)})"
        finally:  # whatever the writer has met: the reason is told
            path = self.config.run_dir / "model.safetensors"
            if path.exists():
                reason += f"; the last good model is in {path}"
            write_failure(self.config.run_dir, reason.splitlines()[-1], decision.kind)
            print(f"fedrun: {reason}", file=sys.stderr, flush=True)

    def finish(self, plan: RoundPlan, decision: RoundDecision, reports: list[RoundReport]) -> None:
        """Wait until all is written, and say how the run stands."""
        self._wait_for_writer()
        self._commit(reports)
        self._close()
        if plan.last:
            write_outcome(self.config.run_dir, "finished", plan.round)
            return
        write_outcome(self.config.run_dir, "stopped", plan.round, decision.stop)
        self.stopping.obeyed()

    def _wait_for_writer(self) -> None:
        while self._writing:
            self._writing.popleft().result()

    def _close(self) -> None:
        self._wait_for_writer()
        self._writer.shutdown()
        self.events.add("end", **self.clocks.now())
        self.events.close()
        self.progress.close()


def _validation(reports: list[RoundReport]) -> list[Piece]:
    """The losses of all workers' parts of the validation split."""
    return [(number, loss, tokens) for report in reports
            for number, loss, tokens in report.validation]
