"""The server: the plans of the rounds, the verdict on each, the run's history and models.

It keeps no clients and sums nothing. What it writes, a `Recorder` writes beside the next rounds'
training.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import torch
from torch import Tensor

from fedrun.common.errors import Failure, FolderLost, explain
from fedrun.common.log import WARNING, log
from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed.stopping import StopRequest
from fedrun.federation import replicas
from fedrun.federation.plan import RoundDecision, RoundPlan, Schedule, Shards
from fedrun.model.build import DTYPES, new_model
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.history import SECONDS, cohort_record
from fedrun.records.recorder import Recorder
from fedrun.records.run_dir import write_failure
from fedrun.records.schema import FEDERATED
from fedrun.records.track import cohort_event
from fedrun.training.evaluate import Piece, mean_loss, perplexity, sample_text
from fedrun.training.optimizer import scheduled_lr
from fedrun.training.params import FlatParams


class Server:
    """Rank 0's part of the protocol."""

    def __init__(self, config: FederatedConfig, data: TokenData, stopping: StopRequest,
                 provenance: dict[str, Any], workers: int, checkpoint: Checkpoint | None = None
                 ) -> None:
        self.config = config
        self.data = data
        self.schedule = Schedule(config, Shards(config, data).sizes)
        self.model = new_model(config, data.vocab_size, torch.device("cpu"))
        self.flat = FlatParams(self.model)
        self.reference = config.strategy.first_reference(data.vocab_size, config.cohort_size)
        self._left_out: list[list[int]] = []  # round and client, since the last record
        self._left_out_why: list[str] = []
        state = checkpoint.server if checkpoint else None
        if state is not None:
            self._load(state)
        self.recorder = Recorder(config, FEDERATED, self.schedule.rounds, self.flat, provenance,
                                 workers, checkpoint.step if checkpoint else 0, state)
        self.stopping = stopping

    @property
    def size(self) -> int:
        return self.flat.size

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    def plan(self, number: int) -> dict[str, Any]:
        due = self.recorder.checkpoint_due(number)
        return dataclasses.asdict(self.schedule.plan(number, self.reference, save=due))

    def decide(self, plan: RoundPlan, reports: list[dict[str, Any]]) -> dict[str, str]:
        """A RoundDecision: what happens after local training. All go on, or all end, for one reason."""
        stop = next((r["signal"] for r in reports if r["signal"]), "") or self.stopping.asked_by()
        if plan.last:
            stop = ""  # it ends anyway
        error, kind = self._error(plan, reports)
        return dataclasses.asdict(RoundDecision(error, kind, stop))

    def _error(self, plan: RoundPlan, reports: list[dict[str, Any]]) -> tuple[str, Failure]:
        if lost := self.stopping.lost_folder():
            return lost, "error"
        for rank, report in enumerate(reports):
            if report.get("failure"):
                return (f"round {plan.round}: rank {rank} failed: {report['failure']}; all ranks "
                        "end"), "error"
            if report.get("traceback"):
                return (f"{report['traceback']}round {plan.round}: rank {rank} failed with the "
                        "error above; all ranks end"), "error"
        clients = _clients(plan, reports)
        left_out = [c for c in clients if c["left_out"]]
        if 2 * len(left_out) > len(clients):
            why = "; ".join(f"client {c['client']}: {c['left_out']}" for c in left_out[:3])
            more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
            return (f"round {plan.round}: {len(left_out)} of {len(clients)} clients are left out, "
                    f"more than half ({why}{more}){self._way_out(why)}"), "diverged"
        refused = self.config.strategy.refuse_total(math.fsum(
            c["weight"] for c in clients if not c["left_out"]))
        return f"round {plan.round}: {refused}" if refused else "", "error"

    def _way_out(self, why: str) -> str:
        """What to do where so many are left out, unless the reason says it itself."""
        if "--" in why:
            return ""
        said = f": --lr {self.config.lr:g} may be too large"
        if "beyond the bound" not in why:
            return said
        exact = "--wire exact " if self.config.wire == "int8" else ""
        return f"{said} ({exact}--reduce float has no bound)"

    def inspect(self, plan: RoundPlan, reports: list[dict[str, Any]], model: Tensor | None
                ) -> dict[str, str]:
        """A RoundDecision: why all ranks end, with this round lost, where the replicas of the global
        model differ or the model is ruined; `model` (size,) is the copy that was sent here, if one
        was."""
        wrong = replicas.compare(reports, model)
        diverged = any(report.get("not_finite") for report in reports)
        if not wrong and model is not None and not math.isfinite(mean_loss(_pieces(reports))):
            wrong, diverged = "the validation loss is not finite: --lr may be too large", True
        return dataclasses.asdict(RoundDecision(wrong and f"round {plan.round}: {wrong}",
                                          "diverged" if diverged else "error"))

    def record(self, plan: RoundPlan, verdict: RoundDecision, reports: list[dict[str, Any]],
               model: Tensor | None) -> None:
        """Take note of a round; `model` (size,) is the global model where it was evaluated."""
        clients = _clients(plan, reports)
        taken = [c for c in clients if not c["left_out"]]
        left_out = [c for c in clients if c["left_out"]]
        loss_sum = math.fsum(c["loss_sum"] for c in taken)
        tokens = sum(c["tokens"] for c in taken)
        trained = self.config.local_updates * self.config.batch_size * self.config.sequence_length
        self.recorder.totals.add(len(clients) * trained, loss_sum, tokens, **{
            name: max(report.get(name, 0.0) for report in reports) for name in SECONDS})
        self.recorder.totals.bytes += sum(report.get("bytes", 0) for report in reports)
        if "entropy" in taken[0]:
            self.reference = self.config.strategy.next_reference([c["entropy"] for c in taken])
        for client in left_out:
            self._left_out.append([plan.round, client["client"]])
            self._left_out_why.append(client["left_out"])
            log(f"round {plan.round}: client {client['client']} is left out: "
                f"{client['left_out']}; its moments are reset", WARNING)
        steps = self.config.local_updates
        lr = scheduled_lr(self.config, (plan.round - 1) * steps, self.schedule.rounds * steps)
        record = None if model is None else self._add_record(plan, reports, model)
        self.recorder.step(plan.round, perplexity(loss_sum / tokens), lr, record,
                           left_out=[c["client"] for c in left_out],
                           left_out_why=[c["left_out"] for c in left_out],
                           clients=cohort_event(clients))
        if plan.save or verdict.stop:
            self.recorder.begin_checkpoint(plan.round, reference=self.reference,
                                           left_out=list(self._left_out),
                                           left_out_why=list(self._left_out_why))
        self.recorder.commit_checkpoints(reports)

    def _load(self, state: dict[str, Any]) -> None:
        self.reference = state["reference"]
        self._left_out = state["left_out"]
        # Checkpoints did not always have the reasons, of which there was only one.
        self._left_out_why = state.get("left_out_why", ["not finite"] * len(self._left_out))

    def _add_record(self, plan: RoundPlan, reports: list[dict[str, Any]], model: Tensor
                    ) -> dict[str, Any]:
        measured = next(r["server"] for r in reports if "server" in r)
        fields = cohort_record(_clients(plan, reports), measured,
                               gradients="gradient" in self.config.strategy.inputs)
        fields |= {"left_out": self._left_out, "left_out_why": self._left_out_why}
        if self.config.cohort is not None:
            fields["cohort"] = plan.cohort
        if self.config.eval_clients:
            by_client = {int(k): v for r in reports for k, v in r.get("client_pieces", {}).items()}
            fields["client_val_ppls"] = [perplexity(mean_loss(by_client[k])) for k in plan.cohort]
        self._left_out, self._left_out_why = [], []
        return self.recorder.evaluated(plan.round, _pieces(reports), model,
                                       lambda: self._sample(model), **fields)

    def _sample(self, model: Tensor) -> str:
        """Sample text of a global model (size,); on the recorder's thread."""
        self.flat.vector.copy_(model)
        return sample_text(self.model, self.data, torch.device("cpu"))

    def end_early(self, verdict: RoundDecision, model: Tensor | None, reports: list[dict[str, Any]]
                  ) -> None:
        """Keep the model of the last whole round, unless there is none, its replicas differ or it
        is not finite, and tell the reason; `reports`: of all ranks, on what they hold now."""
        reason = verdict.error
        try:
            self.recorder.close()
            if model is not None and not replicas.compare(reports, model):
                self.recorder.save_model(model)
        except FolderLost as lost:
            reason = str(lost)
        except OSError as error:
            reason += f" (nor could the last good model be kept: {explain(error)})"
        finally:  # whatever the writer has met: the reason is told
            path = self.config.run_dir / "model.safetensors"
            if path.exists():
                reason += f"; the last good model is in {path}"
            write_failure(self.config.run_dir, reason.splitlines()[-1], verdict.kind)
            print(f"fedrun: {reason}", file=sys.stderr, flush=True)

    def finish(self, plan: RoundPlan, verdict: RoundDecision, reports: list[dict[str, Any]]) -> None:
        """Wait until all is written, and say how the run stands."""
        self.recorder.finish(plan.round, verdict.stop, reports)
        if not plan.last:
            self.stopping.obeyed()


def _clients(plan: RoundPlan, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clients' reports in the order of the cohort, wherever they were trained."""
    by_client = {c["client"]: c for report in reports for c in report.get("clients", [])}
    assert sorted(by_client) == sorted(plan.cohort)
    return [by_client[k] for k in plan.cohort]


def _pieces(reports: list[dict[str, Any]]) -> list[Piece]:
    return [(number, loss, tokens) for report in reports
            for number, loss, tokens in report.get("pieces", [])]
