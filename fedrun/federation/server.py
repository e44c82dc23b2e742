"""The server: the plans of the rounds, the verdict on each, the run's history and models.

It keeps no clients and sums nothing. What it writes, it writes on a thread of its own, beside the
next rounds' training: nobody waits for a disk, unless it falls behind by PENDING writes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedrun.common.errors import Failure, FolderLost, explain
from fedrun.common.files import write_json
from fedrun.common.log import WARNING, log
from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed.stopping import StopRequest
from fedrun.federation import replicas
from fedrun.federation.plan import RoundDecision, RoundPlan, Schedule, Shards
from fedrun.model.build import DTYPES, new_model
from fedrun.records.best import BestModel
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.checkpoint_writer import CheckpointCoordinator
from fedrun.records.events import Events, Progress, cohort_event
from fedrun.records.history import COHORT_NUMBERS, SECONDS, RunTotals, cohort_record, half_losses
from fedrun.records.outcome import write_failure, write_outcome
from fedrun.records.snapshots import SnapshotWriter, save_model, tracked_parameters
from fedrun.training.evaluate import Piece, mean_loss, perplexity, sample_text
from fedrun.training.optimizer import scheduled_lr
from fedrun.training.params import FlatParams

# Pieces of work that wait for the writer or are under way. A piece of an evaluated round holds a
# copy of the model, as does one that waits for a place: of 100 million parameters in fp32, 2 GB in
# all at the most.
PENDING = 4


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
        self.steps = SnapshotWriter(config.run_dir / "server",
                                    tracked_parameters(self.flat.views(self.flat.vector)))
        self.history: list[dict[str, Any]] = []
        self.clocks = RunTotals()
        self.reference = config.strategy.first_reference(data.vocab_size, config.cohort_size)
        self._left_out: list[list[int]] = []  # round and client, since the last record
        self._left_out_why: list[str] = []
        done = 0
        if checkpoint:
            done = checkpoint.step
            self._load(checkpoint)
        self.events = Events(config, "round", self.schedule.rounds, done)
        self.progress = Progress("round", self.schedule.rounds, done, self.clocks.tokens)
        self.stopping = stopping
        losses = [(r["global_step"], r["server_val_loss"]) for r in self.history
                  if r["server_val_loss"] is not None]
        self.best = BestModel(config, losses) if config.keep == "best" else None
        self.checkpoints = CheckpointCoordinator(config, provenance, workers, self._write_rest)
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

    def plan(self, number: int) -> dict[str, Any]:
        due = self.checkpoints.due(number, last=number >= self.schedule.rounds)
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
        self.clocks.add(len(clients) * trained, loss_sum, tokens, **{
            name: max(report.get(name, 0.0) for report in reports) for name in SECONDS})
        self.clocks.bytes += sum(report.get("bytes", 0) for report in reports)
        if "entropy" in taken[0]:
            self.reference = self.config.strategy.next_reference([c["entropy"] for c in taken])
        for client in left_out:
            self._left_out.append([plan.round, client["client"]])
            self._left_out_why.append(client["left_out"])
            log(f"round {plan.round}: client {client['client']} is left out: "
                f"{client['left_out']}; its moments are reset")
        train_ppl = perplexity(loss_sum / tokens)
        steps = self.config.local_updates
        seen = {"train_ppl": train_ppl, "left_out": [c["client"] for c in left_out],
                "left_out_why": [c["left_out"] for c in left_out], "clients": cohort_event(clients),
                "lr": scheduled_lr(self.config, (plan.round - 1) * steps,
                                   self.schedule.rounds * steps), **self.clocks.now()}
        val_ppl = None
        if model is not None:
            record = self._add_record(plan, reports, model)
            val_ppl = record["server_val_ppl"]
            seen |= {"val_ppl": val_ppl} | {n: record[n] for n in COHORT_NUMBERS if n in record}
        self.events.add("round", round=plan.round, **seen)
        self.progress.step(plan.round, train_ppl, self.clocks.tokens, val_ppl)
        if plan.save or verdict.stop:
            self.checkpoints.begin(plan.round, self._state())
        self._commit(reports)

    def _commit(self, reports: list[dict[str, Any]]) -> None:
        for commit in self.checkpoints.collect(reports):
            self._write(commit)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the server; the records' sample text may still be made."""
        return {"history": self.history.copy(), "clocks": self.clocks.state(),
                "reference": self.reference, "left_out": list(self._left_out),
                "left_out_why": list(self._left_out_why)}

    def _load(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.server
        self.history = state["history"]
        self.clocks.load_state(state["clocks"])
        self.reference = state["reference"]
        self._left_out = state["left_out"]
        # Checkpoints did not always have the reasons, of which there was only one.
        self._left_out_why = state.get("left_out_why", ["not finite"] * len(self._left_out))
        write_json(self.config.run_dir / "training_history.json", self.history)

    def _add_record(self, plan: RoundPlan, reports: list[dict[str, Any]], model: Tensor
                    ) -> dict[str, Any]:
        pieces = _pieces(reports)
        loss = mean_loss(pieces)
        measured = next(r["server"] for r in reports if "server" in r)
        record = {
            "global_step": plan.round, **self.clocks.take_train_loss(),
            "server_val_loss": loss, "server_val_ppl": perplexity(loss),
            "val_loss_halves": half_losses(pieces), "generated": None, **self.clocks.now(),
            **cohort_record(_clients(plan, reports), measured,
                            gradients="gradient" in self.config.strategy.inputs),
            "left_out": self._left_out, "left_out_why": self._left_out_why}
        if self.config.cohort is not None:
            record["cohort"] = plan.cohort
        if self.config.eval_clients:
            by_client = {int(k): v for r in reports for k, v in r.get("client_pieces", {}).items()}
            record["client_val_ppls"] = [perplexity(mean_loss(by_client[k])) for k in plan.cohort]
        self._left_out, self._left_out_why = [], []
        self.history.append(record)
        self._write(lambda: self._save(plan.round, model, record))
        return record

    def _save(self, number: int, model: Tensor, record: dict[str, Any]) -> None:
        """On the writer's thread: the model, its tracked parameters, sample text, the history.

        On a disk that is full the run goes on, and the next evaluation tries again; the last one
        has to succeed, and so has one for which too many wait.
        """
        run_dir = self.config.run_dir
        last_try = number == self.schedule.rounds or self.steps.full
        self.flat.vector.copy_(model)
        self.steps.add(number, tracked_parameters(self.flat.views(model)))
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
            log(f"round {number} could not be written to {run_dir} ({error.strerror}); training "
                "continues", WARNING)

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
                log(f"{self.config.run_dir} is written more slowly than rounds go by: the run "
                    "waits for its disk (a larger --val_freq writes less)", WARNING)
            self._waited = True
            self._writing.popleft().result()
        self._writing.append(self._writer.submit(work))

    def end_early(self, verdict: RoundDecision, model: Tensor | None, reports: list[dict[str, Any]]
                  ) -> None:
        """Keep the model of the last whole round, unless there is none, its replicas differ or it
        is not finite, and tell the reason; `reports`: of all ranks, on what they hold now."""
        reason = verdict.error
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
            write_failure(self.config.run_dir, reason.splitlines()[-1], verdict.kind)
            print(f"fedrun: {reason}", file=sys.stderr, flush=True)

    def finish(self, plan: RoundPlan, verdict: RoundDecision, reports: list[dict[str, Any]]) -> None:
        """Wait until all is written, and say how the run stands."""
        self._wait_for_writer()
        self._commit(reports)
        self._close()
        if plan.last:
            write_outcome(self.config.run_dir, "finished", plan.round)
            return
        write_outcome(self.config.run_dir, "stopped", plan.round, verdict.stop)
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


def _clients(plan: RoundPlan, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The clients' reports in the order of the cohort, wherever they were trained."""
    by_client = {c["client"]: c for report in reports for c in report.get("clients", [])}
    assert sorted(by_client) == sorted(plan.cohort)
    return [by_client[k] for k in plan.cohort]


def _pieces(reports: list[dict[str, Any]]) -> list[Piece]:
    return [(number, loss, tokens) for report in reports
            for number, loss, tokens in report.get("pieces", [])]
