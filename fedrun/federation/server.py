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

from fedrun.common.errors import ERROR_TEXTS, FolderLost, explain
from fedrun.common.log import ERROR, WARNING, log
from fedrun.common.perplexity import perplexity
from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed.handshake import Membership
from fedrun.distributed.stopping import StopRequest
from fedrun.federation import replicas
from fedrun.federation.cohort_log import CohortLog, RoundSums
from fedrun.federation.messages import (
    RoundDecision,
    RoundPlan,
    RoundReport,
    WorkerReport,
    clients_of,
)
from fedrun.federation.noise_keeper import RUNS
from fedrun.federation.schedule import Schedule
from fedrun.federation.site_holdout import SiteLosses
from fedrun.federation.spending import Spending
from fedrun.federation.tail import Tail
from fedrun.federation.used import clipped_to, median_norm, used_by_rule
from fedrun.model.base import Model
from fedrun.model.build import DTYPES
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.outcome import write_failure
from fedrun.records.recorder import ON_ROUND, OnRound, Recorder
from fedrun.records.schema import FEDERATED
from fedrun.strategies.base import ClientReport
from fedrun.strategies.robust import Robust
from fedrun.training.evaluate import Piece, mean_loss, sample_prompt, sample_text
from fedrun.training.optimizer import scheduled_lr
from fedrun.training.params import FlatParams

AT_SITE = ("journal", "noise", "spent")
"""Codes of the reasons that a single site may have to refuse a sum."""


class Server:
    """Rank 0's part of the protocol."""

    def __init__(self, config: FederatedConfig, data: TokenData, schedule: Schedule,
                 model: Model, stopping: StopRequest, provenance: dict[str, Any], workers: int,
                 checkpoint: Checkpoint | None = None, skips_texts: bool = False,
                 on_round: OnRound | None = None, members: Membership | None = None) -> None:
        """
        model: the run's model at its start, on the CPU.
        workers: how many there are.
        skips_texts: whether an evaluation goes without a sample text for which training would have
            to wait (see records/sample_texts.py).
        on_round: called when a round is recorded.
        members: who takes part, if the run has several owners.
        """
        self.members = members
        self.config, self.data, self.schedule, self.model = config, data, schedule, model
        self.flat = FlatParams(model, config.personal)
        self.entropy_reference = config.strategy.first_entropy_reference(data.vocab_size,
                                                                         config.cohort_size)
        self.cohorts = CohortLog(config, members)
        step, state = (0, None) if checkpoint is None else (checkpoint.step, checkpoint.server)
        self._saved = step  # the last round whose checkpoint was begun
        if state is not None:
            self.entropy_reference = state["reference"]
            self.cohorts.load(state)
        self.recorder = Recorder(config, FEDERATED, schedule.rounds, self.flat, provenance, workers,
                                 step, state, skips_texts, on_round, members)
        self.stopping = stopping
        if isinstance(config.strategy, Robust):
            kept = config.cohort_size * self.flat.shared_size * 4 / 1e6
            log(f"{config.method}: the updates of a round's {config.cohort_size} clients take "
                f"{kept:.3g} MB together, and each worker's section of them {kept / workers:.3g} "
                "MB, of which it gets from other machines what it does not have")
        elif sums := config.strategy.reweighted:
            kept = config.cohort_size * self.flat.shared_size * 4 / 1e6
            log(f"{config.method}: workers keep the updates of a round's {config.cohort_size} "
                f"clients, {kept:.3g} MB together, and sum them {sums} times")
        if own := self.size - self.flat.shared_size:
            measures = "" if config.eval_clients or config.sites else (
                "; --eval_clients measures clients' own models, with --client_holdout on their own "
                "text too")
            log(f"--personal: {own:,} of {self.size:,} elements stay with each client; the global "
                "model has what the run started from in their place, so its perplexity is that of "
                f"no client{measures}")
        self.spending: Spending | None = None
        """With --dp: what it costs (see spending.py)."""

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
        last, if `on_round` or --max_epsilon asks for that."""
        asked, spending = ON_ROUND if self.recorder.stop else "", self.spending
        if spending is not None:
            asked = asked or spending.ends_before(number)
        if asked:
            return replace(self.schedule.plan(number - 1, self.entropy_reference), evaluate=False,
                           save=self._saved < number - 1, stop=asked)
        ends = (spending is not None and number < self.schedule.rounds
                and bool(spending.ends_before(number, number + 1)))
        plan = self.schedule.plan(number, self.entropy_reference,
                                  save=ends or self.recorder.checkpoint_due(number))
        return replace(plan, evaluate=plan.evaluate or ends, kept=self.kept)

    @property
    def kept(self) -> list[int]:
        """`RoundPlan.kept`, as it is now."""
        return self.recorder.checkpoints.kept

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
        clip = None
        if not self.config.sites and self.config.dp != "client":
            clients = clients_of(plan, trained)
            if error := self._refuse(plan, clients):
                return error
            clip = median_norm(clients) if self.config.clips_to_median else None
        if plan.last:
            return RoundDecision(clip=clip)  # it ends anyway
        signals = [report.signal for report in trained if report.signal]
        return RoundDecision(stop=signals[0] if signals else self.stopping.asked_by(), clip=clip)

    def _refuse(self, plan: RoundPlan, clients: list[ClientReport]) -> RoundDecision | None:
        """The decision on a round whose sum cannot be used."""
        left_out = [c for c in clients if c.left_out]
        if 2 * len(left_out) > len(clients):
            return RoundDecision(f"round {plan.round}: {len(left_out)} of {len(clients)} clients "
                                 f"are left out, more than half ({self._reasons(left_out)}",
                                 "diverged")
        strategy = self.config.strategy
        refused = strategy.refuse_total(math.fsum(c.weight for c in clients))
        if too_few := strategy.refuse_count(len(clients) - len(left_out)):
            refused = f"{too_few} ({self._reasons(left_out)}"
        return RoundDecision(f"round {plan.round}: {refused}") if refused else None

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
        With sites: also whether their sum was made, and can be used.
        """
        if unusable := self._unusable(plan, reports):
            return unusable
        error = replicas.compare(reports, model)
        diverged = any(report.not_finite for report in reports)
        if not error and model is not None and not math.isfinite(mean_loss(_validation(reports))):
            error, diverged = "the validation loss is not finite: --lr may be too large", True
        if not error:
            return RoundDecision()
        noise = ", or the noise of --dp is too strong" if diverged and self.config.private else ""
        return RoundDecision(f"round {plan.round}: {error}{noise}", "diverged" if diverged else
                             "error", model_is_good=False)

    def _unusable(self, plan: RoundPlan, reports: list[RoundReport]) -> RoundDecision | None:
        """With sites: the decision on a round whose sum was not made, or cannot be used."""
        failed = {rank: report.failure for rank, report in enumerate(reports) if report.failure}
        if failed:
            # Where a site refuses the sum, the others see masks that do not cancel.
            rank = min(failed, key=lambda rank: failed[rank] not in AT_SITE)
            why = ERROR_TEXTS[failed[rank]]
            if failed[rank] == "diverged":
                tail = _tail(reports)
                why = (f"{sum(tail.left_out.values())} of {len(plan.cohort)} clients are left out, "
                       f"more than half ({tail.reasons}): --lr {self.config.lr:g} may be too large")
            elif failed[rank] in AT_SITE and self.members is not None:
                why = f"site {self.members.sites[rank]}: {why} (its own log says more)"
            return RoundDecision(f"round {plan.round}: {why}",
                                 "diverged" if failed[rank] in ("diverged", "few") else "error")
        if not any(report.tail for report in reports):
            return None
        refused = self.config.strategy.refuse_total(_tail(reports).total_weight)
        return RoundDecision(f"round {plan.round}: {refused}",
                             model_is_good=False) if refused else None

    def record(self, plan: RoundPlan, decision: RoundDecision, trained: list[WorkerReport],
               reports: list[RoundReport], model: Tensor | None,
               state: dict[str, Tensor] | None = None) -> None:
        """Record a round; `model` (size,) is the global model if it was evaluated, `state` what
        real sites send of a round that is saved."""
        if self.spending is not None:
            known = self.config.dp == "example" and not self.config.sites
            clients = clients_of(plan, trained) if known else []
            sums = self.cohorts.of_private(self.spending, plan, reports, clients, model)
        elif self.config.sites:
            sums = self.cohorts.of_tail(plan, _tail(reports))
        else:
            clients = clipped_to(decision.clip, clients_of(plan, trained))
            clients = used_by_rule(reports, clients, self.config.strategy)
            if entropies := [c.entropy for c in clients
                             if c.entropy is not None and not c.left_out]:
                self.entropy_reference = self.config.strategy.next_entropy_reference(entropies)
            sums = self.cohorts.of_clients(plan, clients)
        per_client = plan.steps * self.config.batch_size * self.config.sequence_length
        self.recorder.totals.add(
            len(plan.cohort) * per_client, sums.loss_sum, sums.tokens,
            local_training_seconds=max(r.local_training_seconds for r in trained),
            aggregation_seconds=max(r.aggregation_seconds for r in reports),
            evaluation_seconds=max(r.evaluation_seconds for r in reports))
        self.recorder.totals.bytes += sum(report.bytes for report in trained)
        lr = scheduled_lr(self.config, plan.first_step,
                          self.schedule.rounds * self.config.local_updates)
        record = None if model is None else self._evaluated(plan, sums, reports, model)
        train_ppl = perplexity(sums.loss_sum / sums.tokens) if sums.tokens else None
        self.recorder.step(plan.round, train_ppl, lr, record, **sums.event)
        if plan.save or decision.stop:
            self.begin_checkpoint(plan, state)
        self.recorder.commit_checkpoints(report.written for report in reports)

    def begin_checkpoint(self, plan: RoundPlan, state: dict[str, Tensor] | None = None) -> None:
        """Keep the server's state after a round, whose workers have begun to write a checkpoint,
        and the global state that real sites have sent."""
        self._saved = plan.round
        spent = {} if self.spending is None else {RUNS: self.spending.runs}
        self.recorder.begin_checkpoint(plan.round, state, reference=self.entropy_reference,
                                       **self.cohorts.state(), **spent)

    def _evaluated(self, plan: RoundPlan, sums: RoundSums, reports: list[RoundReport],
                   model: Tensor) -> dict[str, Any]:
        """The history's record of an evaluated round."""
        measured = next(report.measured for report in reports if report.measured)
        fields = sums.record(measured, not self.config.strategy.trains) | self.cohorts.left_out()
        if words := next((report.site_losses for report in reports if report.site_losses), []):
            fields |= SiteLosses(*words).record()
        fields["prompt"] = sample_prompt(self.data).text
        if self.config.cohort is not None:
            fields["cohort"] = plan.cohort
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
        if self.spending is not None:
            log(self.spending.line)
        if not plan.last:
            self.stopping.obeyed()


def _tail(reports: list[RoundReport]) -> Tail:
    """The tail of a round with sites."""
    return Tail.from_words(next(report.tail for report in reports if report.tail))


def _validation(reports: list[RoundReport]) -> list[Piece]:
    """The losses of all workers' parts of the validation split."""
    return [(number, loss, tokens) for report in reports
            for number, loss, tokens in report.validation]
