"""The server: the plan of each round, the decision on it, and the run's record.

It hosts no clients and sums nothing. What it records is written during the training of the next
rounds (see records/recorder.py).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedrun.common.errors import FolderLost, explain
from fedrun.common.log import ERROR, WARNING, log
from fedrun.common.perplexity import perplexity
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
from fedrun.model.base import Model
from fedrun.model.build import DTYPES
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.events import cohort_event
from fedrun.records.history import cohort_record
from fedrun.records.outcome import write_failure
from fedrun.records.recorder import ON_ROUND, OnRound, Recorder
from fedrun.records.schema import FEDERATED
from fedrun.strategies.base import ClientReport
from fedrun.training.evaluate import Piece, mean_loss, sample_prompt, sample_text
from fedrun.training.optimizer import scheduled_lr
from fedrun.training.params import FlatParams


class Server:
    """Rank 0's part of the protocol."""

    def __init__(self, config: FederatedConfig, data: TokenData, schedule: Schedule,
                 model: Model, stopping: StopRequest, provenance: dict[str, Any], workers: int,
                 checkpoint: Checkpoint | None = None, skips_texts: bool = False,
                 on_round: OnRound | None = None) -> None:
        """
        model: the run's model at its start, on the CPU.
        workers: how many there are.
        skips_texts: whether an evaluation goes without a sample text for which training would have
            to wait (see records/sample_texts.py).
        on_round: called when a round is recorded.
        """
        self.config, self.data, self.schedule, self.model = config, data, schedule, model
        self.flat = FlatParams(model)
        self.entropy_reference = config.strategy.first_entropy_reference(data.vocab_size,
                                                                         config.cohort_size)
        self._left_out: list[list[int]] = []  # round and client, since the last record
        self._left_out_why: list[str] = []
        self._saved = 0  # the last round whose checkpoint was begun
        step, state = (0, None) if checkpoint is None else (checkpoint.step, checkpoint.server)
        if state is not None:
            self._load(state)
        self.recorder = Recorder(config, FEDERATED, schedule.rounds, self.flat, provenance, workers,
                                 step, state, skips_texts, on_round)
        self.stopping = stopping

    @property
    def size(self) -> int:
        """Elements of the model."""
        return self.flat.size

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's parameters."""
        return DTYPES[self.config.dtype]

    def plan(self, number: int) -> RoundPlan:
        """The plan of round `number`, counted from 1; or of the one before it, which is to be the
        last, if `on_round` has asked for that."""
        if self.recorder.stop:
            return replace(self.schedule.plan(number - 1, self.entropy_reference), evaluate=False,
                           save=self._saved < number - 1, stop=ON_ROUND)
        due = self.recorder.checkpoint_due(number)
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
            advice += " (--aggregation float has no bound)"
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
        steps = self.config.local_updates
        per_client = steps * self.config.batch_size * self.config.sequence_length
        self.recorder.totals.add(
            len(clients) * per_client, loss_sum, tokens,
            local_training_seconds=max(r.local_training_seconds for r in trained),
            aggregation_seconds=max(r.aggregation_seconds for r in reports),
            evaluation_seconds=max(r.evaluation_seconds for r in reports))
        self.recorder.totals.bytes += sum(report.bytes for report in trained)
        entropies = [c.entropy for c in taken if c.entropy is not None]
        if entropies:
            self.entropy_reference = self.config.strategy.next_entropy_reference(entropies)
        for client in left_out:
            self._left_out.append([plan.round, client.client])
            self._left_out_why.append(client.left_out)
            log(f"round {plan.round}: client {client.client} is left out: {client.left_out}; its "
                "moments are reset", WARNING)
        lr = scheduled_lr(self.config, (plan.round - 1) * steps, self.schedule.rounds * steps)
        record = None if model is None else self._evaluated(plan, clients, reports, model)
        self.recorder.step(plan.round, perplexity(loss_sum / tokens), lr, record,
                           left_out=[c.client for c in left_out],
                           left_out_why=[c.left_out for c in left_out],
                           clients=cohort_event(clients))
        if plan.save or decision.stop:
            self.begin_checkpoint(plan)
        self.recorder.commit_checkpoints(report.written for report in reports)

    def begin_checkpoint(self, plan: RoundPlan) -> None:
        """Keep the server's state after a round, whose workers have begun to write a checkpoint."""
        self._saved = plan.round
        self.recorder.begin_checkpoint(plan.round, reference=self.entropy_reference,
                                       left_out=list(self._left_out),
                                       left_out_why=list(self._left_out_why))

    def _load(self, state: dict[str, Any]) -> None:
        self.entropy_reference = state["reference"]
        self._left_out = state["left_out"]
        # Older checkpoints lack the reasons, because there was only one.
        self._left_out_why = state.get("left_out_why", ["not finite"] * len(self._left_out))

    def _evaluated(self, plan: RoundPlan, clients: list[ClientReport], reports: list[RoundReport],
                   model: Tensor) -> dict[str, Any]:
        """The history's record of an evaluated round."""
        measured = next(report.measured for report in reports if report.measured)
        fields = cohort_record(clients, measured, gradients=not self.config.strategy.trains)
        fields |= {"left_out": self._left_out, "left_out_why": self._left_out_why,
                   "prompt": sample_prompt(self.data).text}
        if self.config.cohort is not None:
            fields["cohort"] = plan.cohort
        if self.config.eval_clients:
            fields["client_val_ppls"] = [perplexity(mean_loss(client.validation))
                                         for client in clients]
        self._left_out, self._left_out_why = [], []
        return self.recorder.evaluated(plan.round, _validation(reports), model,
                                       lambda: self._sample(model), **fields)

    def _sample(self, model: Tensor) -> str:
        """Sample text of a global model (size,); on a thread of the recorder's."""
        self.flat.vector.copy_(model)
        return sample_text(self.model, self.data, torch.device("cpu"))

    def announce(self, decision: RoundDecision) -> None:
        """Record and print why the run ends early."""
        *trace, line = decision.error.splitlines(keepends=True)
        write_failure(self.config.run_dir, line, decision.kind)
        log(line, ERROR, "".join(trace))

    def end_early(self, model: Tensor | None, reports: list[RoundReport]) -> None:
        """Save the model of the last complete round, and say where the last good one is.

        The model is not saved if its replicas differ or it is not finite. model: (size,), None if
        it is not good or nobody could send it; reports: of all ranks, with digests of what they
        hold now.
        """
        try:
            self.recorder.close()
            if model is not None and not replicas.compare(reports, model):
                self.recorder.save_model(model)
        except FolderLost:
            return  # as announced, or nothing of this run is there any more
        except OSError as error:
            log(f"the last good model could not be saved: {explain(error)}", WARNING)
        path = self.config.run_dir / "model.safetensors"
        if path.exists():
            log(f"the last good model is in {path}")

    def finish(self, plan: RoundPlan, decision: RoundDecision, reports: list[RoundReport]) -> None:
        """Wait until everything is written, and record how the run ended."""
        self.recorder.finish(plan.round, decision.stop, [report.written for report in reports])
        if not plan.last:
            self.stopping.obeyed()


def _validation(reports: list[RoundReport]) -> list[Piece]:
    """The losses of all workers' parts of the validation split."""
    return [(number, loss, tokens) for report in reports
            for number, loss, tokens in report.validation]
